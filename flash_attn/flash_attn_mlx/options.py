"""What Python callers may pass, as the values that the C++ side takes. C++ checks shapes, dtypes and ranges."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import mlx.core as mx

from . import _core

_INT32_MAX = 2**31 - 1
_UNBOUNDED = -1


def wrong_type(name: str, value: object, needs: str) -> TypeError:
    return TypeError(f"[flash_attn] {name}: got {type(value).__name__}, needs {needs}")


def required_array(name: str, value: Any) -> mx.array:
    if not isinstance(value, mx.array):
        raise wrong_type(name, value, "an mx.array")
    return value


def optional_array(name: str, value: Any) -> mx.array | None:
    return None if value is None else required_array(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):  # asking numbers.Real takes far longer
        raise wrong_type(name, value, "a number")
    return float(value)


def integer(name: str, value: Any) -> int:
    """An int32; mx.array scalars are refused, since reading one would force its evaluation."""
    if isinstance(value, (bool, mx.array)):
        raise wrong_type(name, value, "an int")
    try:
        result = operator.index(value)
    except TypeError:
        raise wrong_type(name, value, "an int") from None
    if abs(result) > _INT32_MAX:
        raise ValueError(f"[flash_attn] {name}: got {result}, needs an integer of 32 bits")
    return result


def flag(name: str, value: Any) -> bool:
    if isinstance(value, mx.array):
        raise wrong_type(name, value, "a bool")
    return bool(value)


def _window(value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        raise wrong_type("window_size", value, "a pair (left, right) of ints or None")
    if len(value) != 2:
        raise ValueError(f"[flash_attn] window_size: got {len(value)} values, needs a pair (left, right)")
    left, right = (_UNBOUNDED if side is None else integer("window_size", side) for side in value)
    return left, right


def stream_of(value: Any) -> mx.Stream | mx.Device | None:
    """`stream`, checked."""
    if value is None or isinstance(value, (mx.Stream, mx.Device)):
        return value
    if isinstance(value, mx.DeviceType):
        return mx.Device(value)
    raise wrong_type("stream", value, "an mx.Stream or mx.Device")


def _drawn_key(stream: mx.Stream | mx.Device | None) -> mx.array:
    """64 bits from MLX's generator, in pieces that its randint draws evenly: it scales a float32."""
    return mx.random.randint(0, 2**16, (4,), dtype=mx.uint16, stream=stream).view(mx.uint32, stream=stream)


def required(name: str, value: Any) -> mx.array | int:
    """An argument before the options: an array, or a bound of sequence lengths."""
    return integer(name, value) if name.startswith("max_seqlen") else required_array(name, value)


def attention_options(
    *,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    alibi_slopes: mx.array | None,
    deterministic: bool,
    return_attn_probs: bool,
    learnable_sink: mx.array | None,
    attn_mask: mx.array | None,
    qv: mx.array | None,
    attention_chunk: int,
    seqused_q: mx.array | None,
    seqused_k: mx.array | None,
    dropout_key: mx.array | None,
    num_splits: int,
    return_softmax_lse: bool,
    stream: mx.Stream | mx.Device | mx.DeviceType | None,
    pack_gqa: object,
    sm_margin: object,
    scheduler_metadata: object,
    block_table: mx.array | None = None,
) -> _core.AttentionOptions:
    """The options of a call. `pack_gqa`, `sm_margin` and `scheduler_metadata` tune CUDA kernels only and are ignored."""
    dropout_p = _number("dropout_p", dropout_p)
    where = stream_of(stream)
    if 0.0 < dropout_p < 1.0 and dropout_key is None:
        dropout_key = _drawn_key(where)
    return _core.AttentionOptions(
        dropout_p=dropout_p,
        softmax_scale=None if softmax_scale is None else _number("softmax_scale", softmax_scale),
        causal=flag("causal", causal),
        window_size=_window(window_size),
        softcap=_number("softcap", softcap),
        alibi_slopes=optional_array("alibi_slopes", alibi_slopes),
        deterministic=flag("deterministic", deterministic),
        return_attn_probs=flag("return_attn_probs", return_attn_probs),
        learnable_sink=optional_array("learnable_sink", learnable_sink),
        attn_mask=optional_array("attn_mask", attn_mask),
        qv=optional_array("qv", qv),
        attention_chunk=integer("attention_chunk", attention_chunk),
        seqused_q=optional_array("seqused_q", seqused_q),
        seqused_k=optional_array("seqused_k", seqused_k),
        dropout_key=optional_array("dropout_key", dropout_key),
        num_splits=integer("num_splits", num_splits),
        block_table=optional_array("block_table", block_table),
        return_softmax_lse=flag("return_softmax_lse", return_softmax_lse),
        stream=where,
    )
