"""Any shape, any strides, any dtype, any set of features: hypothesis looks for a call that disagrees with the oracle."""

from __future__ import annotations

import combinations
import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, check, qkv

FUZZ = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)
# A call has one mask, additive or boolean.
FEATURE_SETS = st.frozensets(st.sampled_from(combinations.FEATURES)).filter(
    lambda f: not {"additive_mask", "boolean_mask"} <= f
)


@FUZZ
@given(seed=SEEDS, features=FEATURE_SETS, dtype=st.sampled_from(DTYPES))
def test_any_features(seed, features, dtype):
    rng = np.random.default_rng(seed)
    check(combinations.build(rng, features, dtype), rng)


@FUZZ
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    seqlen_q=st.integers(1, 90),
    seqlen_k=st.integers(1, 90),
    heads_k=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.integers(1, 100),
    dim_v=st.integers(1, 100),
    causal=st.booleans(),
    window_size=st.tuples(st.integers(-1, 100), st.integers(-1, 100)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(seed, batch, seqlen_q, seqlen_k, heads_k, group, dim, dim_v, causal, window_size, dtype):
    rng = np.random.default_rng(seed)
    arguments = qkv(rng, batch, seqlen_q, seqlen_k, heads_k * group, heads_k, dim, dim_v, dtype)
    check(arguments | {"causal": causal, "window_size": window_size}, rng)


@st.composite
def layouts(draw):
    """An order of the four axes in memory, and a step and an offset along each."""
    return draw(st.permutations(range(4))), draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)), draw(st.integers(0, 2))


def laid_out(x: mx.array, layout) -> mx.array:
    """The same values with other strides."""
    order, steps, offset = layout
    inverse = [order.index(axis) for axis in range(4)]
    sizes = [offset + size * step for size, step in zip(x.shape, steps, strict=True)]
    room = mx.full([sizes[axis] for axis in order], mx.nan, x.dtype).transpose(inverse)
    index = tuple(slice(offset, None, step) for step in steps)
    room[index] = x
    mx.eval(room)
    return room[index]


@FUZZ
@given(seed=SEEDS, q_layout=layouts(), k_layout=layouts(), v_layout=layouts(), dtype=st.sampled_from(DTYPES))
def test_any_strides(seed, q_layout, k_layout, v_layout, dtype):
    rng = np.random.default_rng(seed)
    arguments = qkv(rng, 2, 19, 23, 4, 2, 24, 16, dtype)
    for name, layout in (("q", q_layout), ("k", k_layout), ("v", v_layout)):
        arguments[name] = laid_out(arguments[name], layout)
    check(arguments | {"causal": True}, rng)
