"""Decoding token by token, over a cache that fills up, equals attention over the whole sequence."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import decode, page, rope_tables
from support import DTYPES, name_of, normal, to_numpy

from flash_attn import flash_attn_func, flash_attn_with_kvcache

ROUNDING_ERROR = {mx.float32: 1e-5, mx.bfloat16: 2e-2, mx.float16: 2e-3}  # of two ways to sum values of size about 1

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def close(a: mx.array, b: mx.array, atol: float) -> None:
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=atol)


def empty_caches(rng: np.random.Generator, k: mx.array, v: mx.array, page_size: int | None) -> dict[str, Any]:
    caches = {"k_cache": mx.full(k.shape, mx.nan, k.dtype), "v_cache": mx.full(v.shape, mx.nan, v.dtype)}
    if page_size is None:
        return caches
    paged = page(rng, caches, page_size)
    del paged["cache_seqlens"]
    return paged


@each_dtype
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("options", [{}, {"window_size": (30, 0)}, {"softcap": 4.0}], ids=str)
def test_200_decoding_steps_equal_full_attention(rng, options, page_size, dtype):
    q, k, v = (normal(rng, 2, 200, h, 32, dtype=dtype) for h in (4, 2, 2))
    outs = decode(q, k, v, empty_caches(rng, k, v, page_size), range(200), **options)
    want = flash_attn_func(q, k, v, causal=True, **options)
    close(mx.concatenate(outs, axis=1), want, ROUNDING_ERROR[dtype])


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_goes_on_after_a_trim(rng, page_size):
    """A shorter length forgets tokens; the next ones take their slots."""
    q, k, v = (normal(rng, 2, 60, h, 32) for h in (4, 2, 2))
    caches = empty_caches(rng, k, v, page_size)
    mx.eval(decode(q, k + 1, v - 1, caches, range(50)))
    mx.eval(decode(q, k, v, caches, range(20)))
    mx.eval(decode(q, k - 2, v + 3, caches, range(20, 60)))
    outs = decode(q, k, v, caches, range(20, 60))
    close(mx.concatenate(outs, axis=1), flash_attn_func(q, k, v, causal=True)[:, 20:], 1e-5)


def test_a_prefill_in_pieces_equals_one_pass(rng):
    q, k, v = (normal(rng, 1, 140, h, 32) for h in (4, 2, 2))
    caches = empty_caches(rng, k, v, 16)
    outs, begin = [], 0
    for length in (64, 1, 33, 2, 40):
        piece = slice(begin, begin + length)
        outs.append(
            flash_attn_with_kvcache(q[:, piece], **caches, k=k[:, piece], v=v[:, piece], cache_seqlens=begin, causal=True)
        )
        begin += length
    close(mx.concatenate(outs, axis=1), flash_attn_func(q, k, v, causal=True), 1e-5)


def test_decoding_with_rotary_equals_full_attention_over_rotated_keys(rng):
    q, k, v = (normal(rng, 1, 50, h, 32) for h in (4, 2, 2))
    outs = decode(q, k, v, empty_caches(rng, k, v, None), range(50), **rope_tables(50, 32, 100.0))
    turned = (
        mx.fast.rope(x.transpose(0, 2, 1, 3), 32, traditional=True, base=100.0, scale=1.0, offset=0).transpose(0, 2, 1, 3)
        for x in (q, k)
    )
    close(mx.concatenate(outs, axis=1), flash_attn_func(*turned, v, causal=True), 2e-5)
