"""Memory: O(seqlen), and no copy of a view, by MLX's own count and by the process's resident size."""

from __future__ import annotations

import mlx.core as mx
import pytest
from support import integers, normal, run_python

from flash_attn import flash_attn_func, flash_attn_varlen_func


def peak_above_inputs(function, *arrays: mx.array) -> int:
    """Bytes that a call holds at its peak, beyond what was there before."""
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*arrays))
    return mx.get_peak_memory() - before


def outputs(batch: int, seqlen: int, heads: int, dim: int) -> int:
    """Bytes of out and LSE in float32."""
    return 4 * batch * seqlen * heads * (dim + 1)


SMALL = 1 << 16

VIEWS = {
    "packed q, k, v": ((2, 512, 3, 4, 64), lambda x: (x[:, :, 0], x[:, :, 1], x[:, :, 2])),
    "heads before sequence": (
        (2, 4, 512, 192),
        lambda x: tuple(y.transpose(0, 2, 1, 3) for y in (x[..., :64], x[..., 64:128], x[..., 128:])),
    ),
    "joined in the last axis": ((2, 512, 4, 192), lambda x: (x[..., :64], x[..., 64:128], x[..., 128:])),
    "every other token": ((2, 1024, 4, 192), lambda x: (x[:, ::2, :, :64], x[:, ::2, :, 64:128], x[:, ::2, :, 128:])),
    "one kv head broadcast": ((2, 512, 4, 64), lambda x: (x, *[mx.broadcast_to(x[:, :, :1], x.shape)] * 2)),
}


@pytest.mark.parametrize(("shape", "views"), VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_in_place(rng, shape, views):
    peak = peak_above_inputs(lambda x: flash_attn_func(*views(x), causal=True), normal(rng, *shape))
    assert peak <= outputs(2, 512, 4, 64) + SMALL


def test_views_of_packed_sequences_are_read_in_place(rng):
    bounds = integers(0, 300, 1024)
    peak = peak_above_inputs(
        lambda x: flash_attn_varlen_func(x[:, 0], x[:, 1], x[:, 2], bounds, bounds, 724, 724), normal(rng, 1024, 3, 4, 64)
    )
    assert peak <= outputs(1, 1024, 4, 64) + SMALL


def test_only_a_last_axis_with_a_stride_is_copied(rng):
    x = normal(rng, 2, 512, 4, 128)
    mx.eval(x)
    peak = peak_above_inputs(lambda x: flash_attn_func(x[..., ::2], x[..., :64], x[..., 64:]), x)
    assert peak <= 2 * outputs(2, 512, 4, 64) + SMALL


@pytest.mark.parametrize("shape", [(1, 1, 1, 1024), (1024, 1), (4, 1, 1024), (1, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bool_], ids=str)
def test_a_broadcast_mask_is_never_expanded(rng, shape, dtype):
    x = normal(rng, 1, 1024, 4, 64)
    mask = normal(rng, *shape) > 0 if dtype == mx.bool_ else normal(rng, *shape)
    peak = peak_above_inputs(lambda x, mask: flash_attn_func(x, x, x, attn_mask=mask), x, mask)
    assert peak <= outputs(1, 1024, 4, 64) + SMALL


def test_the_gradient_of_a_broadcast_mask_is_never_expanded(rng):
    x, mask = normal(rng, 1, 1024, 2, 32), normal(rng, 1024)
    gradient = mx.grad(lambda mask, x: flash_attn_func(x, x, x, attn_mask=mask).sum())
    peak = peak_above_inputs(gradient, mask, x)
    assert peak <= 12 * x.nbytes  # the scores would be 64 copies of x


@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": (100, 0)}, {"softcap": 10.0}, {"dropout_p": 0.1, "dropout_key": mx.zeros((2,), mx.uint32)}],
    ids=str,
)
def test_forward_and_backward_are_linear_in_the_sequence(rng, options):
    x = normal(rng, 1, 4096, 1, 32)
    gradient = mx.grad(lambda q, k, v: flash_attn_func(q, k, v, **options).sum(), argnums=(0, 1, 2))
    peak = peak_above_inputs(gradient, x, x + 1, x + 2)
    assert peak <= 12 * x.nbytes  # the scores would be 128 copies of x


RESIDENT = """
import mlx.core as mx
from flash_attn import flash_attn_func
from support import peak_resident_bytes
mx.set_default_device(mx.cpu)
def step(seqlen):
    q, k, v = (mx.random.normal((1, seqlen, 1, 64)) for _ in range(3))
    gradient = mx.grad(lambda q, k, v: flash_attn_func(q, k, v, causal=True).sum(), argnums=(0, 1, 2))
    mx.eval(q, k, v)
    before = peak_resident_bytes()
    mx.eval(gradient(q, k, v))
    return (peak_resident_bytes() - before) / q.nbytes
step(256)
print(step(8192))
"""


def test_the_process_grows_by_few_copies_of_q():
    """Scratch that MLX does not count is seen here; the scores would be 128 copies."""
    assert float(run_python(RESIDENT)) <= 12.0
