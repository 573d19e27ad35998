"""flash_attn_with_kvcache: new tokens are stored in place, and attention over the cache is what the oracle says."""

from __future__ import annotations

import kvcache_combinations
import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import (
    CACHES,
    cache_call,
    call_of,
    check,
    copied,
    pack_new_keys,
    pack_queries,
    page,
    rope_tables,
    rotary,
    run,
)
from support import DTYPES, error, integers, name_of, normal, to_numpy

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

PAGE_SIZES = [1, 3, 16, 128]
HEADS = [(4, 4), (4, 2), (6, 1)]
MASKS = {"neither": {}, "causal": {"causal": True}, "window": {"window_size": (9, 4)}, "left": {"window_size": (11, -1)}}
ROUNDING_ERROR = {mx.float32: 1e-5, mx.bfloat16: 2e-2, mx.float16: 2e-3}  # of two ways to sum values of size about 1

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def close(a: mx.array, b: mx.array, atol: float) -> None:
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=atol)


# ---- reading


@each_dtype
@each_mask
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_whole_cache_is_dense_attention(rng, heads, mask, dtype):
    q, k, v = (normal(rng, 2, n, h, 48, dtype=dtype) for n, h in [(7, heads[0]), (50, heads[1]), (50, heads[1])])
    out, lse = flash_attn_with_kvcache(q, k, v, **mask, return_softmax_lse=True)
    want, want_lse = flash_attn_func(q, k, v, **mask, return_softmax_lse=True)
    close(out, want, ROUNDING_ERROR[dtype])
    close(lse, want_lse, 2e-5)


@each_mask
def test_lengths_are_those_of_packed_attention(rng, mask):
    lengths = [1, 40, 0, 23]
    q, k, v = (normal(rng, 4, n, h, 32) for n, h in [(3, 4), (40, 2), (40, 2)])
    packed = (mx.concatenate([x[b, :n] for b, n in enumerate(lengths)]) for x in (k, v))
    bounds_q, bounds_k = integers(0, 3, 6, 9, 12), integers(0, *np.cumsum(lengths))
    want = flash_attn_varlen_func(q.reshape(12, 4, 32), *packed, bounds_q, bounds_k, 3, 40, **mask)
    close(flash_attn_with_kvcache(q, k, v, cache_seqlens=integers(*lengths), **mask).reshape(12, 4, 32), want, 1e-5)


@each_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 70])
def test_every_number_of_queries(rng, seqlen_q, heads, dtype):
    arguments = cache_call(rng, 2, seqlen_q, 150, *heads, seqlen_new=seqlen_q, dtype=dtype)
    check(arguments | {"causal": True})


