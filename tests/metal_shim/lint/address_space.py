"""The address-space pass: clang's opinion of a kernel's text, with Metal's address spaces as real ones.

The shim runs the text with plain pointers, so it cannot see a device pointer passed as a threadgroup one; this pass can. clang
is given Metal's words (words/metal_stdlib) and asked for the syntax only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

WORDS = Path(__file__).resolve().parent / "words"
FLOAT_FLAGS = ["-Xclang", "-fnative-half-type", "-Xclang", "-fallow-half-arguments-and-returns"]
FLAGS = [
    *("-x", "c++", "-std=c++17", "-fsyntax-only", "-nostdinc", "-D__METAL_VERSION__=320", "-ferror-limit=20"),
    *("-target", "aarch64-linux-gnu", *FLOAT_FLAGS),
    *("-Wall", "-Werror", "-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-unused", "-Wno-undefined-inline"),
    *("-Wno-undefined-internal", "-Wno-unknown-pragmas", "-Wno-missing-braces"),
    *("-Wimplicit-float-conversion", "-Wvla"),
]


def find_clang() -> str:
    for name in ("clang++-14", "clang++", *(f"clang++-{version}" for version in range(15, 25))):
        if shutil.which(name):
            return name
    raise FileNotFoundError("the address-space pass needs clang++, 14 or newer")


def errors_of(text: str) -> str:
    """clang's complaints, lines counted in the text; empty where there are none."""
    source = '#line 1 "words"\n#include <metal_stdlib>\n#line 1 "kernel.metal"\n' + for_clang(text) + "\n"
    run = subprocess.run([find_clang(), *FLAGS, "-isystem", str(WORDS), "-"], input=source, capture_output=True, text=True)
    return run.stderr if run.returncode else ""


def for_clang(text: str) -> str:
    """The same lines, with what clang has no words for said otherwise, or not at all."""
    text = re.sub(r"^\s*#\s*include\s*<\w+>", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[\[[^\[\]]*\]\]", "", text)
    text = re.sub(r"(^|[;{}])(\s*)threadgroup(\s+\w+\s+\w+\s*\[)", r"\1\2static threadgroup\3", text, flags=re.MULTILINE)
    return _vectors_as_calls(text)


def _vectors_as_calls(text: str) -> str:
    """`float2(a, b)` becomes `metal::constructed<float2>(a, b)`; so do vec<...> and what `using` calls a vector."""
    scalar = "half|bfloat|bfloat16_t|float|char|uchar|short|ushort|int|uint|long|ulong"
    names = {"vec"} | {f"{name}{n}" for name in scalar.split("|") for n in (2, 3, 4)}
    aliases = re.findall(r"\busing\s+(\w+)\s*=\s*([\w:]+)", text)
    while more := {alias for alias, of in aliases if of.split("::")[-1] in names} - names:
        names |= more
    out = []
    at = 0
    for word in re.finditer(r"(?:\b(?:metal::|flash_attn::))?\b(\w+)", text):
        if word[1] not in names or word.start() < at:
            continue
        end = _past_angles(text, word.end())
        if re.match(r"\s*\(", text[end:]):
            out += [text[at : word.start()], f"metal::constructed<{text[word.start() : end]}>"]
            at = end
    return "".join([*out, text[at:]])


def _past_angles(text: str, at: int) -> int:
    """Past `<...>` if that comes next."""
    if not text[at:].startswith("<"):
        return at
    depth = 0
    for i in range(at, len(text)):
        depth += {"<": 1, ">": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return at
