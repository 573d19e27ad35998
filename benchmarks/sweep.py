"""Runs the chosen cases and sections one after the other, and collects what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import decode
import report
import threads
from attention import run_case
from case import Case, KvConfig
from cases import DECODE_DTYPES, paged_cases
from ceilings import Ceilings
from kv_bench import run_kv_config
from peers import PEERS
from peers.base import Peer
from targets import (
    Target,
    evaluate_append,
    evaluate_cases,
    evaluate_decode,
    evaluate_memory,
    evaluate_paged,
    evaluate_sdpa,
    evaluate_threads,
)

Row = dict[str, Any]


@dataclass
class Results:
    cases: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)
    paged: list[Row] = field(default_factory=list)
    append_us: dict[str, float] = field(default_factory=dict)
    empty_op_us: float | None = None
    threads: list[Row] = field(default_factory=list)
    busy: Row | None = None
    kv_bench: list[Row] = field(default_factory=list)
    memory: Row | None = None
    gaps: dict[str, dict[str, None]] = field(default_factory=lambda: {peer: {} for peer in PEERS})


class Sweep:
    def __init__(
        self, console: Console, ceilings: Ceilings, peers: dict[str, Peer], chosen: tuple[str, ...], quick: bool, iters: int
    ) -> None:
        self.console = console
        self.ceilings = ceilings
        self.peers = peers
        self.chosen = chosen
        self.quick = quick
        self.iters = iters
        self.results = Results()

    def run(self, cases: list[Case], others: list[str], configs: list[KvConfig], kv_iters: int) -> None:
        """Attention cases, then the sections that are no tables of them."""
        steps = {
            "decode": lambda: self._caches(others),
            "pages": lambda: () if "decode" in others else self._caches(others),  # the same caches serve both
            "threads": self._threads,
            "kv": lambda: self._kv_bench(configs, kv_iters),
            "memory": self._memory,
        }
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            task = progress.add_task("starting", total=len(cases) + len(others))
            for case in cases:
                progress.update(task, description=f"{case.label} {case.steps}")
                self._print(self._case(case))
                progress.advance(task)
            for name in others:
                progress.update(task, description=name)
                for line in steps[name]():
                    self._print(line)
                progress.advance(task)

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def _case(self, case: Case) -> str:
        slow_too = case.slow_peers or not self.quick
        chosen = [name for name in self.chosen if slow_too or not self.peers[name].slow]
        rows, missing = run_case(case, self.peers, chosen, self.iters)
        for row in rows:
            row["ceiling"] = self.ceilings.of(case)
        self.results.cases += rows
        self._note(missing)
        self.ceilings.measure()
        return report.case_line(case.label, case.steps, rows)

    def _note(self, missing: dict[str, str]) -> None:
        for peer, reason in missing.items():
            self.results.gaps[peer][reason] = None

    def _caches(self, others: list[str]) -> Iterator[str]:
        for pool, yardstick in decode.pools(DECODE_DTYPES, self.ceilings.read_bytes):
            if "decode" in others:
                for rows, missing in decode.run_decode(
                    pool, yardstick, self.peers, self.chosen, self.iters, self.ceilings.reading
                ):
                    self.results.decode += rows
                    self._note(missing)
                    yield report.decode_line(rows)
            if "pages" in others:
                for case in paged_cases(pool.dtype):
                    self.results.paged.append(decode.run_paged(case, pool, self.peers["ours"]))
                    yield report.paged_line(self.results.paged[-1])
            self.ceilings.measure(read=True)
        if "decode" in others:
            self.results.empty_op_us = decode.empty_op_seconds() * 1e6
            self.results.append_us = decode.measure_append()

    def _threads(self) -> Iterator[str]:
        if self.ceilings.threads < 2:
            yield "one thread only: nothing to say about two"
            return
        self.results.threads = threads.run_threads(self.peers["ours"], self.ceilings, self.iters)
        yield from map(report.threads_line, self.results.threads)
        self.results.busy = threads.run_busy(self.peers["ours"])
        yield report.busy_line(self.results.busy) if self.results.busy else "beside a busy core: needs a machine of two CPUs"

    def _kv_bench(self, configs: list[KvConfig], iters: int) -> Iterator[str]:
        self.results.kv_bench = [run_kv_config(config, iters) for config in configs]
        yield f"{len(configs)} pairs of a contiguous and a paged cache"

    def _memory(self) -> Iterator[str]:
        command = [sys.executable, str(Path(__file__).with_name("peak_memory.py"))]
        self.results.memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        yield "peak memory of a long sequence"

    def finish(self) -> list[Target]:
        """Shares of the ceilings, which are known only now, and with them the targets."""
        results, ceilings = self.results, self.ceilings
        for row in results.cases:
            row["of_ceiling"] = row["gflops"] / ceilings.by_name(row["ceiling"])
        for row in results.decode:
            row["of_fma"] = row["gflops"] / ceilings.fma_gflops
        few = ceilings.few_threads
        return [
            *evaluate_cases(results.cases, has_bf16=ceilings.level in ("avx512_bf16", "avx512_amx")),
            *evaluate_sdpa(results.cases),
            *evaluate_decode(results.decode, ceilings.fma_gflops, ceilings.cache_gbs, results.empty_op_us or 0.0),
            *evaluate_paged(results.paged),
            *evaluate_append(results.append_us),
            *evaluate_threads(results.threads, results.busy, few[2] / few[1] if few else None),
            *evaluate_memory(results.memory),
        ]
