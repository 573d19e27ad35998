"""What the machine can do at best, by the flash_attn_ceilings program beside this file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from case import Case
from timing import SelfTimed

FMA, BF16_DOTS, AMX = "f32 FMA", "bf16 dots", "AMX"

ROOT = Path(__file__).resolve().parent.parent


def build() -> Path:
    """Takes a second when it is up to date."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # those of an environment not activated
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise SystemExit("cmake is needed to build what measures the ceilings: apt install cmake, or pip install cmake ninja")
    for arguments in (["--preset", "benchmarks"], ["--build", "--preset", "benchmarks"]):
        done = subprocess.run([cmake, *arguments], cwd=ROOT, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"cmake {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return ROOT / "build" / "benchmarks" / "benchmarks" / "flash_attn_ceilings"


class Reading(SelfTimed):
    """A loop that only reads so many bytes of memory a call, in a process that times it: what a call that reads them as well
    can take turns with. Memory shared with neighbours is twice as fast at some moments as at others."""

    def __init__(self, command: list[str], nbytes: int) -> None:
        self._bytes = nbytes
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._bytes / (float(self._process.stdout.readline()) * 1e9)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it


@dataclass
class Ceilings:
    """Maxima over all measurements of a run: a neighbour on the machine can only lower one."""

    program: Path
    threads: int
    level: str  # the ISA level that our kernels use
    gflops: dict[str, float] = field(default_factory=dict)
    few_threads: dict[int, float] = field(default_factory=dict)  # GFLOP/s of float32, by how many threads
    read_gbs: float = 0.0
    read_bytes: int = 0  # how much memory that was measured over, several times the last-level cache
    cache_gbs: float = 0.0
    cache_bytes: int = 0  # as much of the last-level cache

    def measure(self, read: bool = False) -> None:
        """`read`: the levels not in use and memory too, which takes seconds."""
        found = self._run(self.threads, [] if read else ["--no-read", *self._levels_in_use()])
        for level, value in found["gflops"].items():
            self.gflops[level] = max(value, self.gflops.get(level, 0.0))
        if read:
            self.read_gbs = max(self.read_gbs, found["read_gbs"])
            self.read_bytes = found["read_bytes"]
            self.cache_gbs = max(self.cache_gbs, found["cache_gbs"])
            self.cache_bytes = found["cache_bytes"]

    def measure_threads(self, threads: int) -> None:
        found = self._run(threads, ["--no-read", "--level", self._vectors])
        self.few_threads[threads] = max(found["gflops"][self._vectors], self.few_threads.get(threads, 0.0))

    def reading(self, nbytes: int) -> Reading:
        command = [str(self.program), "--threads", str(self.threads), "--bursts-of", str(nbytes)]
        return Reading(command, nbytes)

    def _run(self, threads: int, options: list[str]) -> dict[str, Any]:
        command = [str(self.program), "--threads", str(threads), *options]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    def _levels_in_use(self) -> list[str]:
        return [argument for level in sorted({self._vectors, self.level}) for argument in ("--level", level)]

    @property
    def _vectors(self) -> str:
        return self.level.split("_")[0]  # _bf16 and _amx say what multiplies in 16 bits

    @property
    def fma_gflops(self) -> float:
        """float32 multiply-adds at the level in use."""
        return self.gflops[self._vectors]

    def of(self, case: Case) -> str:
        """What multiplies in this case, a name for `by_name`. Float16 is multiplied in float32 everywhere; so is the backward
        pass of bfloat16 where forward has the matrix unit."""
        if case.dtype == "bfloat16" and self.level == "avx512_bf16":
            return BF16_DOTS
        if case.dtype == "bfloat16" and self.level == "avx512_amx" and not case.backward:
            return AMX
        return FMA

    def by_name(self, name: str) -> float:
        return self.fma_gflops if name == FMA else self.gflops[self.level]

    def numbers(self) -> dict[str, Any]:
        """For the record, and the plot."""
        found = {name: value for name, value in vars(self).items() if name != "program"}
        return found | {"fma_gflops": self.fma_gflops}
