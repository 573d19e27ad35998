"""The Metal graph on this machine: kernels go to the shim, which compiles their text and runs it on the CPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    readable: bool = False,
) -> Iterator[Any]:
    """Inside, attention runs on the Metal kernels under the shim. `bugs`: {start of a kernel's name: (right text, wrong)},
    which go into readable texts."""
    module = shim()
    variables = {"FLASH_ATTENTION_MLX_ROUTE": route}
    if bugs or readable:
        variables["FLASH_ATTENTION_MLX_METAL_READABLE"] = "1"
    _core._set_metal_launcher(module.launcher_capsule(mode, seed, bugs or {}), probe=probe)
    try:
        with patch.dict(os.environ, variables):
            yield module
    finally:
        _core._set_metal_launcher(None)


@pytest.fixture
def metal() -> Iterator[Any]:
    """Every access of the kernels checked."""
    with metal_graph("hooks") as module:
        yield module
