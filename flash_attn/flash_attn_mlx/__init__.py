"""flash-attention for MLX: upstream's functions on MLX arrays."""

from .utils import load_core, validate_paged_kv_params, warn_if_upstream_is_installed

warn_if_upstream_is_installed()
load_core()

from .interface import (  # noqa: E402  (only after the compiled module is known to work)
    _can_use_mlx_sdpa,
    _route,
    flash_attention_mlx,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache  # noqa: E402
from .paged_cache import OutOfPages, PagedKVCache, update_paged_kv_cache  # noqa: E402

__all__ = [
    "_can_use_mlx_sdpa",
    "_route",
    "flash_attention_mlx",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "OutOfPages",
    "PagedKVCache",
    "update_paged_kv_cache",
    "validate_paged_kv_params",
]
