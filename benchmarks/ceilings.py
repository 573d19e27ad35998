"""What the machine can do at best, by the flash_attn_ceilings program beside this file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Ceilings:
    """Maxima over all measurements of a run: a neighbour on the machine can only lower one."""

    program: Path
    threads: int
    level: str  # the ISA level that our kernels use
    gflops: dict[str, float] = field(default_factory=dict)
    read_gbs: float = 0.0
    read_bytes: int = 0  # how much memory that was measured over, several times the last-level cache

    def measure(self, read: bool = False) -> None:
        command = [str(self.program), "--threads", str(self.threads)] + ([] if read else ["--no-read"])
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for level, value in found["gflops"].items():
            self.gflops[level] = max(value, self.gflops.get(level, 0.0))
        if read:
            self.read_gbs = max(self.read_gbs, found["read_gbs"])
            self.read_bytes = found["read_bytes"]

    @property
    def fma_gflops(self) -> float:
        """float32 multiply-adds at the level in use: what every percentage in the report divides by."""
        vectors = self.level.split("_")[0]  # _bf16 and _amx say what multiplies in 16 bits
        return self.gflops[vectors]
