"""Whether attention gives the right numbers on a device, and how fast.

What `python -m flash_attn.flash_attn_mlx.device --self-test` runs. Every call is computed twice, by the kernels of the device
and by MLX ops on the CPU; speeds stand beside those of MLX's own attention.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import mlx.core as mx

from .interface import flash_attn_func, flash_attn_varlen_func
from .kvcache import flash_attn_with_kvcache

CPU = mx.Device(mx.cpu)

# (q, k, v) -> out
Attention: TypeAlias = Callable[[mx.array, mx.array, mx.array], mx.array]
# On a device.
AttentionOn: TypeAlias = Callable[[mx.Device], Attention]

# Largest error that rounding explains, relative to the largest value of the reference: (out, gradients).
_TOLERANCE = {mx.float32: (2e-5, 1e-4), mx.float16: (2e-3, 4e-3), mx.bfloat16: (1.6e-2, 3.2e-2)}


# ---- numbers


def errors(device: mx.Device) -> dict[str, float]:
    """Largest error over what rounding allows, by the name of a small call in each dtype; below 1 is a pass.

    A call whose kernel is refused, so that the reference computes, has an infinite error.
    """
    found = {}
    for dtype, (out_tolerance, gradient_tolerance) in _TOLERANCE.items():
        dtype_name = str(dtype).removeprefix("mlx.core.")
        for name, q_shape, k_shape, attention in _cases():
            keys = mx.random.split(mx.random.key(7), 4)
            shapes = (q_shape, k_shape, k_shape, q_shape)
            *inputs, cotangent = (
                mx.random.normal(shape, dtype, key=key, stream=CPU) for shape, key in zip(shapes, keys, strict=True)
            )
            got = _by_kernels(_out_and_gradients, attention(device), inputs, cotangent)
            with _routed_to("reference"):
                truth = _out_and_gradients(attention(CPU), inputs, cotangent)
            tolerances = (out_tolerance, gradient_tolerance, gradient_tolerance, gradient_tolerance)
            found[f"{name}, {dtype_name}"] = _largest_error(got, truth, tolerances)
        for dim in (64, 256):
            got = _by_kernels(_decode_step, dtype, dim, device)
            with _routed_to("reference"):
                truth = _decode_step(dtype, dim, CPU)
            found[f"paged decode, D {dim}, {dtype_name}"] = _largest_error(got, truth, (out_tolerance,) * len(truth))
    return found


def _cases() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], AttentionOn]]:
    """Name, shape of q, shape of k and v, function of (q, k, v)."""

    def dense(**options: Any) -> AttentionOn:
        return lambda device: lambda q, k, v: cast(mx.array, flash_attn_func(q, k, v, stream=device, **options))

    yield "full", (2, 33, 4, 64), (2, 47, 4, 64), dense()
    yield "causal, grouped heads", (1, 70, 4, 40), (1, 90, 2, 40), dense(causal=True)
    for dim in (96, 128, 256):
        yield f"causal, D {dim}", (1, 70, 2, dim), (1, 70, 2, dim), dense(causal=True)
    slopes = mx.array([0.5, 0.25, 0.125, 0.0625])
    yield "window, softcap, ALiBi", (1, 65, 4, 32), (1, 65, 4, 32), dense(window_size=(20, 5), softcap=8.0, alibi_slopes=slopes)
    yield "dropout", (1, 50, 2, 64), (1, 50, 2, 64), dense(dropout_p=0.3, dropout_key=mx.array([1, 2], mx.uint32))
    mask = mx.random.bernoulli(0.7, (1, 1, 50, 60), key=mx.random.key(3), stream=CPU)
    yield "attn_mask, sinks", (1, 50, 2, 64), (1, 60, 2, 64), dense(attn_mask=mask, learnable_sink=mx.array([0.5, -0.5]))
    starts = mx.array([0, 5, 5, 60], mx.int32)

    def varlen(device: mx.Device) -> Attention:
        return lambda q, k, v: cast(
            mx.array, flash_attn_varlen_func(q, k, v, starts, starts, 55, 55, causal=True, stream=device)
        )

    yield "varlen, causal", (60, 2, 64), (60, 2, 64), varlen


def _decode_step(dtype: mx.Dtype, dim: int, device: mx.Device) -> list[mx.array]:
    """out and both caches after two tokens are rotated, appended to pages in no order, and attended."""
    batch, new, heads, heads_k, page_size, blocks = 2, 2, 4, 2, 16, 4
    keys = iter(mx.random.split(mx.random.key(8), 7))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, dtype, key=next(keys), stream=CPU)

    k_cache, v_cache = (normal(batch * blocks, page_size, heads_k, dim) for _ in range(2))
    k, v = (normal(batch, new, heads_k, dim) for _ in range(2))
    cos, sin = (normal(blocks * page_size, dim // 2) for _ in range(2))
    pages = mx.array([[6, 1, 3, 0], [2, 7, 5, 4]], mx.int32)
    lengths = mx.array([15, 40], mx.int32)
    q = normal(batch, new, heads, dim)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, lengths, block_table=pages, causal=True, stream=device)
    results = [cast(mx.array, out), k_cache, v_cache]
    mx.eval(results)
    return results


def _by_kernels(function: Callable[..., list[mx.array]], *arguments: Any) -> list[mx.array] | None:
    """Nothing where a kernel failed, or where a warning says that something else computed."""
    with _routed_to("kernel"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = function(*arguments)
        except Exception as error:  # whatever it is belongs into the report
            warnings.warn(f"[flash_attn] {error}", stacklevel=1)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    return None if any("[flash_attn]" in str(warning.message) for warning in caught) else results


@contextmanager
def _routed_to(name: str) -> Iterator[None]:
    """The kernel or the reference, whatever the caller's environment says."""
    route = "kernel" if name == "kernel" else "auto"
    settings = {"FLASH_ATTENTION_MLX_REF": str(int(name == "reference")), "FLASH_ATTENTION_MLX_ROUTE": route}
    before = {variable: os.environ.get(variable) for variable in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _out_and_gradients(attention: Attention, inputs: list[mx.array], cotangent: mx.array) -> list[mx.array]:
    out, gradients = mx.vjp(attention, inputs, [cotangent])
    results = [*out, *gradients]
    mx.eval(results)
    return results


def _largest_error(got: list[mx.array] | None, expected: list[mx.array], tolerances: tuple[float, ...]) -> float:
    if got is None:
        return float("inf")
    return max(_relative_error(a, b) / tolerance for a, b, tolerance in zip(got, expected, tolerances, strict=True))


def _relative_error(got: mx.array, expected: mx.array) -> float:
    with mx.stream(CPU):
        got, expected = got.astype(mx.float32), expected.astype(mx.float32)
        error = mx.abs(got - expected).max() / mx.maximum(1.0, mx.abs(expected).max())
        return float(mx.where(mx.isnan(error), mx.inf, error))  # NaN is no pass


# ---- the matrix units of an Apple GPU

# Row and column of the first of a lane's two elements, as src/metal/tile.metal has them.
_PLACE = """
  const uint lane = thread_index_in_simdgroup;
  const uint quad = lane / 4;
  const uint row = (quad & 4) + (lane / 2) % 4;
  const uint column = (quad & 2) * 2 + (lane % 2) * 2;
"""
# D = A B of 8 x 8 matrices by lanes' elements.
PRODUCT_SOURCE = (
    _PLACE
    + """
  simdgroup_matrix<float, 8, 8> left;
  simdgroup_matrix<float, 8, 8> right;
  simdgroup_matrix<float, 8, 8> sum;
  reinterpret_cast<thread float2&>(left.thread_elements()) = float2(a[row * 8 + column], a[row * 8 + column + 1]);
  reinterpret_cast<thread float2&>(right.thread_elements()) = float2(b[row * 8 + column], b[row * 8 + column + 1]);
  reinterpret_cast<thread float2&>(sum.thread_elements()) = float2(0.0f);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  const float2 mine = reinterpret_cast<thread float2&>(sum.thread_elements());
  d[row * 8 + column] = mine.x;
  d[row * 8 + column + 1] = mine.y;
"""
)
# Which elements of a matrix in memory a lane gets.
_LAYOUT_SOURCE = """
  simdgroup_matrix<float, 8, 8> m;
  simdgroup_load(m, a, 8);
  const float2 mine = reinterpret_cast<thread float2&>(m.thread_elements());
  place[2 * thread_index_in_simdgroup] = mine.x;
  place[2 * thread_index_in_simdgroup + 1] = mine.y;
"""


def _metal_kernel(name: str, inputs: list[str], outputs: list[str], source: str) -> Callable[..., list[mx.array]]:
    kernel = mx.fast.metal_kernel(name, inputs, outputs, source, header="#include <metal_simdgroup_matrix>\n")
    return cast(Callable[..., list[mx.array]], kernel)


def simdgroup_matrices() -> dict[str, Any]:
    """Whether products of simdgroup_matrix are what the kernels take them for, and how lanes hold a matrix from memory."""
    numbers = mx.arange(64, dtype=mx.float32)
    product = _metal_kernel("flash_attn_probe_product", ["a", "b"], ["d"], PRODUCT_SOURCE)
    layout = _metal_kernel("flash_attn_probe_layout", ["a"], ["place"], _LAYOUT_SOURCE)
    options = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    (d,) = product(inputs=[numbers, numbers[::-1]], stream=mx.gpu, **options)
    (places,) = layout(inputs=[numbers], stream=mx.gpu, **options)
    with mx.stream(CPU):
        expected = numbers.reshape(8, 8) @ numbers[::-1].reshape(8, 8)
        return {
            "products_right": bool(mx.array_equal(d.reshape(8, 8), expected)),
            "elements_of_lanes": [int(place) for place in cast(list[float], places.tolist())],
        }


# ---- speed

_REPETITIONS = 7


def speeds(device: mx.Device) -> list[dict[str, Any]]:
    """Of some calls: unit, ours and MLX's. A causal call counts half of the products."""
    on_gpu = device == mx.Device(mx.gpu)
    dtype = mx.float16 if on_gpu else mx.float32
    heads = 16 if on_gpu else 4
    found = []
    for dim in (64, 128):
        for causal in (False, True):
            found.append(_forward_speed(device, dtype, 4096 if on_gpu else 1024, heads, dim, causal))
        found.append(_training_speed(device, dtype, 2048 if on_gpu else 512, heads, dim))
    for heads_k in (heads, heads // 4):
        found.append(_decode_speed(device, dtype, 32768 if on_gpu else 8192, heads, heads_k))
    return found


def _forward_speed(device: mx.Device, dtype: mx.Dtype, length: int, heads: int, dim: int, causal: bool) -> dict[str, Any]:
    q, k, v = (_normal(device, dtype, 1, length, heads, dim) for _ in range(3))
    flops = 4 * length * length * heads * dim / (2 if causal else 1)
    return {
        "call": f"forward, {'causal' if causal else 'full'}, {heads} heads, {length} x {length}, D {dim}",
        "unit": "TFLOP/s",
        "ours": flops / 1e12 / _seconds(lambda: [_ours(q, k, v, causal, device)]),
        "mlx": flops / 1e12 / _seconds(lambda: [_mlx(q, k, v, causal, device)]),
    }


def _training_speed(device: mx.Device, dtype: mx.Dtype, length: int, heads: int, dim: int) -> dict[str, Any]:
    q, k, v, dout = (_normal(device, dtype, 1, length, heads, dim) for _ in range(4))

    def gradients(attention: Callable[..., mx.array]) -> list[mx.array]:
        return mx.vjp(lambda q, k, v: attention(q, k, v, True, device), [q, k, v], [dout])[1]

    flops = 3.5 * 4 * length * length * heads * dim / 2
    return {
        "call": f"forward and backward, causal, {heads} heads, {length} x {length}, D {dim}",
        "unit": "TFLOP/s",
        "ours": flops / 1e12 / _seconds(lambda: gradients(_ours)),
        "mlx": flops / 1e12 / _seconds(lambda: gradients(_mlx)),
    }


def _decode_speed(device: mx.Device, dtype: mx.Dtype, length: int, heads: int, heads_k: int) -> dict[str, Any]:
    dim = 128
    q = _normal(device, dtype, 1, 1, heads, dim)
    k, v = (_normal(device, dtype, 1, length, heads_k, dim) for _ in range(2))
    lengths = mx.array([length], mx.int32)
    bytes_read = k.nbytes + v.nbytes

    def ours() -> list[mx.array]:
        return [cast(mx.array, flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, stream=device))]

    return {
        "call": f"decode, {length} keys, {heads} heads, {heads_k} kv heads, D {dim}",
        "unit": "GB/s",
        "ours": bytes_read / 1e9 / _seconds(ours),
        "mlx": bytes_read / 1e9 / _seconds(lambda: [_mlx(q, k, v, False, device)]),
    }


def _ours(q: mx.array, k: mx.array, v: mx.array, causal: bool, device: mx.Device) -> mx.array:
    return cast(mx.array, flash_attn_func(q, k, v, causal=causal, stream=device))


def _mlx(q: mx.array, k: mx.array, v: mx.array, causal: bool, device: mx.Device) -> mx.array:
    with mx.stream(device):
        by_heads = (x.swapaxes(1, 2) for x in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(
            *by_heads, scale=q.shape[-1] ** -0.5, mask="causal" if causal else None, stream=device
        )
        return out.swapaxes(1, 2)


def _normal(device: mx.Device, dtype: mx.Dtype, *shape: int) -> mx.array:
    x = mx.random.normal(shape, dtype, stream=device)
    mx.eval(x)
    return x


def _seconds(function: Callable[[], list[mx.array]]) -> float:
    """The median of some runs, by the kernels, after two to warm up."""
    times = []
    with _routed_to("kernel"):
        for _ in range(_REPETITIONS + 2):
            start = time.perf_counter()
            mx.eval(function())
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
