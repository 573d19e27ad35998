"""NaN and infinity stay where they are seen: what no query may look at never reaches a result."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import Cotangents, cotangents_of, expected, integers, normal, packed_qkv, qkv, run

POISON = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def path(request, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1" if request.param == "reference" else "0")


def poisoned(x: mx.array, index: Any, value: float) -> mx.array:
    copy = np.array(x)
    copy[index] = value
    return mx.array(copy)


def assert_same(a, b) -> None:
    np.testing.assert_array_equal(a.out, b.out)
    np.testing.assert_array_equal(a.lse, b.lse)
    for name in a.gradients:
        np.testing.assert_array_equal(a.gradients[name], b.gradients[name])
        assert np.all(np.isfinite(a.gradients[name]))


def assert_hidden(
    rng, arguments: dict[str, Any], places: dict[str, Any], value: float, cotangents: Cotangents | None = None
) -> None:
    """Results are bit for bit those with zeros at `places`."""
    cotangents = cotangents or cotangents_of(arguments, rng)
    zeros = arguments | {name: poisoned(arguments[name], index, 0.0) for name, index in places.items()}
    bad = arguments | {name: poisoned(arguments[name], index, value) for name, index in places.items()}
    assert_same(run(bad, cotangents), run(zeros, cotangents))


@pytest.mark.parametrize("value", POISON)
def test_keys_past_seqused(rng, value):
    arguments = qkv(rng, 2, 20, 70, 4, 2) | {"seqused_k": integers(33, 64), "causal": True}
    places = (np.array([0] * 37 + [1] * 6), np.array([*range(33, 70), *range(64, 70)]))
    assert_hidden(rng, arguments, {"k": places, "v": places}, value)


@pytest.mark.parametrize("value", POISON)
def test_queries_past_seqused_and_their_cotangents(rng, value):
    arguments = qkv(rng, 2, 40, 30, 4, 2) | {"seqused_q": integers(17, 40), "causal": True}
    clean = cotangents_of(arguments, rng)
    dirty = Cotangents(
        poisoned(clean.out, (0, slice(17, None)), value), poisoned(clean.lse, (0, slice(None), slice(17, None)), value)
    )
    bad_q = arguments | {"q": poisoned(arguments["q"], (0, slice(17, None)), value)}
    assert_same(run(bad_q, dirty), run(arguments, clean))


@pytest.mark.parametrize("value", POISON)
def test_rows_outside_cu_seqlens(rng, value):
    bounds = integers(3, 20, 30)
    arguments = {"q": normal(rng, 40, 4, 16), "k": normal(rng, 40, 2, 16), "v": normal(rng, 40, 2, 16)}
    arguments |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 17, "max_seqlen_k": 17, "causal": True}
    outside = np.array([0, 1, 2, *range(30, 40)])
    assert_hidden(rng, arguments, {"q": outside, "k": outside, "v": outside}, value)


@pytest.mark.parametrize("value", POISON)
def test_keys_before_every_window(rng, value):
    """With more keys than queries a left window leaves the first keys unseen."""
    arguments = qkv(rng, 2, 10, 90, 4, 2) | {"window_size": (5, 0)}
    unseen = (slice(None), slice(0, 75))
    assert_hidden(rng, arguments, {"k": unseen, "v": unseen}, value)


@pytest.mark.parametrize("value", POISON)
def test_keys_outside_every_chunk(rng, value):
    arguments = qkv(rng, 2, 4, 50, 4, 2) | {"attention_chunk": 16}  # queries stand at 46 to 49: keys 32 to 49
    unseen = (slice(None), slice(0, 32))
    assert_hidden(rng, arguments, {"k": unseen, "v": unseen}, value)


def test_sequences_beside_a_poisoned_one(rng):
    arguments = packed_qkv(rng, [20, 20], [25, 25]) | {"causal": True}
    cotangents = cotangents_of(arguments, rng)
    clean = run(arguments, cotangents)
    bad = {name: poisoned(arguments[name], slice(arguments[name].shape[0] // 2), np.nan) for name in ("q", "k", "v")}
    dirty = run(arguments | bad, cotangents)
    assert np.all(np.isnan(dirty.out[:20]))
    np.testing.assert_array_equal(dirty.out[20:], clean.out[20:])
    np.testing.assert_array_equal(dirty.lse[:, 20:], clean.lse[:, 20:])
    for name in ("q", "k", "v"):
        half = clean.gradients[name].shape[0] // 2
        np.testing.assert_array_equal(dirty.gradients[name][half:], clean.gradients[name][half:])


def test_a_nan_key_at_a_causally_masked_position(rng):
    arguments = qkv(rng, 1, 40, 40, 2, 1) | {"causal": True}
    cotangents = cotangents_of(arguments, rng)
    clean = run(arguments, cotangents)
    dirty = run(arguments | {"k": poisoned(arguments["k"], (0, 30), np.nan)}, cotangents)
    np.testing.assert_allclose(dirty.out[:, :30], clean.out[:, :30], atol=1e-6)
    np.testing.assert_allclose(dirty.lse[..., :30], clean.lse[..., :30], atol=1e-6)
    np.testing.assert_allclose(dirty.gradients["q"][:, :30], clean.gradients["q"][:, :30], atol=1e-5)
    assert np.all(np.isnan(dirty.out[:, 30:]))  # those that see it
    assert np.all(np.isnan(dirty.lse[..., 30:]))


@pytest.mark.parametrize("additive", [False, True])
def test_a_nan_key_hidden_by_a_mask(rng, additive):
    arguments = qkv(rng, 1, 20, 30, 2, 1)
    visible = rng.random((20, 30)) > 0.3
    visible[:, 11] = False
    mask = mx.where(mx.array(visible), 0.0, -mx.inf) if additive else mx.array(visible)
    arguments |= {"attn_mask": mask}
    clean = expected(arguments)
    dirty = run(arguments | {"k": poisoned(arguments["k"], (0, 11), np.nan)}, cotangents_of(arguments, rng))
    np.testing.assert_allclose(dirty.out, clean.out, atol=2e-5)
    np.testing.assert_allclose(dirty.lse, clean.lse, atol=2e-5)


def test_a_nan_in_the_mask_where_causal_hides_it(rng):
    arguments = qkv(rng, 1, 30, 30, 2, 1) | {"causal": True}
    clean = normal(rng, 30, 30)
    dirty = np.array(clean)
    dirty[np.triu_indices(30, 1)] = np.nan
    cotangents = cotangents_of(arguments, rng)
    assert_same(run(arguments | {"attn_mask": mx.array(dirty)}, cotangents), run(arguments | {"attn_mask": clean}, cotangents))


def test_a_nan_query_stays_in_its_row(rng):
    arguments = qkv(rng, 1, 40, 30, 2, 1)
    clean = expected(arguments)
    dirty = run(arguments | {"q": poisoned(arguments["q"], (0, 7), np.nan)}, cotangents_of(arguments, rng))
    others = np.arange(40) != 7
    np.testing.assert_allclose(dirty.out[:, others], clean.out[:, others], atol=2e-5)
    assert np.all(np.isnan(dirty.out[:, 7]))
    assert np.all(np.isnan(dirty.lse[..., 7]))


def test_a_visible_nan_value_is_not_hidden(rng):
    arguments = qkv(rng, 1, 10, 10, 2, 1)
    dirty = run(arguments | {"v": poisoned(arguments["v"], (0, 4, 0, 3), np.nan)}, cotangents_of(arguments, rng))
    assert np.all(np.isnan(dirty.out[..., 3]))
    assert np.all(np.isfinite(np.delete(dirty.out, 3, axis=-1)))
    assert np.all(np.isfinite(dirty.lse))


@pytest.mark.parametrize("value", POISON)
def test_a_cotangent_at_a_row_without_a_key(rng, value):
    arguments = qkv(rng, 1, 40, 20, 2, 1) | {"causal": True}  # rows 0 to 19 see nothing
    clean = cotangents_of(arguments, rng)
    dirty = Cotangents(
        poisoned(clean.out, (0, slice(0, 20)), value), poisoned(clean.lse, (0, slice(None), slice(0, 20)), value)
    )
    assert_same(run(arguments, dirty), run(arguments, clean))
