"""Loading the compiled module, and saying plainly what is wrong when it does not fit the installed MLX."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

_core: ModuleType | None = None


def _import_error(problem: str, needed: str | None) -> ImportError:
    if needed is None:
        return ImportError(
            f"flash_attn (flash-attn-mlx): {problem}. Install it anew: pip install --force-reinstall flash-attn-mlx"
        )
    package = f"'mlx[cpu]=={needed}'" if sys.platform == "linux" else f"mlx=={needed}"
    return ImportError(
        f"flash_attn (flash-attn-mlx): {problem}. This build needs mlx {needed} exactly, because MLX's C++ ABI changes in "
        f"patch releases: pip install {package}"
    )


def _mlx_version_built_against() -> str:
    try:
        from ._build_info import MLX_VERSION
    except ImportError as error:
        raise _import_error("the compiled module was never built", None) from error
    return MLX_VERSION


def _installed_mlx_version(needed: str) -> str:
    try:
        import mlx.core
    except ImportError as error:
        raise _import_error(f"mlx cannot be imported ({error})", needed) from error
    return str(mlx.core.__version__)  # type: ignore[attr-defined]


def _probe(core: ModuleType) -> None:
    """A module built for another nanobind imports, and then rejects every mx.array."""
    import mlx.core as mx

    core.flash_attn_combine(mx.zeros((1, 1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)), None, None)


def load_core() -> ModuleType:
    """The compiled module, once it is sure to work with the installed MLX.

    Raises:
        ImportError: MLX is missing, of another version, or of another ABI; the message says what to install.
    """
    global _core
    if _core is not None:
        return _core
    needed = _mlx_version_built_against()
    found = _installed_mlx_version(needed)
    if found.split("+")[0] != needed:
        raise _import_error(f"found mlx {found}", needed)
    try:
        core = importlib.import_module("._core", __package__)
        _probe(core)
    except (ImportError, TypeError) as error:
        raise _import_error(f"the compiled module does not fit the installed mlx {found} ({error})", needed) from error
    _core = core
    return core


def warn_if_upstream_is_installed() -> None:
    """Upstream's CUDA package ``flash-attn`` owns the same import name: whichever was installed last is imported."""
    for folder in sys.path:
        # importlib.metadata would say the same, but importing it takes longer than all the rest of this package.
        for found in Path(folder).glob("flash_attn-*.dist-info"):
            warnings.warn(
                f"{found.stem} (upstream's, for PyTorch) is installed beside flash-attn-mlx and both are imported as "
                "flash_attn: keep only one of them in an environment",
                RuntimeWarning,
                stacklevel=2,
            )
            return


def validate_paged_kv_params(
    k_cache: mx.array, v_cache: mx.array, block_table: mx.array, cache_seqlens: mx.array, seqlen_new: int = 0
) -> None:
    """Checks a paged cache before `seqlen_new` tokens are appended to each sequence, values too: evaluates both int32 arrays.

    Args:
        k_cache: (pages, page_size, heads_k, head_dim).
        v_cache: (pages, page_size, heads_k, head_dim_v), k_cache's dtype.
        block_table: int32 (batch, blocks), -1 where a sequence has no page; entries past its length may hold anything.
        cache_seqlens: int32 (batch,).
        seqlen_new: tokens to append.

    Raises:
        TypeError, ValueError: what flash_attn_with_kvcache refuses too; the message names the argument, what it got and needs.
    """
    load_core().validate_paged_kv_params(k_cache, v_cache, block_table, cache_seqlens, seqlen_new)
