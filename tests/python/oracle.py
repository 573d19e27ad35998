"""Attention and its gradients in numpy float64, written from the formulas and from nothing of the package.

Every sequence is cut out of its batch and computed alone, so padding, packing and lengths cannot leak into the arithmetic.
With `rounding` set to a 16-bit type, each tensor that a composition of framework ops would store is rounded to that type: the
"same-precision reference" against which upstream measures a kernel's error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Rounding = Callable[[Array], Array]


def exact(x: Array) -> Array:
    return x


def to_float16(x: Array) -> Array:
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even, by the usual integer trick on float32."""
    single = np.ascontiguousarray(x, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(single), rounded.view(np.float32), single).astype(np.float64)


# ---- which keys a query sees


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int], attention_chunk: int) -> Array:
    """bool (seqlen_q, seqlen_k), aligned so that the last query meets the last key."""
    diagonal = np.arange(seqlen_q, dtype=np.int64)[:, None] + seqlen_k - seqlen_q
    key = np.arange(seqlen_k, dtype=np.int64)[None, :]
    left, right = window_size
    if causal:
        right = 0
    mask = np.ones((seqlen_q, seqlen_k), bool)
    if left >= 0:
        mask &= key >= diagonal - left
    if right >= 0:
        mask &= key <= diagonal + right
    if attention_chunk > 0:
        begin = diagonal // attention_chunk * attention_chunk
        mask &= (key >= begin) & (key < begin + attention_chunk)
    return mask


# ---- dropout: upstream's map of Philox bytes to scores, and our dithered threshold

LOW_WORD = np.uint64(0xFFFFFFFF)


def _times(a: Array, b: int) -> Array:
    return (a.astype(np.uint64) * np.uint64(b)) & LOW_WORD


