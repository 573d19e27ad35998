"""What the tests of the KV cache share: calls of every layout, one way to run them, one way to compare with the oracle."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from kvcache_oracle import Call, Result
from support import (
    FORWARD_TOLERANCE,
    LSE_TOLERANCE,
    NEIGHBOUR,
    ROUNDING,
    assert_as_precise,
    assert_close,
    integers,
    normal,
    representation_slack,
    to_numpy,
)

from flash_attn import flash_attn_with_kvcache

CACHES = ("k_cache", "v_cache")
ROTATION_ERROR = {oracle.exact: 1e-5, oracle.to_bfloat16: 4e-3, oracle.to_float16: 5e-4}  # of an LSE: one value rounded up


def cache_call(
    rng: np.random.Generator,
    batch: int = 2,
    seqlen_q: int = 1,
    capacity: int = 64,
    heads: int = 4,
    heads_k: int = 2,
    dim: int = 32,
    dim_v: int | None = None,
    seqlen_new: int | None = None,
    dtype: mx.Dtype = mx.float32,
    rows: int | None = None,
) -> dict[str, Any]:
    """Arguments of a contiguous call; with `seqlen_new`, new tokens too. Lengths are random, room for new ones left."""
    rows, dim_v = rows or batch, dim_v or dim
    arguments: dict[str, Any] = {
        "q": normal(rng, batch, seqlen_q, heads, dim, dtype=dtype),
        "k_cache": normal(rng, rows, capacity, heads_k, dim, dtype=dtype),
        "v_cache": normal(rng, rows, capacity, heads_k, dim_v, dtype=dtype),
    }
    if seqlen_new is not None:
        arguments |= {
            "k": normal(rng, batch, seqlen_new, heads_k, dim, dtype=dtype),
            "v": normal(rng, batch, seqlen_new, heads_k, dim_v, dtype=dtype),
        }
    most = capacity - (seqlen_new or 0)
    return arguments | {"cache_seqlens": integers(*rng.integers(min(1, most), most + 1, batch))}


def pack(arguments: dict[str, Any], lengths: list[int], names: tuple[str, ...], bounds: str) -> dict[str, Any]:
    """The first lengths[b] tokens of each sequence of dense tensors, one sequence after another."""
    packed = {
        name: mx.concatenate([arguments[name][b, :length] for b, length in enumerate(lengths)])
        for name in names
        if name in arguments
    }
    return arguments | packed | {bounds: integers(0, *np.cumsum(lengths))}


def pack_queries(arguments: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    return pack(arguments, lengths, ("q", "qv"), "cu_seqlens_q") | {"max_seqlen_q": max(lengths)}


def pack_new_keys(arguments: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    return pack(arguments, lengths, ("k", "v"), "cu_seqlens_k_new")


def page(rng: np.random.Generator, arguments: dict[str, Any], page_size: int) -> dict[str, Any]:
    """The same call on shuffled pages, among pages of nobody. A last page that is not full has a few slots more."""
    rows, capacity = arguments["k_cache"].shape[:2]
    blocks = -(-capacity // page_size)
    table = rng.permutation(rows * blocks + 3)[: rows * blocks].reshape(rows, blocks)
    paged = {"block_table": mx.array(table.astype(np.int32))}
    for name in CACHES:
        cache = arguments[name]
        padded = mx.pad(cache, [(0, 0), (0, blocks * page_size - capacity), (0, 0), (0, 0)])
        pages = mx.zeros((rows * blocks + 3, page_size, *cache.shape[2:]), cache.dtype)
        pages[mx.array(table.reshape(-1))] = padded.reshape(rows * blocks, page_size, *cache.shape[2:])
        paged[name] = pages
    return arguments | {"cache_seqlens": capacity} | {"cache_seqlens": arguments.get("cache_seqlens", capacity)} | paged


def rotary(
    rng: np.random.Generator, arguments: dict[str, Any], rotary_dim: int, interleaved: bool = True, rows: int = 256
) -> dict[str, Any]:
    """Random angles, as upstream's tests have them."""
    angle = rng.random((rows, rotary_dim // 2)) * 2 * np.pi
    dtype = arguments["q"].dtype
    cos, sin = (mx.array(f(angle).astype(np.float32)).astype(dtype) for f in (np.cos, np.sin))
    return arguments | {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}


def rope_tables(rows: int, rotary_dim: int, base: float) -> dict[str, mx.array]:
    """The angles of mx.fast.rope, float32."""
    angle = np.arange(rows)[:, None] * base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return {name: mx.array(f(angle).astype(np.float32)) for name, f in (("rotary_cos", np.cos), ("rotary_sin", np.sin))}


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call on caches of its own, which it may write."""
    own = dict(arguments)
    for name in (*CACHES, "k_scale", "v_scale"):
        if isinstance(own.get(name), mx.array):
            own[name] = mx.array(np.array(own[name])) if own[name].dtype != mx.bfloat16 else own[name] + 0
        elif name in own:
            own[name] = tuple(part + 0 for part in own[name])
    mx.eval([own[name] for name in CACHES])
    return own


def address(x: mx.array) -> int:
    """Where the elements lie. Looking leaves no reference behind."""
    mx.eval(x)
    return int(np.asarray(memoryview(x)).ctypes.data)


def call_of(arguments: dict[str, Any]) -> Call:
    values = {name: to_numpy(value) if isinstance(value, mx.array) else value for name, value in arguments.items()}
    return Call(**values, stored=ROUNDING[arguments["q"].dtype])


def run(arguments: dict[str, Any]) -> Result:
    """What a call gives, and its caches after it. `arguments` keep theirs."""
    own = copied(arguments)
    out, lse = flash_attn_with_kvcache(**own, return_softmax_lse=True)
    mx.eval(out, lse, own["k_cache"], own["v_cache"])
    q = arguments["q"]
    assert (out.dtype, lse.dtype) == (q.dtype, mx.float32)
    return Result(to_numpy(out), to_numpy(lse), to_numpy(own["k_cache"]), to_numpy(own["v_cache"]))


def poisoned(arguments: dict[str, Any]) -> dict[str, Any]:
    """NaN in every slot that no sequence sees: it must not reach a result."""
    seen = mx.array(call_of(arguments).marked("seen_places"))[..., None, None]
    return arguments | {name: mx.where(seen, arguments[name], mx.array(mx.nan, arguments[name].dtype)) for name in CACHES}


def assert_appended(got: Result, want: Result, call: Call) -> None:
    """New tokens are where they belong, and every other bit of the caches is what it was."""
    np.testing.assert_array_equal(got.v_cache, want.v_cache)
    if call.rotary_cos is None:
        np.testing.assert_array_equal(got.k_cache, want.k_cache)
        return
    new = call.marked("new_places")
    np.testing.assert_array_equal(got.k_cache[~new], want.k_cache[~new])
    spacing = NEIGHBOUR.get(call.stored, 2e-7) * 2  # a rotated value may be rounded the other way
    np.testing.assert_allclose(got.k_cache[new], want.k_cache[new], rtol=spacing, atol=1e-6)


def assert_attended(
    got: Result, want: Result, same_precision: Result | None, call: Call, factor: float = 3.0, slack: float = 1e-5
) -> None:
    """Upstream's rule for out: at most `factor` times the error of the same-precision computation."""
    rotated = call.rotary_cos is not None
    assert_close("lse", got.lse, want.lse, LSE_TOLERANCE, ROTATION_ERROR[call.stored] * rotated)
    if same_precision is None:
        assert_close("out", got.out, want.out, FORWARD_TOLERANCE)
        return
    slack += representation_slack(want.out, call.stored)
    assert_as_precise("out", got.out, want.out, same_precision.out, call.stored, factor, slack)


def check(arguments: dict[str, Any]) -> Result:
    """A call's out, LSE and caches are the oracle's. Returns what the call gave."""
    arguments = poisoned(arguments)
    call = call_of(arguments)
    got, want = run(arguments), call.result()
    assert_appended(got, want, call)
    exact = call.stored is oracle.exact
    assert_attended(got, want, None if exact else call.result(call.stored), call)
    return got


def decode(q: mx.array, k: mx.array, v: mx.array, caches: dict[str, Any], steps: range, **options: Any) -> list[mx.array]:
    """One token a step."""
    return [
        flash_attn_with_kvcache(
            q[:, t : t + 1], **caches, k=k[:, t : t + 1], v=v[:, t : t + 1], cache_seqlens=t, causal=True, **options
        )
        for t in steps
    ]


def assert_refused(error: type[Exception], argument: str, function: Any, *arguments: Any, **options: Any) -> None:
    """At the call, by exactly this error, whose message names the argument, what it got and what it needs."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.search(rf"\b{argument}\b", message)
    assert "got" in message
    assert "need" in message
