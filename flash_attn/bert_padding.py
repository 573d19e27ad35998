"""Padded batches to packed sequences and back: upstream's ``flash_attn.bert_padding`` on MLX arrays.

All functions are differentiable in ``hidden_states``. How many tokens a mask keeps decides the shape of the result, so
unpadding evaluates the mask; it cannot run inside ``mx.compile``.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

__all__ = ["pad_input", "unpad_input", "unpad_input_for_concatenated_sequences"]


def _require(condition: bool, name: str, got: object, needs: str) -> None:
    if not condition:
        raise ValueError(f"[flash_attn] {name}: got {got}, needs {needs}")


def _require_array(name: str, value: object) -> None:
    if not isinstance(value, mx.array):
        raise TypeError(f"[flash_attn] {name}: got {type(value).__name__}, needs an mx.array")


def _require_mask_of(hidden_states: mx.array, name: str, mask: mx.array) -> None:
    _require_array("hidden_states", hidden_states)
    _require_array(name, mask)
    _require(hidden_states.ndim >= 2, "hidden_states", f"shape {hidden_states.shape}", "(batch, seqlen, ...)")
    _require(mask.shape == hidden_states.shape[:2], name, f"shape {mask.shape}", f"(batch, seqlen) = {hidden_states.shape[:2]}")


def _nonzero(flags: mx.array) -> mx.array:
    """Positions of the true elements of a flat boolean array, ascending."""
    count = cast(int, mx.sum(flags).item())
    positions = mx.arange(flags.size, dtype=mx.int32)
    return mx.sort(mx.where(flags, positions, flags.size))[:count]


def _cumulative(seqlens: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum(seqlens)])


def _largest(seqlens: mx.array) -> int:
    return cast(int, mx.max(seqlens).item()) if seqlens.size else 0


def _take_tokens(hidden_states: mx.array, indices: mx.array) -> mx.array:
    return mx.take(mx.flatten(hidden_states, 0, 1), indices, axis=0)


def unpad_input(
    hidden_states: mx.array, attention_mask: mx.array, unused_mask: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array, int, mx.array]:
    """Packs the tokens that a mask keeps.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), nonzero for valid tokens.
        unused_mask: (batch, seqlen), nonzero for tokens that get a place in the packed tensor but are not used.

    Returns:
        ``(packed, indices, cu_seqlens, max_seqlen_in_batch, seqused)``: packed (total, ...); indices int32 (total,), each
        token's place in the flattened batch; cu_seqlens int32 (batch + 1,), which counts the tokens of both masks; the longest
        sequence; seqused int32 (batch,), which counts those of ``attention_mask`` only.
    """
    _require_mask_of(hidden_states, "attention_mask", attention_mask)
    used = attention_mask != 0
    placed = used
    if unused_mask is not None:
        _require_mask_of(hidden_states, "unused_mask", unused_mask)
        placed = placed | (unused_mask != 0)
    seqlens = mx.sum(placed, axis=-1).astype(mx.int32)
    seqused = mx.sum(used, axis=-1).astype(mx.int32)
    indices = _nonzero(mx.flatten(placed))
    return _take_tokens(hidden_states, indices), indices, _cumulative(seqlens), _largest(seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: mx.array, attention_mask_in_length: mx.array
) -> tuple[mx.array, mx.array, mx.array, int]:
    """Packs rows that hold several short sequences one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: int (batch, seqlen). The nonzero values of a row are the lengths of its sequences, in order:
            a row ``[2, 3, 0, 0, 0, 0]`` holds tokens ``a a b b b`` and one of padding.

    Returns:
        ``(packed, indices, cu_seqlens, max_seqlen_in_batch)``, as ``unpad_input``; every short sequence counts as one.
    """
    _require_mask_of(hidden_states, "attention_mask_in_length", attention_mask_in_length)
    lengths = attention_mask_in_length.astype(mx.int32)
    tokens_in_row = mx.sum(lengths, axis=-1, keepdims=True)
    indices = _nonzero(mx.flatten(mx.arange(lengths.shape[1]) < tokens_in_row))
    flat = mx.flatten(lengths)
    seqlens = mx.take(flat, _nonzero(flat != 0))
    return _take_tokens(hidden_states, indices), indices, _cumulative(seqlens), _largest(seqlens)


def pad_input(hidden_states: mx.array, indices: mx.array, batch: int, seqlen: int) -> mx.array:
    """Puts packed tokens back into a padded batch: the inverse of ``unpad_input``.

    Args:
        hidden_states: (total, ...).
        indices: int (total,), as ``unpad_input`` gives.
        batch: of the padded batch.
        seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...), zero where no token was packed.
    """
    _require_array("hidden_states", hidden_states)
    _require_array("indices", indices)
    _require(hidden_states.ndim >= 1, "hidden_states", f"shape {hidden_states.shape}", "(total, ...)")
    total = hidden_states.shape[:1]
    _require(indices.shape == total, "indices", f"shape {indices.shape}", f"(total,) = {total}")
    padded = mx.zeros((batch * seqlen, *hidden_states.shape[1:]), hidden_states.dtype)
    padded[indices] = hidden_states
    return mx.unflatten(padded, 0, (batch, seqlen))
