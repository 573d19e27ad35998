"""What the tests share: inputs, one way to run a call with its gradients, one way to compare with the oracle."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import oracle

from flash_attn import flash_attn_func, flash_attn_varlen_func

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
ROUNDING = {mx.float32: oracle.exact, mx.bfloat16: oracle.to_bfloat16, mx.float16: oracle.to_float16}
NEIGHBOUR = {oracle.to_bfloat16: 1.01 * 2.0**-8, oracle.to_float16: 1.01 * 2.0**-11}  # just over half a spacing
DIFFERENTIABLE = ("q", "k", "v", "qv", "attn_mask", "learnable_sink")


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def to_numpy(x: mx.array) -> np.ndarray:
    """float64 for floats, else unchanged."""
    if mx.issubdtype(x.dtype, mx.floating):
        return np.array(x.astype(mx.float32), dtype=np.float64)
    return np.array(x)


def normal(rng: np.random.Generator, *shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    return mx.array((rng.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)


def integers(*values: int) -> mx.array:
    return mx.array(np.array(values, np.int32))


def qkv(
    rng: np.random.Generator,
    batch: int = 2,
    seqlen_q: int = 33,
    seqlen_k: int | None = None,
    heads: int = 4,
    heads_k: int | None = None,
    dim: int = 32,
    dim_v: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> dict[str, mx.array]:
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_k = heads_k or heads
    return {
        "q": normal(rng, batch, seqlen_q, heads, dim, dtype=dtype),
        "k": normal(rng, batch, seqlen_k, heads_k, dim, dtype=dtype),
        "v": normal(rng, batch, seqlen_k, heads_k, dim_v or dim, dtype=dtype),
    }


def packed_qkv(
    rng: np.random.Generator,
    lengths_q: list[int],
    lengths_k: list[int],
    heads: int = 4,
    heads_k: int = 2,
    dim: int = 32,
    dim_v: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> dict[str, Any]:
    """A varlen call's arguments."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    return {
        "q": normal(rng, total_q, heads, dim, dtype=dtype),
        "k": normal(rng, total_k, heads_k, dim, dtype=dtype),
        "v": normal(rng, total_k, heads_k, dim_v or dim, dtype=dtype),
        "cu_seqlens_q": integers(0, *np.cumsum(lengths_q)),
        "cu_seqlens_k": integers(0, *np.cumsum(lengths_k)),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }


# ---- running


def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> Any:
    """The dense or the varlen function, whichever the options describe."""
    if "cu_seqlens_q" not in options:
        return flash_attn_func(q, k, v, **options)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return flash_attn_varlen_func(q, k, v, *(options.pop(name) for name in names), **options)


@dataclass
class Cotangents:
    out: mx.array
    lse: mx.array


def run(arguments: dict[str, Any], cotangents: Cotangents) -> oracle.Result:
    """out, LSE and every gradient of a call, through the public functions."""
    names = [
        name for name in DIFFERENTIABLE if arguments.get(name) is not None and mx.issubdtype(arguments[name].dtype, mx.floating)
    ]
    others = {name: value for name, value in arguments.items() if name not in names}

    def function(*arrays: mx.array) -> list[mx.array]:
        return list(attention(**dict(zip(names, arrays, strict=True)), **others, return_softmax_lse=True))

    (out, lse), gradients = mx.vjp(function, [arguments[name] for name in names], [cotangents.out, cotangents.lse])
    mx.eval(out, lse, *gradients)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.dtype == arguments[name].dtype
        assert gradient.shape == arguments[name].shape
    return oracle.Result(
        to_numpy(out), to_numpy(lse), np.zeros(0), {name: to_numpy(g) for name, g in zip(names, gradients, strict=True)}
    )


def cotangents_of(arguments: dict[str, Any], rng: np.random.Generator) -> Cotangents:
    q, v = arguments["q"], arguments["v"]
    lse_shape = (q.shape[1], q.shape[0]) if "cu_seqlens_q" in arguments else (q.shape[0], q.shape[2], q.shape[1])
    return Cotangents(normal(rng, *q.shape[:-1], v.shape[-1], dtype=q.dtype), normal(rng, *lse_shape))


def expected(
    arguments: dict[str, Any], cotangents: Cotangents | None = None, rounding: oracle.Rounding = oracle.exact
) -> oracle.Result:
    values = {name: to_numpy(value) if isinstance(value, mx.array) else value for name, value in arguments.items()}
    if cotangents is not None:
        values |= {"dout": to_numpy(cotangents.out), "dlse": to_numpy(cotangents.lse)}
    return oracle.attention(**values, rounding=rounding)


# ---- comparing


