"""Quantised caches: int8 with one scale a token and head, and MLX's 8 and 4 bits. Attention is that of the numbers stored."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from kvcache_oracle import Call, Result
from kvcache_support import (
    CACHES,
    assert_attended,
    cache_call,
    call_of,
    copied,
    decode,
    pack_new_keys,
    pack_queries,
    page,
    rotary,
)
from support import DTYPES, integers, name_of, normal, to_numpy

from flash_attn import flash_attn_func, flash_attn_with_kvcache

FORMATS = ("int8", "mlx8", "mlx4")
SCALES = {"k_cache": "k_scale", "v_cache": "v_scale"}

each_format = pytest.mark.parametrize("format_", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# ---- the formats, in numpy


def quantised(arguments: dict[str, Any], format_: str) -> dict[str, Any]:
    """The same call on quantised caches."""
    own = dict(arguments)
    for name in CACHES:
        if format_ == "int8":
            x = to_numpy(arguments[name])
            scale = (np.abs(x).max(-1) / 127.0).astype(np.float32)
            codes = np.rint(x / np.where(scale == 0, 1, scale)[..., None].astype(np.float64))
            own |= {name: mx.array(codes.clip(-127, 127).astype(np.int8)), SCALES[name]: mx.array(scale)}
        else:
            own[name] = tuple(mx.quantize(arguments[name], group_size=64, bits=int(format_[3:])))
    return own


def unpacked(packed: mx.array, dim: int) -> np.ndarray:
    """Codes (.., dim) of MLX's words: little-endian fields of 8 or 4 bits."""
    words = np.array(packed)
    bits = words.shape[-1] * 32 // dim
    fields = words[..., None] >> (np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits))
    return (fields & np.uint32(2**bits - 1)).reshape(*words.shape[:-1], dim).astype(np.float64)


def parts_of(arguments: dict[str, Any], name: str) -> tuple[mx.array, ...]:
    """Everything that a cache is made of."""
    cache = arguments[name]
    return cache if isinstance(cache, tuple) else (cache, arguments[SCALES[name]])


def numbers_of(arguments: dict[str, Any], name: str) -> np.ndarray:
    """What a quantised cache stands for."""
    parts = parts_of(arguments, name)
    if len(parts) == 2:
        return to_numpy(parts[0]) * to_numpy(parts[1])[..., None]
    packed, scales, biases = parts
    codes = unpacked(packed, scales.shape[-1] * 64)
    scale, bias = (np.repeat(to_numpy(x), 64, -1) for x in (scales, biases))
    return codes * scale + bias


def step_of_code(arguments: dict[str, Any], name: str) -> np.ndarray:
    """How far apart the numbers are that one code can hold, for every element."""
    parts = parts_of(arguments, name)
    if len(parts) == 2:
        return np.abs(to_numpy(parts[1]))[..., None]
    return np.repeat(np.abs(to_numpy(parts[1])), 64, -1)


def as_numbers(arguments: dict[str, Any]) -> Call:
    """The call for the oracle, its caches as numbers."""
    others = {name: value for name, value in arguments.items() if name not in ("k_scale", "v_scale")}
    return call_of(others | {name: numbers_of(arguments, name) for name in CACHES})


def poisoned(arguments: dict[str, Any]) -> dict[str, Any]:
    """NaN for the scales of every slot that no sequence sees."""
    seen = mx.array(as_numbers(arguments).marked("seen_places"))[..., None]
    own = dict(arguments)
    for name in CACHES:
        if isinstance(own[name], tuple):
            packed, *rest = own[name]
            own[name] = (packed, *(mx.where(seen[..., None], x, mx.array(mx.nan, x.dtype)) for x in rest))
        else:
            own[SCALES[name]] = mx.where(seen, own[SCALES[name]], mx.nan)
    return own


# ---- one way to run and compare


def same_bits(a: mx.array, b: mx.array) -> np.ndarray:
    """bool (rows, slots): where both hold the same, NaN or not."""
    a, b = (x.view(mx.uint8) if x.dtype != mx.int8 else x for x in (a, b))
    return np.all((np.array(a) == np.array(b)).reshape(*a.shape[:2], -1), -1)


