"""Decoding and caches on Metal, run by the shim with every access checked: against float64, and in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvcache_combinations
import mlx.core as mx
import numpy as np
import pytest
import test_kvcache_quantised as quantised_caches
from kvcache_support import (
    CACHES,
    cache_call,
    check,
    copied,
    pack_new_keys,
    pack_queries,
    page,
    rotary,
    run,
)
from metal_support import metal_graph
from support import DTYPES, integers, name_of, normal, to_numpy
from test_kvcache_memory import LAYOUTS, addresses, new_call, parts_of, peak_of, values

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

PAGE_SIZES = [1, 3, 16, 128]
SMALL = 1 << 17
FEATURES: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "causal": lambda rng: {"causal": True},
    "window": lambda rng: {"window_size": (9, 4)},
    "left": lambda rng: {"window_size": (11, -1)},
    "chunk": lambda rng: {"attention_chunk": 16, "causal": True},
    "softcap": lambda rng: {"softcap": 3.0},
    "alibi": lambda rng: {"alibi_slopes": mx.array(rng.random((2, 4)).astype(np.float32))},
    "sink": lambda rng: {"learnable_sink": normal(rng, 4)},
    "leftpad": lambda rng: {"cache_leftpad": integers(3, 1)},
    "batch_idx": lambda rng: {"cache_batch_idx": integers(1, 0)},
    "scale": lambda rng: {"softmax_scale": -0.3},
    "splits": lambda rng: {"num_splits": 3},
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.fixture(autouse=True)
def shim(request):
    with metal_graph(request.config.getoption("--metal-shim") or "hooks") as module:
        module.clear_reports()
        yield module


def launched(module: Any) -> list[str]:
    """The kernels of this test, in order, as src/metal names them."""
    names = [report["function"] for report in module.reports()]
    return [name.removeprefix("custom_kernel_flash_attn_").split("_")[0] for name in names]


def later(x: mx.array) -> mx.array:
    """The same values, which nobody knows before they are evaluated."""
    return x + 0


# ---- attention


@pytest.mark.parametrize("dim", [(8, 8), (40, 59), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
def test_every_head_dim(rng, shim, dim):
    check(cache_call(rng, 2, 3, 70, 4, 1, *dim, dtype=mx.float16) | {"causal": True})
    assert launched(shim) == ["decode"]


@each_dtype
@pytest.mark.parametrize("dim", [59, 256])
def test_every_dtype(rng, shim, dim, dtype):
    check(cache_call(rng, 2, 3, 70, 4, 1, dim, dtype=dtype) | {"causal": True})
    assert launched(shim) == ["decode"]


@pytest.mark.parametrize(("heads", "dtype"), [(4, mx.float16), (24, mx.float16), (4, mx.float32)])
def test_latent_attention(rng, heads, dtype):
    check(cache_call(rng, 1, 1, 90, heads, 1, 576, 512, dtype=dtype) | {"num_splits": 2})


@pytest.mark.parametrize(("seqlen_q", "dtype"), [(1, mx.float16), (3, mx.float16), (1, mx.float32)])
def test_latent_attention_with_qv(rng, seqlen_q, dtype):
    arguments = cache_call(rng, 2, seqlen_q, 60, 8, 1, 64, 512, dtype=dtype)
    check(arguments | {"qv": normal(rng, 2, seqlen_q, 8, 512, dtype=dtype), "causal": True})


@pytest.mark.parametrize("heads", [(8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 9])
def test_every_number_of_rows(rng, seqlen_q, heads):
    check(cache_call(rng, 2, seqlen_q, 100, *heads, 64, dtype=mx.float16) | {"causal": True})


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(rng, feature, seqlen_q):
    check(cache_call(rng, 2, seqlen_q, 150, 4, 2, 64, dtype=mx.float16) | FEATURES[feature](rng))


@pytest.mark.parametrize("features", kvcache_combinations.sample(12, seed=11), ids=kvcache_combinations.name_of)
def test_features_combine(rng, features):
    check(kvcache_combinations.build(rng, features))


@pytest.mark.parametrize("lengths", [[3, 0, 2], [1, 1, 1]], ids=str)
def test_packed_queries(rng, lengths):
    arguments = pack_queries(cache_call(rng, 3, max(lengths), 70, 4, 2, 64, dtype=mx.float16), lengths)
    check(arguments | {"causal": True, "num_splits": 2})


def test_rows_that_see_nothing(rng):
    got = check(cache_call(rng, 2, 3, 40) | {"cache_seqlens": integers(0, 12)})
    assert np.all(got.out[0] == 0)
    assert np.all(got.lse[0] == -np.inf)
    check(cache_call(rng, 1, 9, 40) | {"cache_seqlens": integers(4), "causal": True})


def test_prefill_is_not_decoded(rng, shim):
    check(page(rng, cache_call(rng, 2, 40, 60, 4, 2, 64, dtype=mx.float16) | {"causal": True}, 16))
    assert launched(shim) == ["forward"]


# ---- splits


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_agree_with_one(rng, shim, splits):
    arguments = cache_call(rng, 2, 2, 1000, 4, 2, 64, dtype=mx.float32) | {"cache_seqlens": integers(990, 37)}
    whole = run(arguments | {"num_splits": 1})
    divided = run(arguments | {"num_splits": splits})
    assert launched(shim) == ["decode", "decode", "combine"]
    np.testing.assert_allclose(divided.out, whole.out, atol=2e-6)
    np.testing.assert_allclose(divided.lse, whole.lse, atol=2e-6)


def test_a_sink_joins_once(rng):
    arguments = cache_call(rng, 1, 1, 600, 4, 2, 64) | {"learnable_sink": normal(rng, 4), "cache_seqlens": integers(600)}
    for splits in (1, 4):
        check(arguments | {"num_splits": splits})


def test_dropout_of_head_dims_that_only_decode_has(rng, shim):
    """The mask is the reference's, bit for bit: without it the outputs would differ by much."""
    q, k, v = normal(rng, 6, 2, 320), normal(rng, 8, 16, 1, 320), normal(rng, 8, 16, 1, 320)
    arguments = {
        "cu_seqlens_q": integers(0, 4, 6),
        "cu_seqlens_k": integers(0, 30, 64),
        "block_table": integers(*range(8)).reshape(2, 4),
    }
    options = {"max_seqlen_q": 4, "max_seqlen_k": 64, "dropout_p": 0.4, "dropout_key": mx.array([5, 9], mx.uint32)}
    got = to_numpy(flash_attn_varlen_func(q, k, v, **arguments, **options))
    assert launched(shim) == ["decode"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_ATTENTION_MLX_REF", "1")
        want = to_numpy(flash_attn_varlen_func(q, k, v, **arguments, **options))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_short_cache_is_not_divided(rng, shim):
    check(cache_call(rng, 1, 1, 200, 4, 2, 64, dtype=mx.float16))
    assert launched(shim) == ["decode"]


def test_a_long_cache_is_divided(rng, shim):
    check(cache_call(rng, 1, 1, 2000, 4, 2, 64, dtype=mx.float16))
    assert launched(shim) == ["decode", "combine"]


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize(("seqlen_q", "heads", "dim"), [(1, 4, 64), (4, 8, 128), (1, 4, 256)])
def test_a_key_is_read_once_for_all_rows_of_its_head(rng, shim, seqlen_q, heads, dim, paged):
    length, heads_k = 256, 1
    arguments = cache_call(rng, 1, seqlen_q, 300, heads, heads_k, dim, dtype=mx.float16) | {"cache_seqlens": integers(length)}
    run(page(rng, arguments, 16) if paged else arguments)
    counted = shim.reports()[0]["device_bytes_read"]
    if not counted:
        pytest.skip("only hooks count")
    for name in ("k", "v"):
        assert counted[name] <= 1.02 * length * heads_k * dim * 2


# ---- pages


@pytest.mark.parametrize("leftpad", [False, True], ids=["", "leftpad"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_every_page_size(rng, seqlen_q, page_size, leftpad):
    arguments = page(rng, cache_call(rng, 2, seqlen_q, 150, 4, 2, 64, seqlen_new=seqlen_q, dtype=mx.float16), page_size)
    if leftpad:
        arguments["cache_leftpad"] = integers(3, 1)
    check(arguments | {"causal": True, "cache_seqlens": integers(133, 22)})


@pytest.mark.parametrize("page_size", [3, 16])
def test_keys_of_a_missing_page_are_invisible(rng, page_size):
    arguments = page(rng, cache_call(rng, 2, 2, 100, 4, 2, 64, dtype=mx.float16), page_size)
    table = np.array(arguments["block_table"])
    table[0, 1] = table[1, 0] = -1
    check(arguments | {"block_table": mx.array(table), "cache_seqlens": integers(90, 77)})


def test_hostile_tables_stay_inside_the_cache(rng):
    """What nobody could check at the call, because it was not there yet."""
    for _ in range(6):
        arguments = page(rng, cache_call(rng, 2, 2, 60, 4, 2, 64, seqlen_new=2), 16)
        wild = [mx.array(rng.integers(-(2**31), 2**31 - 1, shape).astype(np.int32)) for shape in ((2, 4), (2,), (2,))]
        names = ("block_table", "cache_seqlens", "cache_leftpad")
        got = run(arguments | {name: later(x) for name, x in zip(names, wild, strict=True)})
        assert np.all(np.isfinite(got.out))
        assert not np.any(np.isnan(got.lse))


# ---- quantised caches


@pytest.mark.parametrize("format_", quantised_caches.FORMATS)
@pytest.mark.parametrize(("layout", "dtype"), [("rows", mx.bfloat16), ("pages", mx.float16)])
def test_codes_are_read_as_the_numbers_they_stand_for(rng, shim, layout, dtype, format_):
    arguments = cache_call(rng, 2, 3, 100, 4, 2, 128, 64, dtype=dtype) | {"causal": True}
    arguments = page(rng, arguments, 16) if layout == "pages" else arguments
    call = quantised_caches.poisoned(quantised_caches.quantised(arguments, format_))
    out, lse = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    mx.eval(out, lse)
    assert launched(shim) == ["decode"]
    want = quantised_caches.as_numbers(call).result()
    np.testing.assert_allclose(to_numpy(lse), want.lse, atol=2e-5)
    np.testing.assert_allclose(to_numpy(out), want.out, atol=2e-2 if dtype == mx.bfloat16 else 2e-3)


def test_keys_of_8_bits_and_values_of_4(rng):
    arguments = cache_call(rng, 2, 1, 100, 4, 2, 64, dtype=mx.float16)
    call = quantised_caches.quantised(arguments, "mlx8")
    call["v_cache"] = quantised_caches.quantised(arguments, "mlx4")["v_cache"]
    want = quantised_caches.as_numbers(call).result()
    np.testing.assert_allclose(to_numpy(flash_attn_with_kvcache(**call)), want.out, atol=2e-3)


# ---- appending


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rotary_dim", "dtype"), [(16, mx.bfloat16), (64, mx.float16)])
def test_rotary(rng, shim, dtype, rotary_dim, interleaved, known):
    arguments = rotary(rng, cache_call(rng, 2, 3, 60, 4, 2, 64, seqlen_new=3, dtype=dtype), rotary_dim, interleaved)
    check(arguments | {"causal": True} | ({} if known else {"cache_seqlens": later(arguments["cache_seqlens"])}))
    assert launched(shim).count("rotary") == 2


def test_queries_without_an_order_share_their_angles(rng):
    check(rotary(rng, cache_call(rng, 2, 3, 60, 4, 2, 64, seqlen_new=3), 64))


def test_packed_tokens_are_rotated_and_stored(rng):
    arguments = cache_call(rng, 3, 4, 60, 4, 2, 64, seqlen_new=4)
    arguments = rotary(rng, pack_new_keys(pack_queries(arguments, [4, 0, 2]), [1, 3, 0]), 32)
    check(arguments | {"causal": True})
    check(arguments | {"causal": True, "cu_seqlens_k_new": later(arguments["cu_seqlens_k_new"])})


@pytest.mark.parametrize("lengths", [(7, 7), (3, 30)], ids=["one length", "each its own"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name_of)
def test_new_tokens_are_stored_and_nothing_else_changes(rng, dtype, paged, known, lengths):
    arguments = cache_call(rng, 2, 2, 60, seqlen_new=2, dtype=dtype) | {"cache_seqlens": integers(*lengths)}
    arguments = page(rng, arguments, 16) if paged else arguments
    if not known:
        arguments["cache_seqlens"] = later(arguments["cache_seqlens"])
    check(arguments | {"causal": True})


@pytest.mark.parametrize("format_", [None, *quantised_caches.FORMATS])
def test_tokens_without_a_place_are_dropped(rng, format_):
    """On a page that does not exist, and past the capacity. The caches keep every bit."""
    arguments = page(rng, cache_call(rng, 3, 1, 32, 4, 2, 64, seqlen_new=3), 16)
    arguments = quantised_caches.quantised(arguments, format_) if format_ else arguments
    table = np.array(arguments["block_table"])
    table[0, 1] = -1
    own = copied(arguments | {"block_table": mx.array(table)})
    before = [np.array(part) for part in parts_of(own)]
    own |= {"block_table": later(own["block_table"]), "cache_seqlens": later(integers(15, 31, 32))}
    mx.eval(flash_attn_with_kvcache(**own))
    written = np.zeros(before[0].shape[:2], bool)
    for sequence, slot in ((0, 15), (1, 31)):
        written[table[sequence, slot // 16], slot % 16] = True
    for old, new in zip(before, parts_of(own), strict=True):
        changed = (old != np.array(new)).reshape(*written.shape, -1).any(-1)
        assert not np.any(changed[~written])
        assert np.any(changed[written])
    if not format_:
        for name, token in (("k_cache", "k"), ("v_cache", "v")):
            assert mx.array_equal(own[name][int(table[0, 0]), 15], own[token][0, 0])
            assert mx.array_equal(own[name][int(table[1, 1]), 15], own[token][1, 0])


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_evaluated_copies_no_cache(rng, layout, known):
    arguments = new_call(rng, layout)
    before = addresses(parts_of(arguments))
    for step in range(3):
        lengths = integers(7 + step)
        mx.eval(lengths)
        own = arguments | {"cache_seqlens": lengths if known else later(lengths)}
        assert peak_of(lambda own=own: flash_attn_with_kvcache(**own)) <= SMALL < parts_of(arguments)[0].nbytes
        assert addresses(parts_of(arguments)) == before


def test_queued_steps_copy_a_cache_once_at_most(rng):
    arguments = new_call(rng, "contiguous")
    steps = [arguments | {"cache_seqlens": integers(t)} for t in range(20)]
    mx.eval([step["cache_seqlens"] for step in steps])
    peak = peak_of(lambda: [flash_attn_with_kvcache(**step) for step in steps], *values(arguments))
    assert peak <= 2 * arguments["k_cache"].nbytes + 2 * SMALL


def test_a_slice_taken_earlier_keeps_its_values(rng):
    arguments = new_call(rng, "contiguous", 40)
    want = to_numpy(arguments["k_cache"])[:, 5:12]
    piece = arguments["k_cache"][:, 5:12]
    mx.eval(piece)
    mx.eval(flash_attn_with_kvcache(**arguments))
    np.testing.assert_array_equal(to_numpy(piece), want)
    assert mx.array_equal(arguments["k_cache"][:, 7:8], arguments["k"])


def test_steps_follow_one_another(rng):
    """Twelve tokens decoded one by one are the last rows of twelve at once."""
    arguments = cache_call(rng, 1, 1, 40, 4, 2, 64) | {name: mx.zeros((1, 40, 2, 64)) for name in CACHES}
    q, k, v = (normal(rng, 1, 12, h, 64) for h in (4, 2, 2))
    caches = {name: arguments[name] for name in CACHES}
    outs = []
    for t in range(12):
        step = {"k": k[:, t : t + 1], "v": v[:, t : t + 1], "cache_seqlens": t, "causal": True}
        outs.append(flash_attn_with_kvcache(q[:, t : t + 1], **caches, **step))
    at_once = flash_attn_with_kvcache(q, k, v, causal=True)
    np.testing.assert_allclose(to_numpy(mx.concatenate(outs, 1)), to_numpy(at_once), atol=1e-5)