def largest(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max(initial=0.0))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want|; infinities must be equal, and NaN is an infinite error."""
    assert got.shape == want.shape
    with np.errstate(invalid="ignore"):
        difference = np.where(got == want, 0.0, np.abs(got - want))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def assert_close(name: str, got: np.ndarray, want: np.ndarray, tolerance: float, slack: float = 0.0) -> None:
    """|error| <= tolerance * max(1, max |want|) + slack."""
    bound = tolerance * max(1.0, largest(want)) + slack
    found = error(got, want)
    assert found <= bound, f"{name}: error {found:.3e} above {bound:.3e}"


def assert_as_precise(
    name: str,
    got: np.ndarray,
    want: np.ndarray,
    same_precision: np.ndarray,
    rounding: oracle.Rounding,
    factor: float = 2.0,
    slack: float = 0.0,
) -> None:
    """Upstream's rule: at most `factor` times the error of the same-precision computation, both against the rounded truth.

    A neighbour of the rounded truth is always right: the truth may lie half-way between two values, and in a small tensor
    the same-precision computation may be exact by luck.
    """
    rounded = rounding(want)
    neighbour = (
        rounding(rounded + NEIGHBOUR[rounding] * np.abs(rounded)),
        rounding(rounded - NEIGHBOUR[rounding] * np.abs(rounded)),
    )
    is_neighbour = (got >= np.minimum(*neighbour)) & (got <= np.maximum(*neighbour))
    bound = factor * error(same_precision, rounded) + slack
    found = error(np.where(is_neighbour, rounded, got), rounded)
    assert found <= bound, f"{name}: error {found:.3e} above {bound:.3e}"


def representation_slack(want: np.ndarray, rounding: oracle.Rounding) -> float:
    """Upstream v3's allowance for small tensors: what adding 0.3 and taking it away costs in that type, twice."""
    rounded = rounding(want)
    there_and_back = rounding(rounding(rounded + 0.3) - 0.3)
    return 2.0 * error(there_and_back[np.isfinite(rounded)], rounded[np.isfinite(rounded)])


def ulp(x: np.ndarray, dtype: mx.Dtype) -> float:
    """The spacing of `dtype` at the largest element."""
    bits = {mx.float32: 23, mx.float16: 10, mx.bfloat16: 7}[dtype]
    return 2.0 ** (np.floor(np.log2(max(largest(x), 2.0**-14))) - bits)


LSE_TOLERANCE = 2e-5
FORWARD_TOLERANCE = 2e-5
BACKWARD_TOLERANCE = 1e-4


def check(arguments: dict[str, Any], rng: np.random.Generator) -> oracle.Result:
    """A call's out, LSE and gradients agree with the oracle. Returns what the call gave."""
    cotangents = cotangents_of(arguments, rng)
    got = run(arguments, cotangents)
    want = expected(arguments, cotangents)
    assert set(got.gradients) == set(want.gradients)
    assert_close("lse", got.lse, want.lse, LSE_TOLERANCE)
    rounding = ROUNDING[arguments["q"].dtype]
    if rounding is oracle.exact:
        assert_close("out", got.out, want.out, FORWARD_TOLERANCE)
        for name, gradient in want.gradients.items():
            stored = ROUNDING[arguments[name].dtype](gradient)  # a sink or mask may have 16 bits
            slack = ulp(gradient, arguments[name].dtype)
            assert_close(f"d{name}", got.gradients[name], stored, BACKWARD_TOLERANCE, slack)
        return got
    same_precision = expected(arguments, cotangents, rounding)
    assert_as_precise("out", got.out, want.out, same_precision.out, rounding, slack=representation_slack(want.out, rounding))
    for name, gradient in want.gradients.items():
        slack = representation_slack(gradient, rounding)
        if name in ("learnable_sink", "attn_mask"):  # sums of so many terms, or so few elements, that luck decides e(pt)
            slack = 2 * ulp(gradient, arguments["q"].dtype)
        assert_as_precise(f"d{name}", got.gradients[name], gradient, same_precision.gradients[name], rounding, slack=slack)
    return got


# ---- other processes


def run_python(script: str, **environment: str) -> str:
    """Standard output of a script in a fresh interpreter that can import these helpers."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def peak_resident_bytes() -> int:
    """Of this process so far. macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def digest(arrays: dict[str, np.ndarray] | list[mx.array]) -> str:
    """A fingerprint of exact bits."""
    import hashlib

    values = arrays.values() if isinstance(arrays, dict) else [to_numpy(x) for x in arrays]
    sha = hashlib.sha256()
    for value in values:
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()


def on_reference(function: Callable[[], Any]) -> Any:
    """Runs a function with every call forced to the reference."""
    before = os.environ.get("FLASH_ATTENTION_MLX_REF")
    os.environ["FLASH_ATTENTION_MLX_REF"] = "1"
    try:
        return function()
    finally:
        if before is None:
            del os.environ["FLASH_ATTENTION_MLX_REF"]
        else:
            os.environ["FLASH_ATTENTION_MLX_REF"] = before
