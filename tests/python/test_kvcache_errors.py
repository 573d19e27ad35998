"""Bad calls on caches are refused at the call; bad values that come too late for that touch nothing outside their sequence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import CACHES, assert_refused, cache_call, copied
from support import integers, to_numpy

from flash_attn import flash_attn_with_kvcache

NAN, INF = float("nan"), float("inf")
Q = mx.zeros((2, 3, 4, 32))
K_CACHE, V_CACHE = mx.zeros((2, 10, 2, 32)), mx.zeros((2, 10, 2, 16))
K, V = mx.zeros((2, 3, 2, 32)), mx.zeros((2, 3, 2, 16))
LENGTHS = integers(4, 7)
READ = {"q": Q, "k_cache": K_CACHE, "v_cache": V_CACHE, "cache_seqlens": LENGTHS}
APPEND = READ | {"k": K, "v": V}
TABLES = {"rotary_cos": mx.zeros((10, 16)), "rotary_sin": mx.zeros((10, 16))}
ROTARY = APPEND | TABLES
POOL = {"k_cache": mx.zeros((8, 4, 2, 32)), "v_cache": mx.zeros((8, 4, 2, 16))}
TABLE = integers(*range(6)).reshape(2, 3)
PAGES = POOL | {"block_table": TABLE}
PAGED = READ | PAGES
PAGED_APPEND = APPEND | PAGES
PACKED = APPEND | {"q": mx.zeros((5, 4, 32)), "cu_seqlens_q": integers(0, 2, 5), "max_seqlen_q": 3}
PACKED_NEW = APPEND | {"k": mx.zeros((5, 2, 32)), "v": mx.zeros((5, 2, 16)), "cu_seqlens_k_new": integers(0, 2, 5)}
INT8 = APPEND | {
    "k_cache": K_CACHE.astype(mx.int8),
    "v_cache": V_CACHE.astype(mx.int8),
    "k_scale": mx.zeros((2, 10, 2)),
    "v_scale": mx.zeros((2, 10, 2)),
}
WIDE = mx.zeros((2, 10, 2, 128))
TRIPLE = tuple(mx.quantize(WIDE, group_size=64, bits=8))
MLX8 = {"q": mx.zeros((2, 3, 4, 128)), "k_cache": TRIPLE, "v_cache": TRIPLE, "cache_seqlens": LENGTHS}
mx.eval(READ, APPEND, ROTARY, PAGED, PACKED, PACKED_NEW, INT8, MLX8)

SHAPES = {
    "q of rank 3": (READ, {"q": Q[0]}, ValueError, "q"),
    "k_cache of rank 3": (READ, {"k_cache": K_CACHE[0]}, ValueError, "k_cache"),
    "v_cache of rank 5": (READ, {"v_cache": V_CACHE[None]}, ValueError, "v_cache"),
    "head dim of k_cache": (READ, {"k_cache": K_CACHE[..., :31]}, ValueError, "k_cache"),
    "capacity of v_cache": (READ, {"v_cache": V_CACHE[:, :9]}, ValueError, "v_cache"),
    "rows of v_cache": (READ, {"v_cache": V_CACHE[:1]}, ValueError, "v_cache"),
    "heads of v_cache": (READ, {"v_cache": V_CACHE[:, :, :1]}, ValueError, "v_cache"),
    "heads that do not divide": (READ, {"q": Q[:, :, :3]}, ValueError, "k_cache"),
    "fewer rows than sequences": (READ, {"k_cache": K_CACHE[:1], "v_cache": V_CACHE[:1]}, ValueError, "k_cache"),
    "head dim 577": (READ, {"q": mx.zeros((2, 3, 4, 577)), "k_cache": mx.zeros((2, 10, 2, 577))}, ValueError, "q"),
    "value head dim 577": (READ, {"v_cache": mx.zeros((2, 10, 2, 577))}, ValueError, "v_cache"),
    "k of rank 3": (APPEND, {"k": K[0]}, ValueError, "k"),
    "batch of k": (APPEND, {"k": K[:1], "v": V[:1]}, ValueError, "k"),
    "head dim of k": (APPEND, {"k": K[..., :16]}, ValueError, "k"),
    "heads of k": (APPEND, {"k": K[:, :, :1], "v": V[:, :, :1]}, ValueError, "k"),
    "seqlen of v": (APPEND, {"v": V[:, :2]}, ValueError, "v"),
    "head dim of v": (APPEND, {"v": V[..., :8]}, ValueError, "v"),
    "more new tokens than slots": (APPEND, {"k": mx.zeros((2, 11, 2, 32)), "v": mx.zeros((2, 11, 2, 16))}, ValueError, "k"),
    "more queries than slots": (APPEND, {"q": mx.zeros((2, 11, 4, 32))}, ValueError, "q"),
    "lengths of another batch": (READ, {"cache_seqlens": integers(1, 2, 3)}, ValueError, "cache_seqlens"),
    "lengths of rank 2": (READ, {"cache_seqlens": LENGTHS[None]}, ValueError, "cache_seqlens"),
    "batch_idx of another batch": (READ, {"cache_batch_idx": integers(0)}, ValueError, "cache_batch_idx"),
    "leftpad of another batch": (READ, {"cache_leftpad": integers(0, 0, 0)}, ValueError, "cache_leftpad"),
    "table of rank 1": (PAGED, {"block_table": integers(0, 1)}, ValueError, "block_table"),
    "table of another batch": (PAGED, {"block_table": TABLE[:1]}, ValueError, "block_table"),
    "slopes of another number of heads": (READ, {"alibi_slopes": mx.zeros((3,))}, ValueError, "alibi_slopes"),
    "slopes of another batch": (READ, {"alibi_slopes": mx.zeros((3, 4))}, ValueError, "alibi_slopes"),
    "sink of another number of heads": (READ, {"learnable_sink": mx.zeros((2,))}, ValueError, "learnable_sink"),
    "qv of q's head dim": (READ, {"qv": mx.zeros((2, 3, 4, 32))}, ValueError, "qv"),
    "bounds of another batch": (PACKED, {"cu_seqlens_q": integers(0, 1, 2, 5)}, ValueError, "k_cache"),
    "bounds of dense queries": (PACKED, {"q": Q}, ValueError, "q"),
    "bounds of dense keys": (PACKED_NEW, {"k": K, "v": V}, ValueError, "k"),
    "bounds of new keys of another batch": (PACKED_NEW, {"cu_seqlens_k_new": integers(0, 5)}, ValueError, "cu_seqlens_k_new"),
    "cos and sin of two shapes": (ROTARY, {"rotary_sin": mx.zeros((10, 8))}, ValueError, "rotary_sin"),
    "cos of rank 1": (ROTARY, {"rotary_cos": mx.zeros((16,))}, ValueError, "rotary_cos"),
    "rotary dim not a multiple of 16": (
        ROTARY,
        {"rotary_cos": mx.zeros((10, 12)), "rotary_sin": mx.zeros((10, 12))},
        ValueError,
        "rotary_cos",
    ),
    "rotary dim above the head dim": (
        ROTARY,
        {"rotary_cos": mx.zeros((10, 24)), "rotary_sin": mx.zeros((10, 24))},
        ValueError,
        "rotary_cos",
    ),
    "tables shorter than the cache": (
        ROTARY,
        {"rotary_cos": mx.zeros((9, 16)), "rotary_sin": mx.zeros((9, 16))},
        ValueError,
        "rotary_cos",
    ),
    "rotary_seqlens of another batch": (ROTARY, {"rotary_seqlens": integers(1)}, ValueError, "rotary_seqlens"),
    "k_scale of another shape": (INT8, {"k_scale": mx.zeros((2, 10, 1))}, ValueError, "k_scale"),
    "v_scale of rank 4": (INT8, {"v_scale": mx.zeros((2, 10, 2, 1))}, ValueError, "v_scale"),
    "two parts of three": (MLX8, {"k_cache": TRIPLE[:2]}, ValueError, "k_cache"),
    "scales of another shape": (MLX8, {"v_cache": (TRIPLE[0], TRIPLE[1][..., :1], TRIPLE[2])}, ValueError, "v_cache"),
    "biases of another shape": (MLX8, {"v_cache": (TRIPLE[0], TRIPLE[1], TRIPLE[2][:1])}, ValueError, "v_cache"),
    "groups of 32": (MLX8, {"k_cache": tuple(mx.quantize(WIDE, group_size=32, bits=8))}, ValueError, "k_cache"),
    "2 bits": (MLX8, {"k_cache": tuple(mx.quantize(WIDE, group_size=64, bits=2))}, ValueError, "k_cache"),
    "6 bits": (MLX8, {"k_cache": tuple(mx.quantize(WIDE, group_size=64, bits=6))}, ValueError, "k_cache"),
    "another head dim than the packed one": (MLX8, {"q": mx.zeros((2, 3, 4, 64))}, ValueError, "k_cache"),
    "head dim not a multiple of 64": (MLX8, {"q": mx.zeros((2, 3, 4, 96))}, ValueError, "k_cache"),
}

PRESENCE = {
    "k without v": (APPEND, {"v": None}, ValueError, "v"),
    "v without k": (APPEND, {"k": None}, ValueError, "k"),
    "new tokens without lengths": (APPEND, {"cache_seqlens": None}, ValueError, "cache_seqlens"),
    "rotary without new tokens": (ROTARY, {"k": None, "v": None}, ValueError, "k"),
    "cos without sin": (ROTARY, {"rotary_sin": None}, ValueError, "rotary_sin"),
    "sin without cos": (ROTARY, {"rotary_cos": None}, ValueError, "rotary_cos"),
    "rotary_seqlens without rotary": (APPEND, {"rotary_seqlens": integers(1, 1)}, ValueError, "rotary_seqlens"),
    "bounds of new keys that are not there": (READ, {"cu_seqlens_k_new": integers(0, 1, 2)}, ValueError, "cu_seqlens_k_new"),
    "both names of the table": (PAGED, {"page_table": TABLE}, ValueError, "page_table"),
}

TYPES = {
    "integer q": (READ, {"q": Q.astype(mx.int32)}, TypeError, "q"),
    "k_cache of another dtype": (READ, {"k_cache": K_CACHE.astype(mx.float16)}, TypeError, "k_cache"),
    "v_cache of another dtype": (READ, {"v_cache": V_CACHE.astype(mx.bfloat16)}, TypeError, "v_cache"),
    "k of another dtype": (APPEND, {"k": K.astype(mx.float16)}, TypeError, "k"),
    "v of another dtype": (APPEND, {"v": V.astype(mx.float16)}, TypeError, "v"),
    "int8 without scales": (INT8, {"k_scale": None, "v_scale": None}, TypeError, "k_scale"),
    "int8 without v_scale": (INT8, {"v_scale": None}, TypeError, "v_scale"),
    "scales of a floating cache": (READ, {name: mx.zeros((2, 10, 2)) for name in ("k_scale", "v_scale")}, TypeError, "k_cache"),
    "one quantised cache": (INT8, {"v_cache": V_CACHE, "v_scale": None}, TypeError, "v_cache"),
    "uint8 caches": (INT8, {name: INT8[name].astype(mx.uint8) for name in CACHES}, TypeError, "k_cache"),
    "one cache of MLX's format": (MLX8, {"v_cache": WIDE}, TypeError, "v_cache"),
    "packed words of 8 bits": (MLX8, {"k_cache": (TRIPLE[0].view(mx.uint8), *TRIPLE[1:])}, TypeError, "k_cache"),
    "lengths of 64 bits": (READ, {"cache_seqlens": LENGTHS.astype(mx.int64)}, TypeError, "cache_seqlens"),
    "floating lengths": (READ, {"cache_seqlens": LENGTHS.astype(mx.float32)}, TypeError, "cache_seqlens"),
    "fractional length": (READ, {"cache_seqlens": 4.5}, TypeError, "cache_seqlens"),
    "lengths as a list": (READ, {"cache_seqlens": [4, 7]}, TypeError, "cache_seqlens"),
    "batch_idx of 64 bits": (READ, {"cache_batch_idx": mx.zeros((2,), mx.int64)}, TypeError, "cache_batch_idx"),
    "unsigned leftpad": (READ, {"cache_leftpad": mx.zeros((2,), mx.uint32)}, TypeError, "cache_leftpad"),
    "table of 64 bits": (PAGED, {"block_table": TABLE.astype(mx.int64)}, TypeError, "block_table"),
    "table as a list": (PAGED, {"block_table": [[0, 1, 2], [3, 4, 5]]}, TypeError, "block_table"),
    "bounds of 64 bits": (PACKED, {"cu_seqlens_q": mx.zeros((3,), mx.int64)}, TypeError, "cu_seqlens_q"),
    "bounds of new keys of 64 bits": (
        PACKED_NEW,
        {"cu_seqlens_k_new": mx.zeros((3,), mx.int64)},
        TypeError,
        "cu_seqlens_k_new",
    ),
    "cos of another dtype": (ROTARY, {"rotary_cos": mx.zeros((10, 16), mx.float16)}, TypeError, "rotary_cos"),
    "sin of another dtype": (ROTARY, {"rotary_sin": mx.zeros((10, 16), mx.float16)}, TypeError, "rotary_sin"),
    "floating rotary_seqlens": (ROTARY, {"rotary_seqlens": mx.zeros((2,))}, TypeError, "rotary_seqlens"),
    "k_scale of 16 bits": (INT8, {"k_scale": mx.zeros((2, 10, 2), mx.float16)}, TypeError, "k_scale"),
    "slopes of 16 bits": (READ, {"alibi_slopes": mx.zeros((4,), mx.float16)}, TypeError, "alibi_slopes"),
    "qv of another dtype": (READ, {"qv": mx.zeros((2, 3, 4, 16), mx.float16)}, TypeError, "qv"),
    "integer sink": (READ, {"learnable_sink": mx.zeros((4,), mx.int32)}, TypeError, "learnable_sink"),
    "numpy q": (READ, {"q": np.zeros((2, 3, 4, 32), np.float32)}, TypeError, "q"),
    "q is None": (READ, {"q": None}, TypeError, "q"),
    "k_cache is None": (READ, {"k_cache": None}, TypeError, "k_cache"),
    "numpy v_cache": (READ, {"v_cache": np.zeros((2, 10, 2, 16), np.float32)}, TypeError, "v_cache"),
    "numpy k": (APPEND, {"k": np.zeros((2, 3, 2, 32), np.float32)}, TypeError, "k"),
    "splits as text": (READ, {"num_splits": "3"}, TypeError, "num_splits"),
    "longest query as an array": (PACKED, {"max_seqlen_q": mx.array(3)}, TypeError, "max_seqlen_q"),
    "stream as text": (READ, {"stream": "cpu"}, TypeError, "stream"),
    "window as a number": (READ, {"window_size": 3}, TypeError, "window_size"),
}

OPTIONS = {
    "NaN scale": (READ, {"softmax_scale": NAN}, ValueError, "softmax_scale"),
    "negative softcap": (READ, {"softcap": -1.0}, ValueError, "softcap"),
    "infinite softcap": (READ, {"softcap": INF}, ValueError, "softcap"),
    "window of one side": (READ, {"window_size": (1,)}, ValueError, "window_size"),
    "negative splits": (READ, {"num_splits": -1}, ValueError, "num_splits"),
    "negative chunk": (READ, {"attention_chunk": -1}, ValueError, "attention_chunk"),
    "negative longest query": (PACKED, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
}

VALUES = {
    "a length past the capacity": (READ, {"cache_seqlens": integers(4, 11)}, "cache_seqlens"),
    "an int past the capacity": (READ, {"cache_seqlens": 11}, "cache_seqlens"),
    "a negative length": (READ, {"cache_seqlens": integers(-1, 4)}, "cache_seqlens"),
    "a negative int": (READ, {"cache_seqlens": -1}, "cache_seqlens"),
    "new tokens past the capacity": (APPEND, {"cache_seqlens": integers(4, 8)}, "cache_seqlens"),
    "new tokens past the capacity, one int": (APPEND, {"cache_seqlens": 8}, "cache_seqlens"),
    "packed new tokens past the capacity": (PACKED_NEW, {"cache_seqlens": integers(8, 8)}, "cache_seqlens"),
    "a length past the table": (PAGED, {"cache_seqlens": integers(13, 4)}, "cache_seqlens"),
    "new tokens past the table": (PAGED_APPEND, {"cache_seqlens": integers(10, 4)}, "cache_seqlens"),
    "a row that is not there": (READ, {"cache_batch_idx": integers(0, 2)}, "cache_batch_idx"),
    "a negative row": (READ, {"cache_batch_idx": integers(-1, 1)}, "cache_batch_idx"),
    "a row that the table has not": (PAGED, {"cache_batch_idx": integers(0, 2)}, "cache_batch_idx"),
    "leftpad above the length": (READ, {"cache_leftpad": integers(5, 0)}, "cache_leftpad"),
    "negative leftpad": (READ, {"cache_leftpad": integers(0, -1)}, "cache_leftpad"),
    "a page that is not there": (PAGED, {"block_table": integers(0, 1, 2, 3, 8, 5).reshape(2, 3)}, "block_table"),
    "a page below -1": (PAGED, {"block_table": integers(0, 1, 2, -2, 4, 5).reshape(2, 3)}, "block_table"),
    "new tokens on a page of -1": (PAGED_APPEND, {"block_table": integers(0, -1, 2, 3, 4, 5).reshape(2, 3)}, "block_table"),
    "bounds that fall": (PACKED, {"cu_seqlens_q": integers(0, 3, 2)}, "cu_seqlens_q"),
    "bounds past the queries": (PACKED, {"cu_seqlens_q": integers(0, 3, 6)}, "cu_seqlens_q"),
    "a sequence longer than max_seqlen_q": (PACKED, {"max_seqlen_q": 2}, "max_seqlen_q"),
    "bounds past the new keys": (PACKED_NEW, {"cu_seqlens_k_new": integers(0, 2, 6)}, "cu_seqlens_k_new"),
    "bounds of new keys that fall": (PACKED_NEW, {"cu_seqlens_k_new": integers(0, 4, 3)}, "cu_seqlens_k_new"),
    "a negative rotary position": (ROTARY, {"rotary_seqlens": integers(-1, 0)}, "rotary_seqlens"),
    "a rotary position past the tables": (ROTARY, {"rotary_seqlens": integers(0, 8)}, "rotary_seqlens"),
}


@pytest.mark.parametrize("good", [READ, APPEND, ROTARY, PAGED, PAGED_APPEND, PACKED, PACKED_NEW, INT8, MLX8])
def test_the_calls_that_are_spoilt_here_are_good(good):
    own = copied(good)
    mx.eval(flash_attn_with_kvcache(**own), own["k_cache"])


@pytest.mark.parametrize(("good", "change", "error", "argument"), SHAPES.values(), ids=SHAPES.keys())
def test_bad_shapes(good, change, error, argument):
    assert_refused(error, argument, flash_attn_with_kvcache, **(good | change))


@pytest.mark.parametrize(("good", "change", "error", "argument"), PRESENCE.values(), ids=PRESENCE.keys())
def test_arguments_that_belong_together(good, change, error, argument):
    assert_refused(error, argument, flash_attn_with_kvcache, **(good | change))


@pytest.mark.parametrize(("good", "change", "error", "argument"), TYPES.values(), ids=TYPES.keys())
def test_bad_types(good, change, error, argument):
    assert_refused(error, argument, flash_attn_with_kvcache, **(good | change))


@pytest.mark.parametrize(("good", "change", "error", "argument"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(good, change, error, argument):
    assert_refused(error, argument, flash_attn_with_kvcache, **(good | change))


@pytest.mark.parametrize(("good", "change", "argument"), VALUES.values(), ids=VALUES.keys())
def test_bad_values_that_are_there_at_the_call(good, change, argument):
    mx.eval([x for x in change.values() if isinstance(x, mx.array)])
    assert_refused(ValueError, argument, flash_attn_with_kvcache, **(good | change))


@pytest.mark.parametrize(("good", "change", "argument"), VALUES.values(), ids=VALUES.keys())
def test_a_refused_call_leaves_the_caches_alone(good, change, argument):
    own = copied(good)
    objects = [own[name] for name in CACHES]
    before = [to_numpy(x) for x in objects]
    mx.eval([x for x in change.values() if isinstance(x, mx.array)])
    with pytest.raises(ValueError, match=argument):
        flash_attn_with_kvcache(**(own | change))
    for cache, value in zip(objects, before, strict=True):
        np.testing.assert_array_equal(to_numpy(cache), value)


def test_blocks_past_the_length_may_be_minus_one():
    table = integers(0, -1, -1, 3, 4, -1).reshape(2, 3)
    mx.eval(table)
    flash_attn_with_kvcache(**(PAGED | {"block_table": table}))


def test_capacity_is_exactly_enough():
    flash_attn_with_kvcache(**(copied(APPEND) | {"cache_seqlens": integers(7, 7)}))
    flash_attn_with_kvcache(**(copied(PAGED_APPEND) | {"cache_seqlens": integers(9, 9)}))
    flash_attn_with_kvcache(**(READ | {"cache_seqlens": 10}))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError):
        flash_attn_with_kvcache(**READ, no_such_option=1)
    with pytest.raises(TypeError):
        flash_attn_with_kvcache(**READ, dropout_p=0.1)


def test_extras_are_keyword_only():
    positional = [*READ.values(), *[None] * 7]
    with pytest.raises(TypeError):
        flash_attn_with_kvcache(*positional, 0.1, False, (-1, -1), 0.0, True, None, 0, False, mx.zeros((4,)))


def test_more_splits_than_upstream_allows_are_clamped():
    mx.eval(flash_attn_with_kvcache(**READ, num_splits=100000))


def test_one_array_cannot_take_both_new_keys_and_new_values(rng):
    cache = mx.zeros((2, 20, 2, 32))
    arguments = cache_call(rng, 2, 1, 20, seqlen_new=1) | {"k_cache": cache, "v_cache": cache}
    assert_refused(ValueError, "v_cache", flash_attn_with_kvcache, **arguments)


def test_a_call_after_a_refused_one_works(rng):
    arguments = cache_call(rng, 2, 1, 20, seqlen_new=1)
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn_with_kvcache(**(arguments | {"cache_seqlens": 20}))
    out = flash_attn_with_kvcache(**arguments)
    assert np.all(np.isfinite(to_numpy(out)))