def check(arguments: dict[str, Any], lse_slack: float = 0.0) -> dict[str, Any]:
    """Returns the arguments with their caches as the call left them. An LSE may differ by lse_slack of its size besides."""
    arguments = poisoned(arguments)
    call = as_numbers(arguments)
    own = copied(arguments)
    out, lse = flash_attn_with_kvcache(**own, return_softmax_lse=True)
    got = Result(to_numpy(out), to_numpy(lse), *(numbers_of(own, name) for name in CACHES))

    new = call.marked("new_places")
    for name, exact in zip(CACHES, call.appended(), strict=True):
        for before, after in zip(parts_of(arguments, name), parts_of(own, name), strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
            assert np.all(same_bits(before, after)[~new])
        # int8 rounds to the nearest code; MLX's formula keeps the larger end and zero exact, the other end may be a code away.
        reach = 0.51 if len(parts_of(own, name)) == 2 else 1.01
        spacing = {oracle.exact: 1e-6, oracle.to_bfloat16: 2.0**-7, oracle.to_float16: 2.0**-10}[call.stored]
        bound = reach * step_of_code(own, name)[new] + spacing * np.abs(exact[new]).max(initial=0.0)
        assert np.all(np.abs(numbers_of(own, name)[new] - exact[new]) <= bound)

    def attended(rounding: oracle.Rounding) -> Result:
        return Result(*call.attended(got.k_cache, got.v_cache, rounding), got.k_cache, got.v_cache)

    rounding, want = call.stored, attended(oracle.exact)
    if rounding is oracle.exact:
        assert_attended(got, want, None, call)
        return own
    # A kernel may take the numbers as they are or rounded to q's dtype, for tiles of 16 bits: an LSE is one or the other.
    _, lse_of_rounded = call.attended(rounding(got.k_cache), rounding(got.v_cache), oracle.exact)
    with np.errstate(invalid="ignore"):
        is_rounded = np.abs(got.lse - lse_of_rounded) < np.abs(got.lse - want.lse)
        is_near = np.abs(got.lse - want.lse) <= lse_slack * np.abs(want.lse)
    want.lse = np.where(is_near, got.lse, np.where(is_rounded, lse_of_rounded, want.lse))
    assert_attended(got, want, attended(rounding), call)
    return own


@each_format
def test_the_numbers_of_a_format_are_mlxs(rng, format_):
    """The test's own reading of packed words against mx.dequantize."""
    if format_ == "int8":
        pytest.skip("MLX has no such format")
    parts = mx.quantize(normal(rng, 2, 5, 3, 128), group_size=64, bits=int(format_[3:]))
    want = mx.dequantize(*parts, group_size=64, bits=int(format_[3:]))
    np.testing.assert_allclose(numbers_of({"k_cache": tuple(parts)}, "k_cache"), to_numpy(want), atol=1e-5)


# ---- reading


@each_format
@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 16, 40, 65])
def test_attention_over_the_numbers_stored(rng, seqlen_q, dtype, format_):
    arguments = cache_call(rng, 2, seqlen_q, 150, 4, 2, 64, dtype=dtype)
    check(quantised(arguments, format_) | {"causal": True})


@each_format
@each_dtype
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (128, 128), (64, 128), (192, 64), (576, 512)])
def test_heads_and_head_dims(rng, dim, dim_v, heads, dtype, format_):
    check(quantised(cache_call(rng, 2, 3, 70, *heads, dim, dim_v, dtype=dtype), format_))


@each_dtype
@pytest.mark.parametrize("dim", [1, 7, 40, 80, 111, 576])
def test_int8_has_any_head_dim(rng, dim, dtype):
    check(quantised(cache_call(rng, 2, 3, 70, dim=dim, seqlen_new=2, dtype=dtype), "int8"))


@each_format
@each_dtype
def test_one_large_element_in_each_query(rng, dtype, format_):
    """The others keep 15 bits of it, so scores are off by 2**-15 of what they could be: seen in LSE, not in 16 bits."""
    arguments = cache_call(rng, 2, 2, 300, dim=64, dtype=dtype)
    q = to_numpy(arguments["q"])
    q[..., 5] *= 100
    check(quantised(arguments | {"q": mx.array(q).astype(dtype)}, format_), lse_slack=2e-4)


