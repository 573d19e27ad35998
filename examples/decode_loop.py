"""Greedy decoding with a KV cache: a tiny attention layer, its prompt in one call, then a token a call.

Run: python examples/decode_loop.py
"""

import mlx.core as mx

from flash_attn import flash_attn_func, flash_attn_with_kvcache

mx.set_default_device(mx.cpu)
mx.random.seed(0)

VOCABULARY, HEADS, HEADS_K, HEAD_DIM = 64, 4, 2, 32
CAPACITY = 64  # tokens that the cache has room for
WIDTH = HEADS * HEAD_DIM

embedding = mx.random.normal((VOCABULARY, WIDTH))
to_q = mx.random.normal((WIDTH, WIDTH)) / WIDTH**0.5
to_k, to_v = (mx.random.normal((WIDTH, HEADS_K * HEAD_DIM)) / WIDTH**0.5 for _ in range(2))
to_logits = mx.random.normal((WIDTH, VOCABULARY))

# Rotary position embedding: one row a position, one column a pair of a head's elements.
frequencies = 10000.0 ** (-mx.arange(0, HEAD_DIM, 2) / HEAD_DIM)
angles = mx.arange(CAPACITY)[:, None] * frequencies
cos, sin = mx.cos(angles), mx.sin(angles)


def project(tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """q, k, v (batch, seqlen, heads, head_dim) of tokens (batch, seqlen)."""
    x = embedding[tokens]
    return tuple((x @ w).reshape(*tokens.shape, -1, HEAD_DIM) for w in (to_q, to_k, to_v))


def logits(attention: mx.array) -> mx.array:
    """(batch, seqlen, vocabulary)"""
    return attention.flatten(2) @ to_logits


def cached_step(tokens: mx.array, k_cache: mx.array, v_cache: mx.array, length: int) -> mx.array:
    """Logits of new tokens (batch, seqlen) that follow `length` others. Their keys and values go into the caches, in place."""
    q, k, v = project(tokens)
    attention = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=length, causal=True
    )
    return logits(attention)


prompts = mx.array([[3, 14, 15, 9, 26], [2, 7, 18, 28, 18]])
batch, length = prompts.shape
k_cache, v_cache = (mx.zeros((batch, CAPACITY, HEADS_K, HEAD_DIM)) for _ in range(2))

step_logits = [cached_step(prompts, k_cache, v_cache, length=0)]
tokens = prompts
for _ in range(24):
    new = step_logits[-1][:, -1:].argmax(axis=-1)
    step_logits.append(cached_step(new, k_cache, v_cache, length=tokens.shape[1]))
    tokens = mx.concatenate([tokens, new], axis=1)
print("decoded", tokens[:, length:].tolist())

# The same without a cache: attention over all tokens at once, with positions from MLX's own rotary embedding.
q, k, v = project(tokens)


def rotate(x: mx.array) -> mx.array:
    heads_first = x.swapaxes(1, 2)
    return mx.fast.rope(heads_first, HEAD_DIM, traditional=True, base=10000.0, scale=1.0, offset=0).swapaxes(1, 2)


full_logits = logits(flash_attn_func(rotate(q), rotate(k), v, causal=True))
difference = mx.abs(full_logits - mx.concatenate(step_logits, axis=1)).max().item()
print(f"logits with and without a cache differ by {difference:.1e}")
assert difference < 1e-4
assert mx.array_equal(full_logits[:, length - 1 : -1].argmax(axis=-1), tokens[:, length:]).item()
# The caches hold what was appended, rotated, and nothing behind it.
assert mx.allclose(k_cache[:, : tokens.shape[1]], rotate(k), atol=1e-5).item()
assert mx.abs(v_cache[:, tokens.shape[1] :]).max().item() == 0
