"""MLX's own attention kernels as texts for the shim: what Apple's compiler accepts must pass here."""

from __future__ import annotations

import re
from pathlib import Path

import mlx

KERNELS = Path(next(iter(mlx.__path__))) / "include/mlx/backend/metal/kernels"

# Under the shim all address spaces are one, and these four specialisations the same.
ADDRESS_SPACE_TRAITS = re.compile(
    r"(template <typename T>\s+struct pointer_element<(device|constant|threadgroup) T\*> \{.*?\};)", re.S
)


def flatten(path: Path, seen: set[Path]) -> str:
    """A header with its includes of MLX in place, each once."""

    def include(match: re.Match[str]) -> str:
        target = KERNELS / match[1].removeprefix("mlx/backend/metal/kernels/")
        if target in seen:
            return ""
        seen.add(target)
        return flatten(target, seen)

    text = re.sub(r"#pragma once.*", "", path.read_text())
    text = ADDRESS_SPACE_TRAITS.sub("", text)
    return re.sub(r'#include "([^"]+)".*', include, text)


def text_of(header: str, **function_constants: bool | int) -> str:
    """A kernel's text, its function constants fixed."""
    path = KERNELS / header
    text = flatten(path, {path})

    def constant(match: re.Match[str]) -> str:
        value = function_constants.get(match[2], 0)
        return f"constant constexpr {match[1]} {match[2]} = {int(value)};"

    text = re.sub(r"constant (\w+) (\w+) \[\[function_constant\(\d+\)\]\];", constant, text)
    return "#include <metal_stdlib>\n" + text
