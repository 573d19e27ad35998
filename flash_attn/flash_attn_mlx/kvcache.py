"""Attention over a KV cache that changes in place: flash_attn_with_kvcache, v2's arguments, then v3's as extras."""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx

from . import _core
from .interface import Attention, StreamOrDevice, Window, wanted_results
from .options import attention_options

# In q's dtype, or int8 with k_scale and v_scale; or MLX's triple of codes, scales and biases, as mx.quantize gives.
Cache: TypeAlias = "mx.array | tuple[mx.array, mx.array, mx.array]"


def _block_table(block_table: Any, page_table: Any) -> Any:
    if block_table is not None and page_table is not None:
        raise ValueError("[flash_attn] page_table: got an array, needs None: it is another name of block_table")
    return page_table if block_table is None else block_table


def flash_attn_with_kvcache(
    q: mx.array,
    k_cache: Cache,
    v_cache: Cache,
    k: mx.array | None = None,
    v: mx.array | None = None,
    rotary_cos: mx.array | None = None,
    rotary_sin: mx.array | None = None,
    cache_seqlens: int | mx.array | None = None,
    cache_batch_idx: mx.array | None = None,
    cache_leftpad: mx.array | None = None,
    block_table: mx.array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    cu_seqlens_q: mx.array | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: mx.array | None = None,
    rotary_seqlens: mx.array | None = None,
    page_table: mx.array | None = None,
    k_scale: mx.array | None = None,
    v_scale: mx.array | None = None,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """Appends k and v to the caches, then attends q over all that each sequence holds.

    The caches change in place: at the call k_cache and v_cache are made to refer to the result, and at evaluation new tokens
    are written into the memory they have; no copy is made, however many steps are queued before one evaluation. A slice taken
    before keeps its old values and costs one copy. Under mx.compile the caches must be inputs of the function, and returned by
    it.

    Args:
        q: (batch, seqlen_q, heads, head_dim); with cu_seqlens_q (total_q, heads, head_dim). float32, bfloat16 or float16.
        k_cache: (batch, capacity, heads_k, head_dim), or with block_table pages (pages, page_size, heads_k, head_dim). In q's
            dtype; or int8 with k_scale; or a triple (codes, scales, biases) as mx.quantize(.., group_size=64, bits=8 or 4)
            gives.
        v_cache: the same with head_dim_v.
        k, v: (batch, seqlen_new, heads_k, head_dim) in q's dtype, written at slots cache_seqlens and on before attention; None:
            no append. What is quantised is quantised after the rotation.
        rotary_cos, rotary_sin: (rows, rotary_dim / 2) in q's dtype, a row for every slot; rotary_dim a multiple of 16. New key
            t turns by row cache_seqlens + t. Query i by row cache_seqlens + i when causal or windowed, else by row
            cache_seqlens.
        cache_seqlens: int32 (batch,) or an int: slots in use before the append; None: all.
        cache_batch_idx: int32 (batch,): the row of the caches, or of block_table, of each sequence; None: in order.
        cache_leftpad: int32 (batch,): slots before a sequence's first key.
        block_table: int32 (batch, blocks): slot s is row s % page_size of page block_table[b, s // page_size]. Keys of an entry
            of -1 are invisible, and what is appended to it is dropped. Long sequences are read in the order of their pages in
            memory on a CPU: which pages they have changes how a result is rounded.
        rotary_interleaved: pairs (0, 1), (2, 3), ..; else (t, t + rotary_dim / 2).
        num_splits: parts of the keys that are computed apart and combined; 0: by shape, 1: none.
        cu_seqlens_q, max_seqlen_q: int32 (batch + 1,) and a bound: q is packed.
        cu_seqlens_k_new: int32 (batch + 1,): k and v are packed, (total_new, heads_k, head_dim).
        rotary_seqlens: int32 (batch,): in place of cache_seqlens in the rotation.
        page_table: another name of block_table.
        k_scale, v_scale: float32, the shape of the cache without its last axis: x = code * scale. Changed in place too.
            On an x86-64 CPU, few 16-bit queries are rounded to 15 bits of their largest element before they meet int8
            keys, and probabilities to 15 bits of a block's largest; so too before a triple's, in the avx512_bf16 and
            avx512_amx kernels. float32 queries are not.
        softmax_scale, causal, window_size, softcap, alibi_slopes, learnable_sink, qv, attention_chunk, stream, pack_gqa,
            sm_margin, scheduler_metadata: as in flash_attn_func, aligned to the end of each sequence's keys.

    Returns:
        out, q's shape with head_dim_v. With return_softmax_lse (out, lse): lse float32 (batch, heads, seqlen_q), with
        cu_seqlens_q (heads, total_q).

    Raises:
        TypeError, ValueError: another type, dtype, shape or value; values of arrays that are not evaluated yet are not checked:
            what they lead outside of the caches is not read, and not written.
        NotImplementedError: a gradient is asked for.
    """
    options = attention_options(
        {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "learnable_sink": learnable_sink,
            "qv": qv,
            "attention_chunk": attention_chunk,
            "num_splits": num_splits,
            "return_softmax_lse": return_softmax_lse,
            "stream": stream,
            "pack_gqa": pack_gqa,
            "sm_margin": sm_margin,
            "scheduler_metadata": scheduler_metadata,
            "block_table": _block_table(block_table, page_table),
        }
    )
    results = _core.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        options,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return wanted_results(results, return_softmax_lse=return_softmax_lse)
