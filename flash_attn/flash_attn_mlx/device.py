"""What flash attention runs on here, and whether it works: `python -m flash_attn.flash_attn_mlx.device`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeAlias, cast

import mlx.core as mx

from . import _build_info, _core
from .interface import flash_attn_func, flash_attn_varlen_func
from .kvcache import flash_attn_with_kvcache

_CPU = mx.Device(mx.cpu)

# (q, k, v) -> out
Attention: TypeAlias = Callable[[mx.array, mx.array, mx.array], mx.array]

# Largest error that rounding explains, relative to the largest value of the reference: (out, gradients).
_TOLERANCE = {mx.float32: (2e-5, 1e-4), mx.float16: (2e-3, 4e-3), mx.bfloat16: (1.6e-2, 3.2e-2)}


def check_mlx_requirements(self_test: bool = True) -> dict[str, Any]:
    """Everything that decides whether and how flash attention runs in this process.

    Returns a dict:
        version: of this package.
        compiler, build_type: what it was built with.
        mlx_built, mlx_found: MLX's version at build and now; they must be equal, since MLX's C++ ABI changes in patch releases.
        abi_ok: they are equal and the compiled module accepts an mx.array.
        backends: {"cpu", "metal", "cuda"} to what runs there: "kernels", "MLX ops" or "absent".
        isa_level: instruction-set level of the CPU kernels in use; threads: how many a call may use.
        cpu, gpu: names of the devices; gpu is None where MLX has none.
        self_test: {test name: largest error over what rounding allows}, below 1 is a pass; empty unless `self_test`.
        ok: abi_ok, and every self-test passed.
    """
    mlx_found = version("mlx")
    report: dict[str, Any] = {
        "version": _build_info.VERSION,
        "compiler": _build_info.COMPILER,
        "build_type": _build_info.BUILD_TYPE,
        "mlx_built": _build_info.MLX_VERSION,
        "mlx_found": mlx_found,
        "abi_ok": mlx_found == _build_info.MLX_VERSION and _accepts_arrays(),
        "backends": {
            "cpu": "kernels",
            "metal": "MLX ops" if mx.metal.is_available() else "absent",
            "cuda": "MLX ops" if mx.cuda.is_available() else "absent",
        },
        "isa_level": _core.isa_level(),
        "threads": _core.num_threads(),
        "cpu": mx.device_info(mx.cpu).get("device_name"),
        "gpu": mx.device_info(mx.gpu).get("device_name") if mx.is_available(mx.gpu) else None,
        "self_test": _self_test() if self_test else {},
    }
    report["ok"] = report["abi_ok"] and all(error < 1 for error in report["self_test"].values())
    return report


def _accepts_arrays() -> bool:
    array = mx.zeros((1, 1, 1, 1), stream=_CPU)
    try:
        flash_attn_func(array, array, array, stream=_CPU)
    except TypeError:  # what nanobind raises when the two modules do not share their types
        return False
    return True


@contextmanager
def _routed_to(name: str) -> Iterator[None]:
    """The kernel or the reference, whatever the caller's environment says."""
    settings = {"FLASH_ATTENTION_MLX_REF": str(int(name == "reference")), "FLASH_ATTENTION_MLX_ROUTE": "auto"}
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