@each_format
@each_dtype
def test_scales_from_a_thousandth_to_a_thousand(rng, dtype, format_):
    """The heaviest values of a block of keys do not cost the others their precision."""
    arguments = cache_call(rng, 2, 2, 300, dim=64, dtype=dtype)
    sizes = mx.array(np.exp(rng.uniform(-7, 7, (2, 300, 2, 1))).astype(np.float32)).astype(dtype)
    check(quantised(arguments | {"v_cache": arguments["v_cache"] * sizes}, format_))


@each_format
@each_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_only_its_row_or_head(rng, value, dtype, format_):
    arguments = quantised(cache_call(rng, 1, 2, 200, 4, 2, 64, dtype=dtype) | {"cache_seqlens": 200}, format_)
    want = to_numpy(flash_attn_with_kvcache(**arguments))
    q = to_numpy(arguments["q"])
    q[0, 1, 3, 7] = value
    out = to_numpy(flash_attn_with_kvcache(**arguments | {"q": mx.array(q).astype(dtype)}))
    assert not np.any(np.isfinite(out[0, 1, 3]))
    out[0, 1, 3] = want[0, 1, 3]
    np.testing.assert_array_equal(out, want)
    parts = list(parts_of(arguments, "v_cache"))
    scale = to_numpy(parts[1])
    scale[0, 150, 1] = value
    parts[1] = mx.array(scale).astype(parts[1].dtype)
    own = {"v_cache": tuple(parts)} if format_ != "int8" else {"v_scale": parts[1]}
    out = to_numpy(flash_attn_with_kvcache(**arguments | own))
    assert not np.any(np.isfinite(out[:, :, 2:]))
    np.testing.assert_array_equal(out[:, :, :2], want[:, :, :2])


@each_format
@each_dtype
def test_a_long_quantised_cache(rng, dtype, format_):
    arguments = cache_call(rng, 2, 1, 2000, 8, 2, 64, dtype=dtype) | {"cache_seqlens": integers(2000, 777)}
    check(quantised(arguments, format_))


@each_format
@each_dtype
@pytest.mark.parametrize("feature", ["window", "softcap", "alibi", "sink", "leftpad", "qv", "chunk"])
def test_features_of_quantised_caches(rng, feature, dtype, format_):
    options: dict[str, Any] = {
        "window": {"window_size": (9, 3)},
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": normal(rng, 4)},
        "sink": {"learnable_sink": normal(rng, 4)},
        "leftpad": {"cache_leftpad": integers(1, 0)},
        "qv": {"qv": normal(rng, 2, 3, 4, 64, dtype=dtype)},
        "chunk": {"attention_chunk": 8, "causal": True},
    }[feature]
    check(quantised(cache_call(rng, 2, 3, 70, dim=64, seqlen_new=3, dtype=dtype), format_) | options)


# ---- appending


@each_format
@each_dtype
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (1, 5), (5, 2), (20, 20)])
def test_new_tokens_are_quantised_in_place(rng, seqlen_q, seqlen_new, dtype, format_):
    arguments = cache_call(rng, 3, seqlen_q, 60, dim=64, seqlen_new=seqlen_new, dtype=dtype)
    check(quantised(arguments, format_) | {"causal": True})


@each_format
@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_rotated_before_they_are_quantised(rng, interleaved, dtype, format_):
    arguments = cache_call(rng, 2, 4, 60, dim=64, seqlen_new=4, dtype=dtype)
    check(quantised(rotary(rng, arguments, 32, interleaved), format_) | {"causal": True})


@each_format
@each_dtype
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_batch_idx_and_leftpad_of_quantised_caches(rng, page_size, dtype, format_):
    arguments = cache_call(rng, 3, 2, 60, dim=64, seqlen_new=4, rows=4, dtype=dtype) | {"cache_seqlens": integers(40, 3, 56)}
    arguments |= {"cache_leftpad": integers(7, 3, 0), "cache_batch_idx": integers(2, 3, 0), "causal": True}
    check(quantised(page(rng, arguments, page_size), format_))


@each_format
@each_dtype
def test_packed_queries_and_new_keys_of_quantised_caches(rng, dtype, format_):
    arguments = cache_call(rng, 3, 5, 60, dim=64, seqlen_new=6, dtype=dtype)
    check(quantised(pack_new_keys(pack_queries(arguments, [5, 0, 2]), [6, 1, 3]), format_) | {"causal": True})


