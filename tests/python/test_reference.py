"""The reference, forced by FLASH_ATTENTION_MLX_REF=1, meets the same oracle as the kernels."""

from __future__ import annotations

import combinations
import mlx.core as mx
import numpy as np
import pytest
from support import DTYPES, check, integers, name_of, normal, packed_qkv, qkv

from flash_attn import _route, flash_attn_func


@pytest.fixture(autouse=True)
def force_reference(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1")


def test_the_variable_forces_it(rng):
    assert _route(*qkv(rng).values())[0] == "reference"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 70), (70, 1), (33, 50), (50, 33)])
def test_sequence_lengths(rng, seqlen_q, seqlen_k, dtype):
    check(qkv(rng, 2, seqlen_q, seqlen_k, 4, 2, 40, 24, dtype=dtype) | {"causal": True}, rng)


@pytest.mark.parametrize("features", combinations.sample(80, seed=11), ids=combinations.name_of)
def test_features_combine(rng, features):
    check(combinations.build(rng, features), rng)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([0, 5, 0], [3, 0, 2]), ([4, 0, 9], [0, 0, 0]), ([0, 0], [0, 0])])
def test_empty_sequences(rng, lengths_q, lengths_k):
    check(packed_qkv(rng, lengths_q, lengths_k) | {"learnable_sink": normal(rng, 4)}, rng)


def test_rows_outside_every_sequence(rng):
    q, k = normal(rng, 30, 4, 16), normal(rng, 30, 2, 16)
    bounds = {"cu_seqlens_q": integers(5, 12, 20), "cu_seqlens_k": integers(0, 12, 20)}
    check({"q": q, "k": k, "v": k, **bounds, "max_seqlen_q": 8, "max_seqlen_k": 12}, rng)


@pytest.mark.parametrize("size", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty_tensors(rng, size):
    batch, seqlen_q, seqlen_k = size
    arguments = qkv(rng, batch, seqlen_q, seqlen_k or 1)
    if seqlen_k == 0:
        arguments |= {name: arguments[name][:, :0] for name in ("k", "v")}
    check(arguments | {"learnable_sink": normal(rng, 4)}, rng)


def test_second_derivatives_exist(rng):
    q, k, v = qkv(rng, 1, 5, dim=4).values()

    def squared_slope(q):
        return (mx.grad(lambda q: (flash_attn_func(q, k, v, causal=True) ** 2).sum())(q) ** 2).sum()

    gradient = np.array(mx.grad(squared_slope)(q))
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
