"""Checks files of src/metal: `python tests/metal_shim/lint src/metal/forward.metal -D FA_D=128`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from address_space import errors_of
from kernel_text import kernel_of_file
from rules import broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]", help="as FA_CAUSAL or FA_T=float"
    )
    arguments = parser.parse_args()
    defines = {name: value or "1" for name, _, value in (define.partition("=") for define in arguments.defines)}
    failed = False
    for file in arguments.files:
        complaints = complaints_about(file, defines)
        print(f"{file}: {'ok' if not complaints else ''}")
        print("".join(f"  {complaint}\n" for complaint in complaints), end="")
        failed |= bool(complaints)
    return int(failed)


def complaints_about(file: Path, defines: dict[str, str]) -> list[str]:
    """Whether MLX passes the small arrays as `device` or as `constant`, the text has to compile."""
    texts = {space: kernel_of_file(file, defines, space).text for space in ("device", "constant")}
    errors = [f"small arrays as {space}:\n{error}" for space, text in texts.items() if (error := errors_of(text))]
    return errors[:1] + broken(texts["device"])


if __name__ == "__main__":
    sys.exit(main())