@each_format
@each_dtype
def test_a_missing_page_of_quantised_caches(rng, dtype, format_):
    arguments = page(rng, cache_call(rng, 2, 2, 48, dim=64, dtype=dtype) | {"cache_seqlens": integers(48, 30)}, 8)
    table = np.array(arguments["block_table"])
    table[0, 2], table[1, 0] = -1, -1
    check(quantised(arguments | {"block_table": mx.array(table)}, format_))


@each_format
@each_dtype
def test_tokens_of_zeros_and_of_one_value_stay_exact(rng, dtype, format_):
    arguments = cache_call(rng, 1, 1, 10, dim=64, seqlen_new=2, dtype=dtype) | {"cache_seqlens": 4}
    flat = mx.concatenate([mx.zeros((1, 1, 2, 64), dtype), mx.full((1, 1, 2, 64), 0.5, dtype)], axis=1)
    own = check(quantised(arguments | {"k": flat, "v": -flat}, format_))
    np.testing.assert_allclose(numbers_of(own, "k_cache")[0, 4:6], to_numpy(flat)[0], atol=2e-3)
    np.testing.assert_array_equal(numbers_of(own, "v_cache")[0, 4], 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_mlxs_format_is_what_mx_quantize_gives(rng, bits):
    """To within one code, where a tie or the last bit of a scale falls the other way."""
    arguments = quantised(cache_call(rng, 2, 1, 20, dim=128, seqlen_new=5) | {"cache_seqlens": 3}, f"mlx{bits}")
    want = mx.quantize(arguments["k"], group_size=64, bits=bits)
    mx.eval(flash_attn_with_kvcache(**arguments))
    packed, scales, biases = (part[:, 3:8] for part in arguments["k_cache"])
    np.testing.assert_allclose(to_numpy(scales), to_numpy(want[1]), rtol=1e-5)
    np.testing.assert_allclose(to_numpy(biases), to_numpy(want[2]), rtol=1e-5)
    assert np.abs(unpacked(packed, 128) - unpacked(want[0], 128)).max() <= 1


def test_int8_uses_its_whole_range(rng):
    arguments = quantised(cache_call(rng, 2, 1, 20, dim=64, seqlen_new=5) | {"cache_seqlens": 3}, "int8")
    mx.eval(flash_attn_with_kvcache(**arguments))
    assert np.all(np.abs(np.array(arguments["k_cache"][:, 3:8])).max(-1) >= 126)


# ---- decoding


@each_format
@pytest.mark.parametrize("page_size", [None, 8])
def test_decoding_stays_within_the_formats_precision(rng, page_size, format_):
    q, k, v = (normal(rng, 2, 60, h, 64) for h in (4, 2, 2))
    caches: dict[str, Any] = {"k_cache": mx.zeros(k.shape), "v_cache": mx.zeros(v.shape)}
    if page_size:
        caches = page(rng, caches, page_size)
        del caches["cache_seqlens"]
    outs = decode(q, k, v, quantised(caches, format_), range(60))
    want = to_numpy(flash_attn_func(q, k, v, causal=True))
    found = np.sqrt(np.mean((to_numpy(mx.concatenate(outs, axis=1)) - want) ** 2))
    assert found <= {"int8": 0.01, "mlx8": 0.01, "mlx4": 0.12}[format_]


@each_format
def test_compile_with_every_part_as_input_and_output(rng, format_):
    arguments = quantised(cache_call(rng, 2, 2, 40, dim=64, seqlen_new=2), format_) | {"causal": True}
    names = ("q", "k", "v", *CACHES, *(name for name in ("k_scale", "v_scale") if name in arguments))

    @mx.compile
    def step(*given):
        own = arguments | dict(zip(names, given, strict=True))
        own |= {name: tuple(own[name]) for name in CACHES if not isinstance(own[name], mx.array)}
        out = flash_attn_with_kvcache(**own)
        return out, [part for name in CACHES for part in parts_of(own, name)]

    out, parts = step(*(arguments[name] for name in names))
    own = copied(arguments)
    want = flash_attn_with_kvcache(**own)
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), atol=1e-6)
    for got, part in zip(parts, [part for name in CACHES for part in parts_of(own, name)], strict=True):
        assert np.all(same_bits(got, part))


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_codes_may_lie_in_any_strides(rng, seqlen_q):
    codes = rng.integers(-127, 128, (2, 40, 2, 64)).astype(np.int8)
    scale = mx.array((rng.random((2, 40, 2)) * 0.02).astype(np.float32))
    q = normal(rng, 2, seqlen_q, 4, 64)
    whole = flash_attn_with_kvcache(q, mx.array(codes), mx.array(codes), k_scale=scale, v_scale=scale)
    every_second = mx.array(np.repeat(codes, 2, axis=-1))[..., ::2]
    backwards = mx.array(np.ascontiguousarray(codes[..., ::-1]))[..., ::-1]
    heads_first = mx.array(np.ascontiguousarray(codes.swapaxes(1, 2))).swapaxes(1, 2)
    for k in (every_second, backwards, heads_first):
        assert mx.array_equal(flash_attn_with_kvcache(q, k, mx.array(codes), k_scale=scale, v_scale=scale), whole)
        assert mx.array_equal(flash_attn_with_kvcache(q, mx.array(codes), k, k_scale=scale, v_scale=scale), whole)


