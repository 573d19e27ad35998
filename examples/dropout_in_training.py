"""Dropout under MLX's transformations: a compiled training step, and a checkpointed block.

Run: python examples/dropout_in_training.py
"""

from functools import partial

import mlx.core as mx

from flash_attn import flash_attn_func

mx.set_default_device(mx.cpu)
mx.random.seed(0)
q, k, v = (mx.random.normal((2, 64, 4, 32)) for _ in range(3))


def loss(q: mx.array, k: mx.array, v: mx.array, dropout_key: mx.array | None = None) -> mx.array:
    return flash_attn_func(q, k, v, dropout_p=0.1, causal=True, dropout_key=dropout_key).square().mean()


# The mask comes from mx.random, so a compiled function must take and return its state, as for all of MLX's random functions;
# else every call repeats the mask of the first.
@partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
def step(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    return mx.value_and_grad(loss)(q, k, v)


first, _ = step(q, k, v)
second, _ = step(q, k, v)
print(f"two compiled steps draw two masks: {first.item():.6f} {second.item():.6f}")
assert first.item() != second.item()

# mx.checkpoint runs the function again in the backward pass, and would draw another mask there. A key fixes it.
key = mx.random.key(1)
plain = mx.grad(loss)(q, k, v, key)
checkpointed = mx.grad(mx.checkpoint(loss))(q, k, v, key)
print(f"checkpointed and plain gradients differ by {mx.abs(plain - checkpointed).max().item():.1e}")
assert mx.allclose(plain, checkpointed, rtol=0, atol=0).item()
