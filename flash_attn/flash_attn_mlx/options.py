"""The options of a call, as the C++ side takes them. It checks types, too."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import _core


def _drawn_key(stream: mx.Stream | mx.Device | mx.DeviceType | None) -> mx.array:
    """64 bits from MLX's generator, in pieces that its randint draws evenly: it scales a float32."""
    return mx.random.randint(0, 2**16, (4,), dtype=mx.uint16, stream=stream).view(mx.uint32, stream=stream)


def attention_options(given: dict[str, Any]) -> _core.AttentionOptions:
    options = _core.AttentionOptions(**given)
    if options.lacks_dropout_key:
        options.dropout_key = _drawn_key(given["stream"])
    return options
