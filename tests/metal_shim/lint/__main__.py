"""Checks the texts of the Metal kernels: every one that MLX gets, or of the files of src/metal that are named.

python tests/metal_shim/lint
python tests/metal_shim/lint src/metal/forward.metal -D FA_D=128
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from address_space import errors_of
from generated_code import generated_code, objections
from kernel_text import DEFAULT_DEFINES, kernel_of_file
from rules import broken, text_is_short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]", help="as FA_VARLEN or FA_T=float"
    )
    arguments = parser.parse_args()
    defines = {name: value or "1" for name, _, value in (define.partition("=") for define in arguments.defines)}
    failed = check_files(arguments.files, defines) if arguments.files else check_specialisations()
    return int(failed)


def check_files(files: list[Path], defines: dict[str, str]) -> bool:
    failed = False
    for file in files:
        # MLX passes short arrays as `constant` and long ones as `device`: the text has to compile either way.
        texts = [kernel_of_file(file, defines, space).text for space in ("device", "constant")]
        is_kernel = "[[kernel]]" in texts[0]
        threads = 32 * int((DEFAULT_DEFINES | defines)["FA_SIMDGROUPS"]) if is_kernel else None
        found, summary = check(texts[0], threads)
        found += [errors] if (errors := errors_of(texts[1])) and not found else []
        print(f"{file}: {'refused' if found else 'ok'} ({summary})")
        show(found)
        failed |= bool(found)
    return failed


def check_specialisations() -> bool:
    from specialisations import recorded

    texts = recorded()
    readable = recorded(readable=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is clang's
        results = pool.map(lambda name: check_pair(texts[name], readable[name]), texts)
        refused = {name: found for name, found in zip(texts, results, strict=True) if found}
    for name, found in refused.items():
        print(f"{name}: {defines_of(readable[name])}")
        show(found)
    sizes = sorted(len(text.encode()) for text in texts.values())
    print(f"{len(texts)} texts, {sizes[len(sizes) // 2]} bytes (median), {sizes[-1]} (most), {len(refused)} refused")
    return bool(refused)


def check(text: str, threads: int | None) -> tuple[list[str], str]:
    """What is wrong, and a summary. Without threads it is no kernel but the vocabulary of some."""
    errors = errors_of(text)
    found = [errors] * bool(errors) + broken(text, but=text_is_short)
    summary = f"{len(text.encode())} bytes"
    if threads and not errors:
        code = generated_code(text, threads)
        found += objections(code)
        summary += f", {code.threadgroup_bytes} bytes of threadgroup memory, {code.registers} registers"
        summary += f", {code.stack_bytes} bytes of stack" if code.stack_bytes else ""
    return found, summary


def check_pair(text: str, readable: str) -> list[str]:
    """What is wrong with a text that MLX gets. Rules know names and look at the readable one, compilers at what is sent."""
    found = broken(readable, but=text_is_short) + broken(text, only=text_is_short)
    if errors := errors_of(text):
        return [*found, errors_of(readable) or errors]
    return found + objections(generated_code(text, threads_of(readable)))


def threads_of(text: str) -> int:
    """Kernels that are no matrix products say nothing of their threads, which then do not matter."""
    simdgroups = re.search(r"^#define FA_SIMDGROUPS (\d+)$", text, flags=re.MULTILINE)
    return 32 * int(simdgroups[1]) if simdgroups else 128


def defines_of(text: str) -> str:
    return " ".join(f"-D {name}={value}" for name, value in re.findall(r"^#define (FA_\w+) (\w+)$", text, flags=re.MULTILINE))


def show(complaints: list[str]) -> None:
    for complaint in complaints:
        print("  " + complaint.replace("\n", "\n  "))


if __name__ == "__main__":
    sys.exit(main())
