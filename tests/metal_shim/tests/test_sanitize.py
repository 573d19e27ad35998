"""Mode sanitize, in a process of its own: AddressSanitizer's runtime must be there from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import metal_shim
import numpy as np
import pytest

OVERRUN = """
[[gnu::noinline]] static void fill(thread float* few, int count) {
  for (int i = 0; i < count; ++i) few[i] = float(i);
}

[[kernel]] void overrun(const constant int& count [[buffer(0)]], device float* out [[buffer(1)]],
                        uint3 index [[thread_position_in_grid]]) {
  float few[4];
  fill(few, count);
  out[index.x] = few[index.x % 4];
}
"""


def run_overrun(count, mode):
    out = np.zeros(32, np.float32)
    buffers = [("count", np.array([count], np.int32), False), ("out", out, True)]
    metal_shim.run_text(OVERRUN, "overrun", buffers, grid=(32, 1, 1), threadgroup=(32, 1, 1), mode=mode)
    return out


def run_here():
    """What the process below runs."""
    import test_planted_bugs as planted

    out, _, _ = planted.run(mode="sanitize")
    np.testing.assert_allclose(out, planted.expected()[0], atol=1e-5)
    np.testing.assert_array_equal(run_overrun(4, "sanitize"), np.tile(np.arange(4, dtype=np.float32), 8))
    with pytest.raises(
        RuntimeError, match=r"^out of bounds: overrun: AddressSanitizer: stack-buffer-overflow.*overrun.metal:3"
    ):
        run_overrun(5, "sanitize")
    for name in ("array_one_row_short", "private_array_overrun", "wild_page_id"):
        bug = next(bug for bug in planted.PLAIN + planted.SUBTLE if bug.name == name)
        with pytest.raises(RuntimeError, match=r"^out of bounds: "):
            planted.run(planted.TEXT.replace(bug.old, bug.new), mode="sanitize")
    print("all found")


def test_a_private_array_overrun_through_a_pointer_is_found():
    runtime = subprocess.run(
        ["clang++", "-print-file-name=libclang_rt.asan-x86_64.so"], capture_output=True, text=True, check=True
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    here = str(Path(__file__).parent)
    code = "import test_sanitize; test_sanitize.run_here()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert "all found" in result.stdout, result.stderr[-4000:]


def test_without_the_runtime_the_mode_says_what_to_do():
    with pytest.raises(RuntimeError, match="LD_PRELOAD"):
        run_overrun(4, "sanitize")