def heads_first(part: mx.array) -> mx.array:
    """The same numbers, a head's side by side in memory, as mlx-lm's caches have them."""
    return mx.contiguous(part.swapaxes(1, 2)).swapaxes(1, 2)


def with_heads_first(arguments: dict[str, Any]) -> dict[str, Any]:
    """Every part of the caches so."""
    turned = dict(arguments)
    for name in CACHES:
        part = arguments[name]
        turned[name] = heads_first(part) if isinstance(part, mx.array) else tuple(heads_first(x) for x in part)
    return turned | {name: heads_first(arguments[name]) for name in SCALES.values() if name in arguments}


@each_format
@each_dtype
@pytest.mark.parametrize("page_size", [None, 2, 5, 16])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_caches_head_after_head(rng, format_, page_size, seqlen_q, dtype):
    """Their rows are found a few keys at a time; a page may end, or be missing, anywhere between them."""
    arguments = cache_call(rng, 2, seqlen_q, 330, dim=128, dtype=dtype)
    arguments |= {"cache_seqlens": integers(330, 101), "causal": True}
    if page_size:
        arguments = page(rng, arguments, page_size)
        table = np.array(arguments["block_table"])
        table[0, 3] = -1
        arguments["block_table"] = mx.array(table)
    arguments = quantised(arguments, format_)
    turned = with_heads_first(arguments)
    if dtype == mx.float32:
        np.testing.assert_allclose(
            to_numpy(flash_attn_with_kvcache(**turned)), to_numpy(flash_attn_with_kvcache(**arguments)), atol=2e-6
        )
    check(turned)


@each_format
@each_dtype
def test_more_kv_heads_head_after_head_than_a_vector_has_lanes(rng, dtype, format_):
    check(with_heads_first(quantised(cache_call(rng, 1, 1, 120, 40, 20, 128, dtype=dtype), format_)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=name_of)
def test_the_largest_sum_of_codes(bits, dtype):
    """Keys that weigh alike, and whose values all have the largest code: their mean is one of them."""
    words = mx.full((1, 1000, 2, 64 * bits // 32), 0xFFFFFFFF, dtype=mx.uint32)
    ones = mx.ones((1, 1000, 2, 1), dtype=dtype)
    cache = (words, ones, mx.zeros_like(ones))
    out = flash_attn_with_kvcache(mx.zeros((1, 1, 8, 64), dtype=dtype), (words, 0 * ones, ones), cache)
    np.testing.assert_array_equal(to_numpy(out), 2**bits - 1)


@pytest.mark.parametrize("size", [1e-33, 1e33])
def test_numbers_near_the_ends_of_float32(rng, size):
    """In bfloat16, which has float32's range, V as small or as large as that comes out so."""
    arguments = cache_call(rng, 1, 1, 60, 4, 2, 64, dtype=mx.bfloat16) | {"cache_seqlens": 60}
    caches = {name: mx.quantize(arguments[name], group_size=64, bits=8) for name in CACHES}
    codes, scales, biases = caches["v_cache"]
    want = to_numpy(flash_attn_with_kvcache(**arguments | caches))
    sized = {"v_cache": (codes, scales * size, biases * size)}
    got = to_numpy(flash_attn_with_kvcache(**arguments | caches | sized))
    np.testing.assert_allclose(got / size, want, atol=0.02 * np.abs(want).max())
