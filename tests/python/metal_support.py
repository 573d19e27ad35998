"""The Metal graph on this machine: kernels go to the shim, which compiles their text and runs it on the CPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flash_attn.flash_attn_mlx import _core

SHIM_FOLDER = Path(os.environ.get("METAL_SHIM", Path(__file__).parents[2] / "build" / "metal_shim"))


def shim() -> Any:
    """The module `metal_shim`, which `make metal-shim` builds; a test that asks for it is skipped without it."""
    if not any(SHIM_FOLDER.glob("metal_shim*.so")):
        pytest.skip("needs the Metal shim: make metal-shim")
    if str(SHIM_FOLDER) not in sys.path:
        sys.path.insert(0, str(SHIM_FOLDER))
    return importlib.import_module("metal_shim")


@contextmanager
def metal_graph(
    mode: str = "fast",
    seed: int = 0,
    route: str = "kernel",
    probe: bool = False,
    bugs: dict[str, tuple[str, str]] | None = None,
) -> Iterator[Any]:
    """Inside, attention runs on the Metal kernels under the shim. `bugs`: {start of a kernel's name: (right text, wrong)}."""
    module = shim()
    before = os.environ.get("FLASH_ATTENTION_MLX_ROUTE")
    _core._set_metal_launcher(module.launcher_capsule(mode, seed, bugs or {}), probe=probe)
    os.environ["FLASH_ATTENTION_MLX_ROUTE"] = route
    try:
        yield module
    finally:
        _core._set_metal_launcher(None)
        if before is None:
            del os.environ["FLASH_ATTENTION_MLX_ROUTE"]
        else:
            os.environ["FLASH_ATTENTION_MLX_ROUTE"] = before


@pytest.fixture
def metal() -> Iterator[Any]:
    """Every access of the kernels checked."""
    with metal_graph("hooks") as module:
        yield module
