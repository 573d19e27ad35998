"""Times one attention case by ours and its peers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from case import FORWARD_BACKWARD, Case, DecodeCase
from peers.base import Peer, make_inputs
from timing import Call, Timing, first_run, interleave

Row = dict[str, Any]
Prepared = TypeVar("Prepared")


def prepared_by(
    chosen: Collection[Peer], case: Case | DecodeCase, prepare: Callable[[Peer], Prepared]
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """By peer its prepared calls, or why it has none: a peer's limits are not ours to know, its own message says them."""
    prepared, missing = {}, {}
    for peer in chosen:
        reason = peer.missing(case)
        if not reason:
            try:
                prepared[peer.name] = prepare(peer)
            except (RuntimeError, ValueError) as error:
                reason = f"{case.label}: {str(error).splitlines()[0]}"
        if reason:
            missing[peer.name] = reason
    return prepared, missing


def warm_up(peers: Collection[Peer]) -> None:
    """A first call loads libraries and starts threads; a peer that runs once must not pay for that."""
    tiny = Case("warm-up", heads=1, heads_k=1, seqlen=8, head_dim=8, steps=FORWARD_BACKWARD)
    inputs = make_inputs(tiny)
    for call in prepared_by(peers, tiny, lambda peer: peer.prepare(tiny, inputs))[0].values():
        call()


def run_case(case: Case, peers: dict[str, Peer], chosen: Collection[str], iters: int) -> tuple[list[Row], dict[str, str]]:
    """Rows of one case, ours first, and by peer why it has none."""
    inputs = make_inputs(case)
    ours = peers["ours"]
    calls: dict[str, Call] = {"ours": ours.prepare(case, inputs)}
    if case.plain:
        calls["plain"] = ours.prepare(case.plain, make_inputs(case.plain))
    timings = {name: first_run(call) for name, call in calls.items()}

    def first(peer: Peer) -> tuple[Call, Timing]:
        call = peer.prepare(case, inputs)
        return call, first_run(call)

    others, missing = prepared_by([peers[name] for name in chosen], case, first)
    calls |= {name: call for name, (call, _) in others.items()}
    timings |= {name: timing for name, (_, timing) in others.items()}
    interleave(calls, timings, once_if_slow=chosen, iters=iters)
    plain = timings.pop("plain", None)
    return [_row(case, name, timing, plain if name == "ours" else None) for name, timing in timings.items()], missing


def _row(case: Case, implementation: str, timing: Timing, plain: Timing | None) -> Row:
    row: Row = {
        "section": case.section, "feature": case.feature, "label": case.label, "steps": case.steps, "dtype": case.dtype,
        "batch": case.batch, "heads": case.heads, "heads_k": case.heads_k, "seqlen": case.seqlen, "head_dim": case.head_dim,
        "causal": case.causal, "implementation": implementation, "ms": timing.seconds * 1e3, "runs": timing.runs,
        "once": timing.runs == 1, "gflops": case.flops() / timing.seconds * 1e-9, "of_plain": None,
        "mlx_peak_mib": timing.peak.mlx_bytes / 2**20,
        "process_peak_mib": None if timing.peak.process_bytes is None else timing.peak.process_bytes / 2**20,
    }  # fmt: skip
    if plain is not None and case.plain is not None:
        row["of_plain"] = (plain.seconds / case.plain.visible_pairs()) / (timing.seconds / case.visible_pairs())
    return row
