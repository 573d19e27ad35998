"""What a second thread gains, and what it costs beside a core that another process keeps busy."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from case import Case
from cases import BUSY_CASE, THREAD_CASES
from ceilings import Ceilings
from peers.base import Peer, make_inputs
from peers.ours import with_environment
from timing import Call, first_run, interleave, seconds_of

Row = dict[str, Any]

BUSY_ROUNDS = 300


def _on_threads(case: Case, ours: Peer) -> dict[int, Call]:
    call = ours.prepare(case, make_inputs(case))
    return {count: with_environment(call, FLASH_ATTENTION_MLX_THREADS=str(count)) for count in (1, 2)}


def run_threads(ours: Peer, ceilings: Ceilings, iters: int) -> list[Row]:
    """Two threads over one, beside what the ceiling gains by the second."""
    rows = []
    for case in THREAD_CASES:
        calls = {str(count): call for count, call in _on_threads(case, ours).items()}
        timings = {name: first_run(call) for name, call in calls.items()}
        interleave(calls, timings, once_if_slow=(), iters=iters)
        for count in (1, 2):
            ceilings.measure_threads(count)
        one, two = (timings[name].seconds for name in ("1", "2"))
        rows.append({"label": case.label, "steps": case.steps, "one_ms": one * 1e3, "two_ms": two * 1e3, "gain": one / two})
    return rows


@contextmanager
def _busy_core(cpu: int) -> Iterator[None]:
    spinning = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"])
    try:
        yield
    finally:
        spinning.kill()
        spinning.wait()


def run_busy(ours: Peer) -> Row | None:
    """Medians of a short call on one thread and on two, one CPU being taken."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) != 2:  # with more, none would be missed
        return None
    calls = _on_threads(BUSY_CASE, ours)
    found: dict[int, list[float]] = {count: [] for count in calls}
    with _busy_core(cpus[-1]):
        for _ in range(BUSY_ROUNDS):
            for count, call in calls.items():
                found[count].append(seconds_of(call, settle=0.0))
    one, two = (statistics.median(found[count]) for count in (1, 2))
    return {"label": BUSY_CASE.label, "one_us": one * 1e6, "two_us": two * 1e6}
