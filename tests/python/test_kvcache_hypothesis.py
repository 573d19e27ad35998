"""Any shape, page size, heads, format of cache: hypothesis looks for a call that disagrees with the oracle."""

from __future__ import annotations

from typing import Any

import kvcache_combinations
import numpy as np
import test_kvcache_quantised as quantised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvcache_support import cache_call, check, page
from support import DTYPES

FUZZ = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)
FEATURE_SETS = st.frozensets(st.sampled_from(kvcache_combinations.FEATURES)).filter(kvcache_combinations.goes_together)

SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(1, 3),
    "seqlen_q": st.integers(0, 70),
    "capacity": st.integers(70, 200),
    "heads_k": st.integers(1, 2),
    "group": st.integers(1, 8),
    "seqlen_new": st.none() | st.integers(0, 70),
    "dtype": st.sampled_from(DTYPES),
}
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "window_size": st.tuples(st.integers(-1, 200), st.integers(-1, 200)),
        "num_splits": st.integers(0, 20),
    },
)
PAGE_SIZES = st.none() | st.integers(1, 130)


def arguments_of(
    rng: np.random.Generator, shape: dict[str, Any], options: dict[str, Any], page_size: int | None, dim: int, dim_v: int
) -> dict[str, Any]:
    shape = dict(shape)
    heads = shape["heads_k"] * shape.pop("group")
    arguments = cache_call(rng, heads=heads, dim=dim, dim_v=dim_v, **shape) | options
    return page(rng, arguments, page_size) if page_size else arguments


@FUZZ
@given(seed=SEEDS, features=FEATURE_SETS, dtype=st.sampled_from(DTYPES))
def test_any_features(seed, features, dtype):
    check(kvcache_combinations.build(np.random.default_rng(seed), features, dtype))


@FUZZ
@given(
    seed=SEEDS,
    shape=st.fixed_dictionaries(SHAPES),
    options=OPTIONS,
    page_size=PAGE_SIZES,
    dim=st.integers(1, 200),
    dim_v=st.integers(1, 200),
)
def test_any_shape(seed, shape, options, page_size, dim, dim_v):
    check(arguments_of(np.random.default_rng(seed), shape, options, page_size, dim, dim_v))


@FUZZ
@given(
    seed=SEEDS,
    shape=st.fixed_dictionaries(SHAPES),
    options=OPTIONS,
    page_size=PAGE_SIZES,
    groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    format_=st.sampled_from(quantised.FORMATS),
)
def test_any_quantised_shape(seed, shape, options, page_size, groups, format_):
    arguments = arguments_of(np.random.default_rng(seed), shape, options, page_size, *(64 * n for n in groups))
    quantised.check(quantised.quantised(arguments, format_))
