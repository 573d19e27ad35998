"""Checks files of src/metal: `python tests/metal_shim/lint src/metal/forward.metal -D FA_D=128`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from address_space import errors_of
from generated_code import generated_code, objections
from kernel_text import DEFAULT_DEFINES, kernel_of_file
from rules import broken, text_is_short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]", help="as FA_VARLEN or FA_T=float"
    )
    arguments = parser.parse_args()
    defines = DEFAULT_DEFINES | {
        name: value or "1" for name, _, value in (define.partition("=") for define in arguments.defines)
    }
    found = [complaint for file in arguments.files for complaint in check(file, defines)]
    return int(bool(found))


def check(file: Path, defines: dict[str, str]) -> list[str]:
    """Prints and returns what is wrong with a file."""
    # MLX passes short arrays as `constant` and long ones as `device`: the text has to compile either way.
    texts = {space: kernel_of_file(file, defines, space).text for space in ("device", "constant")}
    text = texts["device"]
    errors = [f"small arrays as {space}:\n{error}" for space, text in texts.items() if (error := errors_of(text))][:1]
    is_kernel = "[[kernel]]" in text
    found = errors + broken(text, but=None if is_kernel else text_is_short)
    summary = f"{len(text.encode())} bytes"
    if is_kernel and not errors:
        code = generated_code(text, 32 * int(defines["FA_SIMDGROUPS"]))
        found += objections(code)
        summary += f", {code.threadgroup_bytes} bytes of threadgroup memory, {code.registers} registers"
        summary += f", {code.stack_bytes} bytes of stack" if code.stack_bytes else ""
    print(f"{file}: {'ok' if not found else 'refused'} ({summary})")
    for complaint in found:
        print("  " + complaint.replace("\n", "\n  "))
    return found


if __name__ == "__main__":
    sys.exit(main())