def _philox(counter: list[Array], key: list[int]) -> list[Array]:
    """Philox4x32 with 7 rounds on words kept in uint64."""
    for _ in range(7):
        a = counter[0] * np.uint64(0xD2511F53)
        b = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (b >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            b & LOW_WORD,
            (a >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            a & LOW_WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def dropout_keep(key: Array, dropout_p: float, heads: Array, seqlen_q: int, seqlen_k: int) -> Array:
    """bool (len(heads), seqlen_q, seqlen_k); `heads` are positions among all the call's heads, batch * heads_q + head.

    A Philox call serves rows r and r + 8 of a tile and eight of its columns, so calls are made once for each of
    (head, tile row and r % 8, tile column and pair), and every element then picks its byte.
    """
    key_x, key_y = (int(word) for word in np.asarray(key))
    row, column = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    r, c = row % 16, column % 32

    call_row = np.arange(8 * -(-seqlen_q // 16), dtype=np.uint64)[None, :, None]
    call_column = np.arange(4 * -(-seqlen_k // 32), dtype=np.uint64)[None, None, :]
    lane = call_row % 8 * 4 + call_column % 4
    row_tile, column_tile = call_row // 8, call_column // 4
    counter = np.asarray(heads, np.uint64)[:, None, None] * np.uint64(32) + lane
    shape = counter.shape
    words = _philox(
        [counter, np.zeros(shape, np.uint64), np.broadcast_to(row_tile, shape), np.broadcast_to(column_tile, shape)],
        [key_x, key_y],
    )

    hash_ = np.uint64(key_x) ^ _times(counter, 0x9E3779B9)
    hash_ = _times(hash_ ^ (hash_ >> np.uint64(16)), 0x85EBCA6B)
    hash_ = hash_ ^ ((_times(row_tile, 0xC2B2AE35) + np.uint64(key_y)) & LOW_WORD)
    hash_ = _times(hash_ ^ (hash_ >> np.uint64(13)), 0x27D4EB2F)
    hash_ = hash_ ^ _times(column_tile, 0x165667B1)
    hash_ = _times(hash_ ^ (hash_ >> np.uint64(15)), 0xC2B2AE35)
    keep_24 = np.uint64(int(np.floor(2.0**24 * (1.0 - dropout_p))))
    threshold = (keep_24 + (hash_ >> np.uint64(16))) >> np.uint64(16)

    byte = (c // 16) * 8 + ((c // 8) % 2) * 4 + (r // 8) * 2 + c % 2
    call = (slice(None), row // 16 * 8 + r % 8, column // 32 * 4 + c % 8 // 2)
    word = np.stack(words)[byte // 4, :, call[1], call[2]]  # (seqlen_q, seqlen_k, heads)
    value = (np.moveaxis(word, -1, 0) >> (byte % 4 * 8).astype(np.uint64)) & np.uint64(255)
    return value < threshold[call]


# ---- one sequence: q (heads, seqlen_q, d), k and v already repeated to as many heads


@dataclass
class _Sequence:
    scale: float
    softcap: float
    visible: Array  # (heads or 1, seqlen_q, seqlen_k)
    bias: Array  # ALiBi and additive mask together
    sink: Array | None  # (heads,)
    keep: Array | None
    dropout_p: float
    rounding: Rounding


@dataclass
class _Forward:
    out: Array
    lse: Array
    probabilities: Array
    softcap_tanh: Array


def _forward(q: Array, k: Array, v: Array, s: _Sequence) -> _Forward:
    r = s.rounding
    scores = r(q @ r(k * s.scale).swapaxes(1, 2))
    tanh = np.zeros_like(scores)
    if s.softcap > 0:
        tanh = r(np.tanh(r(scores / s.softcap)))
        scores = r(tanh * s.softcap)
    scores = np.where(s.visible, r(np.where(s.visible, scores + s.bias, 0.0)), -np.inf)
    maximum = scores.max(-1, initial=-np.inf)
    if s.sink is not None:
        maximum = np.maximum(maximum, s.sink[:, None])
    finite = np.where(np.isneginf(maximum), 0.0, maximum)
    weights = np.exp(scores - finite[..., None])
    total = weights.sum(-1)
    if s.sink is not None:
        total = total + np.exp(s.sink[:, None] - finite)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, finite + np.log(total))
    p = r(weights / np.where(total == 0, 1.0, total)[..., None])
    out = r(_dropped(p, s) @ v)
    return _Forward(out, lse, p, tanh)


def _dropped(x: Array, s: _Sequence) -> Array:
    return x if s.keep is None else s.rounding(np.where(s.keep, x, 0.0) / (1.0 - s.dropout_p))


@dataclass
class _Backward:
    dq: Array
    dk: Array
    dv: Array
    dscore: Array  # of the score after softcap: the additive mask's gradient
    dsink: Array


def _backward(q: Array, k: Array, v: Array, s: _Sequence, forward: _Forward, dout: Array, dlse: Array) -> _Backward:
    r = s.rounding
    p = forward.probabilities
    dv = r(_dropped(p, s).swapaxes(1, 2) @ dout)
    dp = _dropped(r(dout @ v.swapaxes(1, 2)), s)
    d = (p * dp).sum(-1) - dlse
    dscore = r(p * (dp - d[..., None]))
    ds = r(dscore * (1.0 - forward.softcap_tanh**2)) if s.softcap > 0 else dscore
    dq = r(ds @ r(k * s.scale))
    dk = r(r(ds.swapaxes(1, 2) @ q) * s.scale)
    dsink = np.zeros(q.shape[0])
    if s.sink is not None:
        with np.errstate(invalid="ignore"):
            weight = np.where(np.isneginf(forward.lse), 0.0, np.exp(s.sink[:, None] - forward.lse))
        dsink = -(weight * d).sum(-1)
    return _Backward(dq, dk, dv, dscore, dsink)


# ---- the call


@dataclass
class Result:
    out: Array
    lse: Array
    probabilities: Array  # (batch, heads, max_seqlen_q, max_seqlen_k), negative where dropped
    gradients: dict[str, Array] = field(default_factory=dict)


@dataclass
class _Slot:
    """Where one sequence lies: an index that gives [length, heads, dim] of a tensor."""

    index: Any
    length: int


def _slots(batch: int, max_seqlen: int, cu_seqlens: Array | None, seqused: Array | None) -> list[_Slot]:
    slots = []
    for b in range(batch):
        begin, end = (0, max_seqlen) if cu_seqlens is None else (int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        length = min(end - begin, max_seqlen)
        if seqused is not None:
            length = min(length, int(seqused[b]))
        rows = slice(begin, begin + length)
        slots.append(_Slot((b, rows) if cu_seqlens is None else rows, length))
    return slots


def _sum_to_shape(x: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting `shape` to x's shape."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return x.sum(axes, keepdims=True) if axes else x


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    dout: Array | None = None,
    dlse: Array | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    learnable_sink: Array | None = None,
    attn_mask: Array | None = None,
    qv: Array | None = None,
    attention_chunk: int = 0,
    dropout_key: Array | None = None,
    dropout_heads: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    rounding: Rounding = exact,
) -> Result:
    """Dense (batch, seq, heads, dim) or, with cu_seqlens, packed (total, heads, dim). Gradients when `dout` is given.

    `dropout_heads` (batch, heads) is for a call cut out of a larger one: where its heads stood there.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    joined_q, joined_k = q, k
    if qv is not None:
        joined_q = np.concatenate([q, np.asarray(qv, np.float64)], -1)
        joined_k = np.concatenate([k, v], -1)
    heads, heads_k = q.shape[-2], k.shape[-2]
    group = heads // heads_k
    scale = joined_q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    varlen = cu_seqlens_q is not None
    if varlen:
        batch = len(cu_seqlens_q) - 1
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
    else:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    slots_q = _slots(batch, max_seqlen_q, cu_seqlens_q, seqused_q)
    slots_k = _slots(batch, max_seqlen_k, cu_seqlens_k, seqused_k)

    full = (batch, heads, max_seqlen_q, max_seqlen_k)
    mask = None
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        expanded_mask = np.broadcast_to(mask, full)
    slopes = None if alibi_slopes is None else np.broadcast_to(np.asarray(alibi_slopes, np.float64), (batch, heads))
    sink = None if learnable_sink is None else np.asarray(learnable_sink, np.float64)

    if dropout_heads is None:
        dropout_heads = np.arange(batch * heads).reshape(batch, heads)

    out = np.zeros(q.shape[:-1] + v.shape[-1:])
    lse_rows = np.full(q.shape[:-1], -np.inf)  # heads last, as q; turned at the end
    probabilities = np.zeros(full)
    dq, dk, dv = np.zeros(joined_q.shape), np.zeros(joined_k.shape), np.zeros(v.shape)
    dmask, dsink = np.zeros(full), np.zeros(heads)
    if dout is not None:
        dout = np.asarray(dout, np.float64)
        dlse_rows = np.zeros(q.shape[:-1])
        if dlse is not None:
            dlse_rows = np.asarray(dlse, np.float64).swapaxes(-1, -2)

    for b, (slot_q, slot_k) in enumerate(zip(slots_q, slots_k, strict=True)):
        sq, sk = slot_q.length, slot_k.length
        heads_first_q = joined_q[slot_q.index].swapaxes(0, 1)
        heads_first_k, heads_first_v = (np.repeat(x[slot_k.index].swapaxes(0, 1), group, 0) for x in (joined_k, v))
        seen = visible(sq, sk, causal, window_size, attention_chunk)[None]
        bias = np.zeros((1, sq, sk))
        if slopes is not None:
            bias = bias - slopes[b][:, None, None] * np.abs(np.arange(sq)[:, None] + sk - sq - np.arange(sk))
        if mask is not None:
            part = expanded_mask[b, :, :sq, :sk]
            if part.dtype == np.bool_:
                seen = seen & part
            else:
                seen = seen & ~np.isneginf(part)
                bias = bias + np.where(seen, part, 0.0)
        keep = dropout_keep(dropout_key, dropout_p, dropout_heads[b], sq, sk) if dropout_p > 0 else None
        sequence = _Sequence(scale, softcap, seen, bias, sink, keep, dropout_p, rounding)
        forward = _forward(heads_first_q, heads_first_k, heads_first_v, sequence)
        out[slot_q.index] = forward.out.swapaxes(0, 1)
        lse_rows[slot_q.index] = forward.lse.T
        signed = forward.probabilities if keep is None else np.where(keep, forward.probabilities, -forward.probabilities)
        probabilities[b, :, :sq, :sk] = signed
        if dout is None:
            continue
        backward = _backward(
            heads_first_q,
            heads_first_k,
            heads_first_v,
            sequence,
            forward,
            dout[slot_q.index].swapaxes(0, 1),
            dlse_rows[slot_q.index].T,
        )
        dq[slot_q.index] = backward.dq.swapaxes(0, 1)
        for target, part in ((dk, backward.dk), (dv, backward.dv)):
            per_kv_head = part.reshape(heads_k, group, *part.shape[1:]).sum(1)
            target[slot_k.index] = rounding(per_kv_head).swapaxes(0, 1)
        dmask[b, :, :sq, :sk] = backward.dscore
        dsink += backward.dsink

    result = Result(out, lse_rows.swapaxes(-1, -2), probabilities)
    if dout is not None:
        d = q.shape[-1]
        result.gradients = {"q": dq[..., :d], "k": dk[..., :d], "v": dv}
        if qv is not None:
            result.gradients |= {"qv": dq[..., d:], "v": dv + dk[..., d:]}
        if mask is not None and mask.dtype != np.bool_:
            result.gradients["attn_mask"] = _sum_to_shape(dmask, mask.shape).reshape(np.shape(attn_mask))
        if sink is not None:
            result.gradients["learnable_sink"] = dsink
    return result
