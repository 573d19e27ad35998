"""flash-attention's functions: upstream v2's names, order and defaults, then keyword-only extras.

Source: Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py (v2); the extras are those of v3 (hopper) and v4 (cute).
Everything is lazy and differentiable in q, k, v, attn_mask and learnable_sink, through the output and through the LSE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

from . import _core
from .options import attention_options

Window: TypeAlias = "tuple[int | None, int | None]"
StreamOrDevice: TypeAlias = "mx.Stream | mx.Device | mx.DeviceType | None"
Attention: TypeAlias = Any  # out; (out, lse) with return_softmax_lse; (out, lse, S_dmask) with return_attn_probs
Result = TypeVar("Result")

_PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _call(function: Callable[..., Result], arguments: tuple[str, ...], given: dict[str, Any]) -> Result:
    """`function` of the named arguments and of the options: everything else that the caller was `given`, its locals()."""
    values = [given.pop(name) for name in arguments]
    return function(*values, attention_options(given))


def wanted_results(results: _core.Results, *, return_softmax_lse: bool, return_attn_probs: bool = False) -> Attention:
    """What a caller asked for, of (out, lse, S_dmask, route)."""
    out, lse, S_dmask, _ = results
    if return_attn_probs:
        return out, lse, S_dmask
    if return_softmax_lse:
        return out, lse
    return out


def _attention(function: Callable[..., _core.Results], arguments: tuple[str, ...], given: dict[str, Any]) -> Attention:
    results = _call(function, arguments, given)
    return wanted_results(results, return_softmax_lse=given["return_softmax_lse"], return_attn_probs=given["return_attn_probs"])


def flash_attn_func(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """softmax(softmax_scale * q k^T, masked) v for dense batches, without ever holding the scores.

    Args:
        q: (batch, seqlen_q, heads, head_dim); float32, bfloat16 or float16, the same for q, k and v. head_dim 1 to 576. Any
            strides: views are read in place.
        k: (batch, seqlen_k, heads_k, head_dim). heads must be a multiple of heads_k: query head h reads kv head
            h // (heads // heads_k) (grouped-query attention).
        v: (batch, seqlen_k, heads_k, head_dim_v).
        dropout_p: chance in [0, 1) that a probability is dropped; the others are scaled by 1 / (1 - dropout_p).
        softmax_scale: factor of q.k; None is head_dim ** -0.5, with qv (head_dim + head_dim_v) ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q: the last query sees every key.
        window_size: (left, right), how many keys before and after that diagonal are visible; negative or None: all of them.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        alibi_slopes: float32 (heads,) or (batch, heads): adds -slope * |i + seqlen_k - seqlen_q - j| to the score of query i
            and key j. No gradient.
        deterministic: accepted; the backward pass always is.
        return_attn_probs: also return the LSE and S_dmask.
        learnable_sink: (heads,), floating: exp(sink) joins each row's denominator.
        attn_mask: bool (True: visible) or floating (added to the score), broadcastable to (batch, heads, seqlen_q, seqlen_k);
            never expanded in memory.
        qv: q's shape with head_dim_v: the score becomes softmax_scale * (q.k + qv.v) (absorbed multi-head latent attention).
        attention_chunk: a query sees only keys of its own chunk of so many; 0: off.
        seqused_q, seqused_k: int32 (batch,): the tokens in use of each sequence, counted from its start.
        dropout_key: uint32 (2,), as mx.random.key gives: the same key, the same mask. None draws one from mx.random; then
            mx.compile needs inputs=mx.random.state and outputs=mx.random.state, and under mx.checkpoint, which runs the
            function twice, a key must be passed.
        num_splits: parts of the keys that are computed apart and combined, where few queries meet many keys; 0: by shape.
        return_softmax_lse: also return the LSE.
        stream: where to compute; None is MLX's default.
        pack_gqa, sm_margin, scheduler_metadata: accepted and ignored, they tune CUDA kernels.

    Returns:
        out, q's shape with head_dim_v and q's dtype. A row that sees no key is 0.
        With return_softmax_lse (out, lse): lse float32 (batch, heads, seqlen_q), natural log, before dropout; -inf for a row
        that sees no key.
        With return_attn_probs (out, lse, S_dmask): S_dmask holds the probabilities in q's dtype, (batch, heads, seqlen_q,
        seqlen_k), negative where dropped; its shape is (0,) when dropout_p is 0.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: another shape or a value out of range; the message names the argument, what it got and what it needs.

    Example:
        >>> q, k, v = (mx.random.normal((1, 128, 8, 64)) for _ in range(3))
        >>> out = flash_attn_func(q, k, v, causal=True)
        >>> out = flash_attn_func(q, k, v, dropout_p=0.1, dropout_key=mx.random.key(0))
    """
    return _attention(_core.flash_attn_func, ("q", "k", "v"), locals())


def flash_attn_qkvpacked_func(
    qkv: mx.array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """flash_attn_func with q, k and v in one tensor, read as views.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim).

    Other arguments, results and errors: flash_attn_func.
    """
    return _attention(_core.flash_attn_qkvpacked_func, ("qkv",), locals())


def flash_attn_kvpacked_func(
    q: mx.array,
    kv: mx.array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """flash_attn_func with k and v in one tensor, read as views.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim).

    Other arguments, results and errors: flash_attn_func.
    """
    return _attention(_core.flash_attn_kvpacked_func, ("q", "kv"), locals())


def flash_attn_varlen_func(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: mx.array | None = None,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """Attention of sequences of different lengths, packed one after another without padding.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_k, head_dim).
        v: (total_k, heads_k, head_dim_v).
        cu_seqlens_q: int32 (batch + 1,): sequence b owns rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: int32 (batch + 1,): the same for k and v.
        max_seqlen_q, max_seqlen_k: bounds of every sequence's length. Values of cu_seqlens are checked when they are already
            computed; else what exceeds the tensor or these bounds is not read.
        attn_mask: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k); positions count within a sequence.
        block_table: int32 (batch, blocks): k and v are then pages (pages, page_size, heads_k, head_dim), key j of sequence b is
            row j % page_size of page block_table[b, j // page_size]; cu_seqlens_k says how many keys each has, or seqused_k.
            An entry of -1 hides its keys. Forward only.

    Returns:
        As flash_attn_func, with lse (heads, total_q) and S_dmask (batch, heads, max_seqlen_q, max_seqlen_k). Rows of no
        sequence have out 0 and lse -inf.

    Raises:
        NotImplementedError: a gradient is asked for, and block_table is given.

    Other arguments and errors: flash_attn_func.
    """
    return _attention(_core.flash_attn_varlen_func, ("q", "k", "v", *_PACKING), locals())


def flash_attn_varlen_qkvpacked_func(
    qkv: mx.array,
    cu_seqlens: mx.array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """flash_attn_varlen_func with q, k and v in one tensor, read as views.

    Args:
        qkv: (total, 3, heads, head_dim).
        cu_seqlens: int32 (batch + 1,): sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: bound of every sequence's length.

    Other arguments, results and errors: flash_attn_varlen_func.
    """
    return _attention(_core.flash_attn_varlen_qkvpacked_func, ("qkv", "cu_seqlens", "max_seqlen"), locals())


def flash_attn_varlen_kvpacked_func(
    q: mx.array,
    kv: mx.array,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
) -> Attention:
    """flash_attn_varlen_func with k and v in one tensor, read as views.

    Args:
        q: (total_q, heads, head_dim).
        kv: (total_k, 2, heads_k, head_dim).

    Other arguments, results and errors: flash_attn_varlen_func.
    """
    return _attention(_core.flash_attn_varlen_kvpacked_func, ("q", "kv", *_PACKING), locals())


def flash_attention_mlx(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
    block_table: mx.array | None = None,
) -> Attention:
    """The routed entry point: our kernel, MLX's own SDPA where that is faster and means the same, or the reference.

    FLASH_ATTENTION_MLX_REF=1 forces the reference, FLASH_ATTENTION_MLX_ROUTE (auto, sdpa, kernel) overrides the choice; both
    are read at every call. Arguments, results and errors: flash_attn_func. With block_table, int32 (batch, blocks), k and v are
    pages (pages, page_size, heads_k, head_dim), and seqused_k says how many keys each sequence has (None: all); no gradient.
    """
    return _attention(_core.flash_attn_func, ("q", "k", "v"), locals())


def _route(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
    block_table: mx.array | None = None,
) -> tuple[str, str]:
    """Where flash_attention_mlx would send this call, and why: ("kernel" | "sdpa" | "reference", reason)."""
    return _call(_core.route, ("q", "k", "v"), locals())


def _can_use_mlx_sdpa(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: mx.array | None = None,
    attn_mask: mx.array | None = None,
    qv: mx.array | None = None,
    attention_chunk: int = 0,
    seqused_q: mx.array | None = None,
    seqused_k: mx.array | None = None,
    dropout_key: mx.array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    stream: StreamOrDevice = None,
    pack_gqa: object = None,
    sm_margin: object = None,
    scheduler_metadata: object = None,
    block_table: mx.array | None = None,
) -> bool:
    """Whether mx.fast.scaled_dot_product_attention could compute this call with the same meaning, on any backend."""
    return _call(_core.can_use_mlx_sdpa, ("q", "k", "v"), locals())


def flash_attn_combine(
    out_partial: mx.array,
    lse_partial: mx.array,
    out_dtype: mx.Dtype | None = None,
    *,
    stream: StreamOrDevice = None,
) -> tuple[mx.array, mx.array]:
    """Merges attention over disjoint parts of the keys by their LSE (flash-attention v3's flash_attn_combine).

    Args:
        out_partial: (splits, batch, seqlen, heads, dim), floating.
        lse_partial: float32 (splits, batch, seqlen, heads), natural log; -inf marks an empty part, whose output is not read.
        out_dtype: of the result; None is float32.
        stream: where to compute; None is MLX's default.

    Returns:
        out (batch, seqlen, heads, dim) and lse float32 (batch, seqlen, heads). Where every part is empty, out is 0, lse -inf.

    Raises:
        TypeError, ValueError: as flash_attn_func.
    """
    return _core.flash_attn_combine(out_partial, lse_partial, out_dtype, stream)
