"""Checks files of src/metal: `python tests/metal_shim/lint src/metal/forward.metal -D FA_D=128`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from address_space import errors_of
from kernel_text import kernel_of_file


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
        for small_arrays in ("device", "constant"):
            errors = errors_of(kernel_of_file(file, defines, small_arrays).text)
            if errors:
                print(f"{file}, small arrays as {small_arrays}:\n{errors}")
                failed = True
                break
        else:
            print(f"{file}: ok")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
