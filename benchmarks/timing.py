"""Minimum over interleaved runs, so that a busy spell of the machine hits every implementation alike."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from memory import Peak, peak_of

Call = Callable[[], object]


class SelfTimed(ABC):
    """A call that returns how many seconds it took."""

    @abstractmethod
    def __call__(self) -> float: ...


SLOW_SECONDS = 1.0

# A case of some milliseconds gets more rounds, until it has taken this long.
LEAST_SECONDS = 0.5
MOST_ROUNDS = 8

# Lets the OpenMP threads of a peer fall asleep: for more than 5 ms after its call they spin on the cores that we would use.
SETTLE_SECONDS = 0.02
SHORT_SECONDS = 0.1
# A call of a millisecond is 2 to 7 % slower the first five times after others than from then on.
WARM_SECONDS = 0.015

# Each side of a pair is the median of as many calls as fit: single ones of half a millisecond differ by more than pairs shall
# show.
PAIR_SECONDS = 0.03


@dataclass
class Timing:
    seconds: float
    runs: int
    peak: Peak
    rounds: list[float] = field(default_factory=list)  # the best of each, after the first run


def seconds_of(call: Call, settle: float = SETTLE_SECONDS) -> float:
    if settle:
        time.sleep(settle)
    start = time.perf_counter()
    if isinstance(call, SelfTimed):
        return call()
    call()
    return time.perf_counter() - start


def best_seconds_of(call: Call) -> float:
    """A short call is repeated at once: the first also pays for waking the CPUs that just slept, and for another's caches."""
    seconds = seconds_of(call)
    again = max(2, int(WARM_SECONDS / seconds)) if seconds < SHORT_SECONDS else 0
    return min([seconds, *(seconds_of(call, settle=0.0) for _ in range(again))])


def median_seconds_of(call: Call, least_seconds: float) -> float:
    """Of as many calls, after the first, as take so long."""
    first = seconds_of(call)
    again = max(1, int(least_seconds / first))
    return statistics.median(seconds_of(call, settle=0.0) for _ in range(again))


def first_run(call: Call) -> Timing:
    """Warms up, and measures memory."""
    timing = Timing(0.0, 1, Peak(0, None))

    def timed() -> None:
        timing.seconds = seconds_of(call)

    timing.peak = peak_of(timed)
    return timing


def interleave(
    calls: dict[str, Call], timings: dict[str, Timing], once_if_slow: Collection[str], iters: int,
    least_seconds: float = LEAST_SECONDS,
) -> None:  # fmt: skip
    """Improves the first runs by `iters` rounds, more when they are short; a slow one of `once_if_slow` keeps its first."""
    slow = {name for name in once_if_slow if name in timings and timings[name].seconds > SLOW_SECONDS}
    start = time.perf_counter()
    rounds = 0
    while rounds < iters or (rounds < MOST_ROUNDS * iters and time.perf_counter() - start < least_seconds):
        rounds += 1
        for name, call in calls.items():
            if name not in slow:
                seconds = best_seconds_of(call)
                timings[name].rounds.append(seconds)
                timings[name].seconds = min(timings[name].seconds, seconds)
                timings[name].runs += 1


def median_of_rounds(numerator: Timing, denominator: Timing) -> float:
    """The ratio of the times of one round: where the machine's speed changes from round to round, two minima may be of
    different moments. Of a call without rounds, of the fastest runs."""
    pairs = list(zip(numerator.rounds, denominator.rounds, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else numerator.seconds / denominator.seconds


def ratios_of_pairs(numerators: dict[str, Call], denominator: Call, pairs: int) -> dict[str, list[float]]:
    """Of times measured right after each other, which of them first in turns: finer than the ratio of two minima."""
    ratios: dict[str, list[float]] = {name: [] for name in numerators}
    calls = [denominator, *numerators.values()]
    for pair in range(pairs):
        first = pair % len(calls)
        seconds = {call: median_seconds_of(call, PAIR_SECONDS) for call in calls[first:] + calls[:first]}
        for name, call in numerators.items():
            ratios[name].append(seconds[call] / seconds[denominator])
    return ratios