@each_dtype
@pytest.mark.parametrize(
    ("dim", "dim_v"), [(1, 1), (7, 5), (59, 59), (64, 128), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)]
)
def test_every_head_dim(rng, dim, dim_v, dtype):
    check(cache_call(rng, 2, 3, 70, 4, 1, dim, dim_v, 2, dtype) | {"causal": True})


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("capacity", [127, 1024, 3001])
def test_a_cache_long_enough_to_be_split(rng, capacity, seqlen_q, dtype):
    arguments = cache_call(rng, 2, seqlen_q, capacity, 8, 2, 64, seqlen_new=seqlen_q, dtype=dtype)
    check(arguments | {"causal": True, "cache_seqlens": integers(capacity - seqlen_q, capacity // 3)})


@each_dtype
@pytest.mark.parametrize("feature", ["softcap", "alibi", "sink", "qv", "chunk"])
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_each_score_feature(rng, seqlen_q, feature, dtype):
    check(kvcache_combinations.build(rng, frozenset({feature, "append", "causal"}), dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(0, 0), (-1, 0), (0, -1), (5, 0), (0, 5), (7, 3), (-1, 4), (200, 200), (2**31 - 1, 2)])
def test_a_window_is_literal_around_the_last_keys(rng, window_size, causal):
    check(cache_call(rng, 3, 5, 70, seqlen_new=3) | {"window_size": window_size, "causal": causal})


def test_a_window_of_none_is_unbounded(rng):
    arguments = cache_call(rng, 2, 5, 70)
    want = run(arguments | {"window_size": (6, -1)})
    assert np.array_equal(run(arguments | {"window_size": (6, None)}).out, want.out)


def test_a_length_for_all_sequences_may_be_an_int(rng):
    arguments = cache_call(rng, 3, 2, 40, seqlen_new=2)
    one, each = (run(arguments | {"cache_seqlens": n}) for n in (17, integers(17, 17, 17)))
    assert np.array_equal(one.out, each.out)
    assert np.array_equal(one.k_cache, each.k_cache)


def test_the_scale_may_be_given(rng):
    check(cache_call(rng, 2, 3, 40) | {"softmax_scale": 0.31})
    check(cache_call(rng, 2, 3, 40) | {"softmax_scale": -0.2, "causal": True})


def test_a_sequence_without_keys_gives_zero_and_minus_infinity(rng):
    got = check(cache_call(rng, 2, 3, 40) | {"cache_seqlens": integers(0, 12)})
    assert np.all(got.out[0] == 0)
    assert np.all(got.lse[0] == -np.inf)


def test_a_sequence_without_keys_has_the_sink_as_lse(rng):
    sink = normal(rng, 4)
    got = check(cache_call(rng, 2, 3, 40) | {"cache_seqlens": integers(0, 12), "learnable_sink": sink})
    assert np.all(got.out[0] == 0)
    np.testing.assert_allclose(got.lse[0], to_numpy(sink)[:, None] * np.ones(3), rtol=1e-6)


def test_queries_before_the_first_key_see_nothing(rng):
    got = check(cache_call(rng, 1, 9, 40) | {"cache_seqlens": integers(4), "causal": True})
    assert np.all(got.out[0, :5] == 0)
    assert np.all(np.isfinite(got.lse[0, :, 5:]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no batch", "no queries"])
def test_an_empty_call_gives_an_empty_result(rng, shape):
    batch, seqlen_q = shape
    q, cache = normal(rng, batch, seqlen_q, 4, 16), normal(rng, batch, 10, 2, 16)
    out, lse = flash_attn_with_kvcache(q, cache, cache + 0, cache_seqlens=mx.zeros((batch,), mx.int32), return_softmax_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, seqlen_q)
    mx.eval(out, lse)


def test_no_queries_still_append(rng):
    arguments = cache_call(rng, 2, 1, 20, seqlen_new=3)
    check(arguments | {"q": arguments["q"][:, :0]})


def test_shapes_and_dtypes_are_known_before_evaluation(rng):
    arguments = cache_call(rng, 2, 5, 20, 4, 2, 16, 24, dtype=mx.bfloat16)
    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert (out.shape, out.dtype) == ((2, 5, 4, 24), mx.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), mx.float32)
    assert flash_attn_with_kvcache(**arguments).shape == (2, 5, 4, 24)


def test_the_lse_combines_disjoint_halves(rng):
    from flash_attn import flash_attn_combine

    arguments = cache_call(rng, 2, 3, 60) | {"cache_seqlens": 60}
    want, _ = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    parts = []
    for part in (slice(0, 25), slice(25, 60)):
        half = arguments | {name: arguments[name][:, part] for name in CACHES} | {"cache_seqlens": part.stop - part.start}
        parts.append(flash_attn_with_kvcache(**half, return_softmax_lse=True))
    outs, lses = (mx.stack(x) for x in zip(*parts, strict=True))
    out, _ = flash_attn_combine(outs, lses.transpose(0, 1, 3, 2))
    close(out, want, 1e-5)


# ---- appending


@each_dtype
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (1, 5), (5, 1), (33, 7), (4, 40), (17, 17), (2, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_new_tokens_are_stored_and_seen(rng, seqlen_q, seqlen_new, causal, dtype):
    check(cache_call(rng, 3, seqlen_q, 60, seqlen_new=seqlen_new, dtype=dtype) | {"causal": causal})


def test_appending_up_to_the_last_slot(rng):
    check(cache_call(rng, 2, 3, 20, seqlen_new=3) | {"cache_seqlens": integers(17, 0), "causal": True})


def test_the_callers_arrays_hold_the_new_tokens_whichever_is_evaluated(rng):
    for evaluated in ("out", "k_cache", "v_cache"):
        arguments = cache_call(rng, 1, 1, 20, seqlen_new=2) | {"cache_seqlens": 5}
        out = flash_attn_with_kvcache(**arguments)
        mx.eval(out if evaluated == "out" else arguments[evaluated])
        assert mx.array_equal(arguments["k_cache"][:, 5:7], arguments["k"])
        assert mx.array_equal(arguments["v_cache"][:, 5:7], arguments["v"])


def test_every_reference_to_the_array_sees_the_new_tokens(rng):
    arguments = cache_call(rng, 1, 1, 20, seqlen_new=2) | {"cache_seqlens": 5}
    layers = [{"k": arguments["k_cache"]}]
    mx.eval(flash_attn_with_kvcache(**arguments))
    assert mx.array_equal(layers[0]["k"][:, 5:7], arguments["k"])


def test_a_result_that_nobody_evaluates_still_appends(rng):
    arguments = cache_call(rng, 1, 1, 20, seqlen_new=1) | {"cache_seqlens": 5}
    flash_attn_with_kvcache(**arguments)
    assert mx.array_equal(arguments["v_cache"][:, 5:6], arguments["v"])


def test_queued_calls_read_what_was_there_at_their_turn(rng):
    """The first call's out must not see the second call's tokens, though both are evaluated at once."""
    arguments = cache_call(rng, 1, 1, 20, seqlen_new=1) | {"cache_seqlens": 5}
    first = flash_attn_with_kvcache(**arguments)
    overwriting = arguments | {name: arguments[name] + 9 for name in ("k", "v")}
    second = flash_attn_with_kvcache(**overwriting)
    mx.eval(second, first)
    for out, tokens in ((first, arguments), (second, overwriting)):
        k, v = (mx.concatenate([arguments[f"{name}_cache"][:, :5], tokens[name]], axis=1) for name in ("k", "v"))
        close(out, flash_attn_func(arguments["q"], k, v), 1e-5)
    assert mx.array_equal(arguments["k_cache"][:, 5:6], overwriting["k"])


def test_a_call_without_new_tokens_leaves_the_arrays_alone(rng):
    arguments = cache_call(rng, 2, 3, 20)
    before = [to_numpy(arguments[name]) for name in CACHES]
    mx.eval(flash_attn_with_kvcache(**arguments))
    for name, value in zip(CACHES, before, strict=True):
        np.testing.assert_array_equal(to_numpy(arguments[name]), value)


def test_one_array_may_be_both_caches_when_nothing_is_appended(rng):
    q, cache = normal(rng, 2, 3, 4, 16), normal(rng, 2, 20, 2, 16)
    close(flash_attn_with_kvcache(q, cache, cache), flash_attn_func(q, cache, cache), 1e-5)


def test_queries_and_new_tokens_may_be_views_of_one_projection(rng):
    packed = normal(rng, 2, 3, 8, 32)
    arguments = cache_call(rng, 2, 3, 40) | {"cache_seqlens": integers(4, 30), "causal": True}
    check(arguments | {"q": packed[:, :, :4], "k": packed[:, :, 4:6], "v": packed[:, :, 6:]})
    assert mx.all(mx.isfinite(packed))


def in_one_array(k_cache: mx.array, v_cache: mx.array) -> mx.array:
    return mx.stack([k_cache, v_cache], axis=2)


VIEWS = {
    "heads before slots": (lambda k, v: mx.stack([k, v]).transpose(0, 1, 3, 2, 4), lambda x: tuple(x.transpose(0, 1, 3, 2, 4))),
    "beside each other": (in_one_array, lambda x: (x[:, :, 0], x[:, :, 1])),
    "every other channel": (lambda k, v: mx.stack([k, v], axis=-1), lambda x: (x[..., 0], x[..., 1])),
    "every other slot": (lambda k, v: mx.repeat(mx.stack([k, v]), 2, axis=2), lambda x: (x[0, :, ::2], x[1, :, ::2])),
    "part of longer rows": (
        lambda k, v: mx.pad(mx.stack([k, v]), [(0, 0), (0, 0), (3, 4), (0, 0), (0, 0)]),
        lambda x: (x[0, :, 3:-4], x[1, :, 3:-4]),
    ),
}


@pytest.mark.parametrize(("layout", "views"), VIEWS.values(), ids=VIEWS.keys())
def test_caches_may_be_views_and_what_they_look_at_stays(rng, layout, views):
    arguments = cache_call(rng, 2, 2, 30, seqlen_new=2) | {"causal": True}
    want = run(arguments)
    base = mx.contiguous(layout(*(arguments[name] for name in CACHES)))
    mx.eval(base)
    before = to_numpy(base)
    caches = dict(zip(CACHES, views(base), strict=True))
    out = flash_attn_with_kvcache(**(arguments | caches))
    mx.eval(out, caches)
    np.testing.assert_allclose(to_numpy(out), want.out, atol=1e-6)
    for name, cache in caches.items():
        np.testing.assert_array_equal(to_numpy(cache), getattr(want, name))
    np.testing.assert_array_equal(to_numpy(base), before)


def test_a_broadcast_cache_becomes_rows_of_its_own(rng):
    arguments = cache_call(rng, 3, 2, 30, seqlen_new=2, rows=1) | {"causal": True, "cache_seqlens": integers(4, 9, 28)}
    rows = {name: mx.repeat(arguments[name], 3, axis=0) for name in CACHES}
    want = run(arguments | rows)
    caches = {name: mx.broadcast_to(arguments[name], rows[name].shape) for name in CACHES}
    out = flash_attn_with_kvcache(**(arguments | caches))
    np.testing.assert_allclose(to_numpy(out), want.out, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(caches["k_cache"]), want.k_cache)


def test_caches_that_are_not_computed_yet(rng):
    arguments = cache_call(rng, 2, 2, 30, seqlen_new=2) | {"causal": True}
    want = run(arguments)
    lazy = arguments | {name: arguments[name] * 2 / 2 for name in (*CACHES, "q", "k", "v", "cache_seqlens")}
    lazy["cache_seqlens"] = arguments["cache_seqlens"] + 0
    out = flash_attn_with_kvcache(**lazy)
    np.testing.assert_array_equal(to_numpy(out), want.out)
    np.testing.assert_array_equal(to_numpy(lazy["k_cache"]), want.k_cache)


# ---- where a sequence lies


@each_dtype
@each_mask
def test_leftpad_moves_the_first_key(rng, mask, dtype):
    arguments = cache_call(rng, 3, 5, 60, seqlen_new=4, dtype=dtype) | {"cache_seqlens": integers(30, 7, 44)}
    check(arguments | mask | {"cache_leftpad": integers(3, 7, 0), "alibi_slopes": normal(rng, 4)})


def test_leftpad_up_to_the_length_leaves_no_keys(rng):
    got = check(cache_call(rng, 2, 2, 30) | {"cache_seqlens": integers(9, 9), "cache_leftpad": integers(9, 8)})
    assert np.all(got.out[0] == 0)


@each_dtype
def test_batch_idx_picks_rows_of_the_cache(rng, dtype):
    arguments = cache_call(rng, 3, 2, 30, seqlen_new=2, dtype=dtype, rows=5)
    check(arguments | {"cache_batch_idx": integers(4, 0, 2), "causal": True})


def test_sequences_may_read_one_row(rng):
    check(cache_call(rng, 3, 2, 30, rows=2) | {"cache_batch_idx": integers(1, 1, 0)})


def test_a_cache_may_have_fewer_rows_than_the_batch(rng):
    check(cache_call(rng, 4, 2, 30, rows=1) | {"cache_batch_idx": integers(0, 0, 0, 0)})


@each_dtype
@each_mask
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_hold_the_same_keys(rng, page_size, mask, dtype):
    contiguous = cache_call(rng, 3, 3, 200, seqlen_new=3, dtype=dtype) | mask
    paged = check(page(rng, contiguous, page_size))
    assert error(paged.out, run(contiguous).out) <= ROUNDING_ERROR[dtype]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_pages_with_leftpad_and_batch_idx(rng, seqlen_q, page_size):
    arguments = cache_call(rng, 3, seqlen_q, 150, seqlen_new=5, rows=4) | {"cache_seqlens": integers(100, 3, 141)}
    arguments |= {"cache_leftpad": integers(37, 3, 0), "cache_batch_idx": integers(2, 3, 0), "causal": True}
    check(page(rng, arguments, page_size))


def test_a_page_may_belong_to_two_sequences(rng):
    arguments = cache_call(rng, 2, 1, 8, rows=3) | {"cache_seqlens": integers(20, 13)}
    check(arguments | {"block_table": integers(0, 2, 1, 0, 1, -1).reshape(2, 3)})


def test_new_tokens_may_cross_pages(rng):
    check(page(rng, cache_call(rng, 2, 4, 60, seqlen_new=23) | {"cache_seqlens": integers(6, 37)}, 8))


def test_a_table_may_have_more_blocks_than_a_length_needs(rng):
    arguments = page(rng, cache_call(rng, 2, 1, 40) | {"cache_seqlens": integers(5, 11)}, 4)
    table = np.array(arguments["block_table"])
    table[:, 3:] = -1
    check(arguments | {"block_table": mx.array(table)})


def test_a_whole_table_is_the_length_when_none_is_given(rng):
    arguments = page(rng, cache_call(rng, 2, 2, 40) | {"cache_seqlens": 40}, 8)
    want = run(arguments)
    del arguments["cache_seqlens"]
    np.testing.assert_array_equal(run(arguments).out, want.out)


def test_page_table_is_another_name_of_block_table(rng):
    arguments = page(rng, cache_call(rng, 2, 2, 40), 8)
    want = run(arguments)
    out = flash_attn_with_kvcache(**(arguments | {"page_table": arguments["block_table"], "block_table": None}))
    np.testing.assert_array_equal(to_numpy(out), want.out)


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_a_page_that_is_not_there_hides_its_keys_and_keeps_its_positions(rng, seqlen_q, dtype):
    arguments = page(rng, cache_call(rng, 2, seqlen_q, 64, dtype=dtype) | {"cache_seqlens": integers(64, 50)}, 8)
    table = np.array(arguments["block_table"])
    table[0, [0, 3, 7]] = -1
    table[1, 2:5] = -1
    arguments |= {"block_table": mx.array(table), "alibi_slopes": normal(rng, 4), "causal": True}
    check(arguments)
    check(arguments | {"window_size": (20, 0)})


def test_no_page_at_all_gives_zero(rng):
    arguments = page(rng, cache_call(rng, 2, 2, 32) | {"cache_seqlens": integers(32, 9)}, 8)
    got = check(arguments | {"block_table": mx.full(arguments["block_table"].shape, -1, mx.int32)})
    assert np.all(got.out == 0)
    assert np.all(got.lse == -np.inf)


def test_tokens_appended_to_a_page_that_is_not_there_are_dropped(rng):
    """Only where the table is not there at the call; else it is refused."""
    arguments = page(rng, cache_call(rng, 2, 3, 32, seqlen_new=4) | {"cache_seqlens": integers(14, 20)}, 8)
    table = np.array(arguments["block_table"])
    table[0, 2] = -1  # takes tokens 16 and 17 of slots 14 to 17
    arguments |= {"block_table": mx.array(table), "causal": True}
    want = call_of(arguments).result()
    own = copied(arguments) | {"block_table": arguments["block_table"] + 0}
    out = flash_attn_with_kvcache(**own)
    np.testing.assert_allclose(to_numpy(out), want.out, atol=2e-5)
    np.testing.assert_array_equal(to_numpy(own["k_cache"]), want.k_cache)
    np.testing.assert_array_equal(to_numpy(own["v_cache"]), want.v_cache)


# ---- packed queries and new keys


@each_dtype
@each_mask
def test_packed_queries(rng, mask, dtype):
    arguments = pack_queries(cache_call(rng, 4, 20, 60, dtype=dtype), [3, 0, 20, 1])
    check(arguments | mask)


def test_the_longest_packed_query_need_not_be_said(rng):
    arguments = pack_queries(cache_call(rng, 3, 9, 40), [9, 0, 2])
    np.testing.assert_array_equal(run(arguments | {"max_seqlen_q": None}).out, run(arguments).out)


@pytest.mark.parametrize("lengths", [[2, 0, 5, 1], [0, 0, 5, 0]], ids=str)
def test_packed_new_keys(rng, lengths):
    check(pack_new_keys(cache_call(rng, 4, 3, 60, seqlen_new=5), lengths) | {"causal": True})


@each_dtype
@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_packed_queries_and_packed_new_keys(rng, page_size, dtype):
    arguments = cache_call(rng, 4, 9, 60, seqlen_new=12, dtype=dtype)
    if page_size:
        arguments = page(rng, arguments, page_size)
    arguments = pack_new_keys(pack_queries(arguments, [9, 1, 0, 4]), [9, 1, 3, 12])
    check(rotary(rng, arguments, 32) | {"causal": True})


def test_the_lse_of_packed_queries_has_heads_first(rng):
    got = run(pack_queries(cache_call(rng, 3, 5, 30), [5, 2, 0]))
    assert got.lse.shape == (4, 7)


# ---- rotary


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 32, 64])
@each_mask
def test_rotary_turns_queries_and_new_keys(rng, mask, rotary_dim, interleaved, dtype):
    arguments = cache_call(rng, 2, 5, 60, dim=64, seqlen_new=5, dtype=dtype)
    check(rotary(rng, arguments, rotary_dim, interleaved) | mask)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seqlen_new", [1, 2, 9])
def test_rotary_with_another_number_of_new_keys(rng, seqlen_new, interleaved):
    check(rotary(rng, cache_call(rng, 2, 4, 60, seqlen_new=seqlen_new), 32, interleaved) | {"causal": True})


@each_mask
def test_rotary_seqlens_replace_the_positions(rng, mask):
    arguments = rotary(rng, cache_call(rng, 3, 4, 60, seqlen_new=4), 16)
    check(arguments | mask | {"rotary_seqlens": integers(0, 77, 200)})


def test_rotary_counts_from_the_first_slot_whatever_the_leftpad(rng):
    arguments = rotary(rng, cache_call(rng, 2, 4, 60, seqlen_new=4), 32) | {"cache_seqlens": integers(20, 31)}
    check(arguments | {"cache_leftpad": integers(6, 31), "causal": True})


def test_a_window_as_wide_as_the_cache_still_advances_the_queries(rng):
    """Upstream turns such a window into none, and then rotates all queries alike."""
    check(rotary(rng, cache_call(rng, 2, 5, 60, seqlen_new=5), 32) | {"window_size": (60, 60)})


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_mlxs_rope(rng, interleaved):
    arguments = cache_call(rng, 2, 6, 40, dim=64, seqlen_new=6) | {"cache_seqlens": 11, "causal": True}
    arguments |= rope_tables(40, 48, 10000.0)
    mx.eval(flash_attn_with_kvcache(**arguments, rotary_interleaved=interleaved))
    turned = mx.fast.rope(arguments["k"].transpose(0, 2, 1, 3), 48, traditional=interleaved, base=10000.0, scale=1.0, offset=11)
    close(arguments["k_cache"][:, 11:17], turned.transpose(0, 2, 1, 3), 1e-5)


# ---- everything together


@pytest.mark.parametrize("features", kvcache_combinations.sample(200, seed=7), ids=kvcache_combinations.name_of)
def test_features_combine(rng, features):
    check(kvcache_combinations.build(rng, features))


@pytest.mark.parametrize("features", kvcache_combinations.sample(40, seed=8), ids=kvcache_combinations.name_of)
def test_the_reference_combines_them_too(rng, features, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1")
    check(kvcache_combinations.build(rng, features))


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
@pytest.mark.parametrize("paged", [False, True])
def test_any_number_of_splits_agrees(rng, paged, seqlen_q, dtype):
    arguments = cache_call(rng, 2, seqlen_q, 700, 8, 2, dtype=dtype) | {"causal": True, "cache_seqlens": integers(700, 301)}
    if paged:
        arguments = page(rng, arguments, 16)
    results = [run(arguments | {"num_splits": n}) for n in (1, 0, 3, 128, 1000)]
    for result in results[1:]:
        assert error(result.out, results[0].out) <= ROUNDING_ERROR[dtype]
        assert error(result.lse, results[0].lse) <= 2e-5
