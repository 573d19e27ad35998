"""Serving several conversations from one pool of pages: a shared prompt, a fork, and what to do when the pages run out.

Run: python examples/paged_cache.py
"""

import mlx.core as mx

from flash_attn import OutOfPages, PagedKVCache, flash_attn_func, flash_attn_with_kvcache

mx.set_default_device(mx.cpu)
mx.random.seed(0)

VOCABULARY, HEADS, HEADS_K, HEAD_DIM = 64, 4, 2, 32
WIDTH = HEADS * HEAD_DIM

embedding = mx.random.normal((VOCABULARY, WIDTH))
to_q = mx.random.normal((WIDTH, WIDTH)) / WIDTH**0.5
to_k, to_v = (mx.random.normal((WIDTH, HEADS_K * HEAD_DIM)) / WIDTH**0.5 for _ in range(2))


def project(tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """q, k, v (tokens, heads, head_dim) of tokens (tokens,)."""
    return tuple((embedding[tokens] @ w).reshape(tokens.size, -1, HEAD_DIM) for w in (to_q, to_k, to_v))


def next_tokens(tokens: mx.array, attention: mx.array) -> mx.array:
    """The likeliest token after each."""
    x = embedding[tokens] + attention.reshape(tokens.size, WIDTH)
    return (x @ embedding.T).argmax(axis=-1)


cache = PagedKVCache(num_pages=12, page_size=8, kv_heads=HEADS_K, head_dim=HEAD_DIM, dtype=mx.float32)
texts: dict[int, list[int]] = {}  # each sequence's tokens; the last is not in the cache yet


def advance(seqs: list[int]) -> None:
    """Computes what the cache lacks of some sequences, whole prompts or single tokens, in one call; one token more for each."""
    new = [texts[seq][cache.length(seq) :] for seq in seqs]
    step = cache.append(seqs, tokens=new)
    packed = mx.array([token for tokens in new for token in tokens])
    q, k, v = project(packed)
    attention = flash_attn_with_kvcache(
        q,
        cache.k_cache,
        cache.v_cache,
        k,
        v,
        cache_seqlens=step.cache_seqlens,
        block_table=step.block_table,
        causal=True,
        cu_seqlens_q=step.cu_seqlens,
        max_seqlen_q=step.max_seqlen,
        cu_seqlens_k_new=step.cu_seqlens,
    )
    last = step.cu_seqlens[1:] - 1
    for seq, token in zip(seqs, next_tokens(packed, attention)[last].tolist(), strict=True):
        texts[seq].append(token)


def start(prompt: list[int]) -> int:
    seq = cache.add_sequence(prompt)
    texts[seq] = list(prompt)
    print(f"sequence {seq}: {cache.length(seq)} of {len(prompt)} prompt tokens are cached")
    advance([seq])
    return seq


instructions = [(7 * i + 3) % VOCABULARY for i in range(20)]
first = start([*instructions, 1, 2, 3])
second = start([*instructions, 9, 8])  # shares two full pages with the first
assert cache.stats().hits == 2

# Two answers to one question: the fork shares every page, and gets a copy of the last one when it writes.
fork = cache.fork(first)
texts[fork] = [*texts[first][:-1], 42]
for _ in range(16):
    advance([first, second, fork])
print(cache.stats())
assert cache.stats().copies == 1

# Out of pages: nothing has changed, so finish a sequence and try again. Its pages stay findable until others need them.
finished: dict[int, list[int]] = {}
long_prompt = [(11 * i + 5) % VOCABULARY for i in range(40)]
waiting = cache.add_sequence(long_prompt)
texts[waiting] = list(long_prompt)
while len(texts[waiting]) == len(long_prompt):
    try:
        advance([waiting])
    except OutOfPages as error:
        print(error)
        oldest = min(texts)
        cache.free(oldest)
        finished[oldest] = texts.pop(oldest)
assert finished

# What each sequence decoded is what attention without a cache gives.
for seq, text in {**finished, **texts}.items():
    decoded = 1 if seq == waiting else 16
    tokens = mx.array(text)
    q, k, v = project(tokens)
    attention = flash_attn_func(q[None], k[None], v[None], causal=True)[0]
    assert next_tokens(tokens, attention).tolist()[-decoded - 1 : -1] == text[-decoded:], seq
print("every sequence is as without a cache")