def _cases() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Attention]]:
    """Name, shape of q, shape of k and v, function of (q, k, v)."""

    def dense(**options: Any) -> Attention:
        return lambda q, k, v: cast(mx.array, flash_attn_func(q, k, v, stream=_CPU, **options))

    yield "full", (2, 33, 4, 64), (2, 47, 4, 64), dense()
    yield "causal, grouped heads", (1, 70, 4, 40), (1, 90, 2, 40), dense(causal=True)
    slopes = mx.array([0.5, 0.25, 0.125, 0.0625])
    yield "window, softcap, ALiBi", (1, 65, 4, 32), (1, 65, 4, 32), dense(window_size=(20, 5), softcap=8.0, alibi_slopes=slopes)
    yield "dropout", (1, 50, 2, 64), (1, 50, 2, 64), dense(dropout_p=0.3, dropout_key=mx.array([1, 2], mx.uint32))
    starts = mx.array([0, 5, 5, 60], mx.int32)

    def varlen(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return cast(mx.array, flash_attn_varlen_func(q, k, v, starts, starts, 55, 55, causal=True, stream=_CPU))

    yield "varlen, causal", (60, 2, 64), (60, 2, 64), varlen


def _decode_step(dtype: mx.Dtype) -> list[mx.array]:
    """out and both caches after two tokens are rotated, appended to pages in no order, and attended."""
    batch, new, heads, heads_k, dim, page_size, blocks = 2, 2, 4, 2, 64, 16, 4
    keys = iter(mx.random.split(mx.random.key(8), 7))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, dtype, key=next(keys), stream=_CPU)

    k_cache, v_cache = (normal(batch * blocks, page_size, heads_k, dim) for _ in range(2))
    k, v = (normal(batch, new, heads_k, dim) for _ in range(2))
    cos, sin = (normal(blocks * page_size, dim // 2) for _ in range(2))
    pages = mx.array([[6, 1, 3, 0], [2, 7, 5, 4]], mx.int32)
    lengths = mx.array([15, 40], mx.int32)
    out = flash_attn_with_kvcache(
        normal(batch, new, heads, dim), k_cache, v_cache, k, v, cos, sin, lengths, block_table=pages, causal=True, stream=_CPU
    )
    results = [out, k_cache, v_cache]
    mx.eval(results)
    return results


def _self_test() -> dict[str, float]:
    """Small calls in every dtype, forward and backward, and a step of decoding: the kernels against the composed reference."""
    errors = {}
    for dtype, (out_tolerance, gradient_tolerance) in _TOLERANCE.items():
        for name, q_shape, k_shape, attention in _cases():
            keys = mx.random.split(mx.random.key(7), 4)
            shapes = (q_shape, k_shape, k_shape, q_shape)
            *inputs, cotangent = (
                mx.random.normal(shape, dtype, key=key, stream=_CPU) for shape, key in zip(shapes, keys, strict=True)
            )
            with _routed_to("kernel"):
                ours = _out_and_gradients(attention, inputs, cotangent)
            with _routed_to("reference"):
                truth = _out_and_gradients(attention, inputs, cotangent)
            tolerances = (out_tolerance, gradient_tolerance, gradient_tolerance, gradient_tolerance)
            errors[f"{name}, {str(dtype).removeprefix('mlx.core.')}"] = max(
                _relative_error(got, expected) / tolerance
                for got, expected, tolerance in zip(ours, truth, tolerances, strict=True)
            )
        with _routed_to("kernel"):
            ours = _decode_step(dtype)
        with _routed_to("reference"):
            truth = _decode_step(dtype)
        errors[f"paged decode, {str(dtype).removeprefix('mlx.core.')}"] = max(
            _relative_error(got, expected) / out_tolerance for got, expected in zip(ours, truth, strict=True)
        )
    return errors


def _out_and_gradients(attention: Attention, inputs: list[mx.array], cotangent: mx.array) -> list[mx.array]:
    out, gradients = mx.vjp(attention, inputs, [cotangent])
    results = [*out, *gradients]
    mx.eval(results)
    return results


def _relative_error(got: mx.array, expected: mx.array) -> float:
    with mx.stream(_CPU):
        got, expected = got.astype(mx.float32), expected.astype(mx.float32)
        error = mx.abs(got - expected).max() / mx.maximum(1.0, mx.abs(expected).max())
        return float(mx.where(mx.isnan(error), mx.inf, error))  # NaN is no pass


def _print_report(report: dict[str, Any]) -> None:
    print(f"flash-attn-mlx {report['version']}, {report['compiler']}, {report['build_type']}")
    print(f"  MLX         built against {report['mlx_built']}, found {report['mlx_found']}")
    print(f"  ABI check   {'pass' if report['abi_ok'] else 'FAIL'}")
    print(f"  backends    {', '.join(f'{name}: {state}' for name, state in report['backends'].items())}")
    print(f"  CPU         {report['cpu']}, ISA level {report['isa_level']}, {report['threads']} threads")
    print(f"  GPU         {report['gpu'] or 'none'}")
    print("  self-test   error / what rounding allows")
    for name, error in report["self_test"].items():
        print(f"    {name:<34} {error:7.3f}  {'pass' if error < 1 else 'FAIL'}")
    print("pass" if report["ok"] else "FAIL")


if __name__ == "__main__":
    found = check_mlx_requirements()
    _print_report(found)
    sys.exit(0 if found["ok"] else 1)
