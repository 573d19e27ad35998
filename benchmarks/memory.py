"""Peak memory of one call: MLX's own count, and the whole process's, which also sees what kernels allocate on their own."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx


@dataclass(frozen=True)
class Peak:
    mlx_bytes: int
    process_bytes: int | None  # None where the system does not let it be reset (macOS)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MiB; a call that reuses them would seem to need nothing."""
    mx.clear_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_of(call: Callable[[], object]) -> Peak:
    """How far above the state before it one run of `call` raises each peak."""
    gc.collect()
    _return_freed_memory()
    mx.reset_peak_memory()
    mlx_before = mx.get_active_memory()
    linux = sys.platform == "linux"
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # peak := current
        process_before = _status_bytes("VmRSS")
    call()
    process = max(0, _status_bytes("VmHWM") - process_before) if linux else None
    return Peak(max(0, mx.get_peak_memory() - mlx_before), process)
