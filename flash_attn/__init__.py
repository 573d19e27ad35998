"""flash-attention's API on MLX arrays. The same functions as `flash_attn.flash_attn_mlx`."""

from .flash_attn_mlx import (
    OutOfPages,
    PagedKVCache,
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
    flash_attn_with_kvcache,
    update_paged_kv_cache,
    validate_paged_kv_params,
)
from .flash_attn_mlx._build_info import VERSION as __version__

__all__ = [
    "__version__",
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
    "validate_paged_kv_params",
    "update_paged_kv_cache",
    "OutOfPages",
    "PagedKVCache",
]
