"""Wall-clock time of calls that are measured against each other: interleaved, warm, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: Sequence[Callable[[], object]], seconds: float, least: int = 5, most: int = 50) -> list[dict[str, float]]:
    """{'median', 'min', 'runs'} in seconds for each call; they take turns, so that a busy moment of the machine hits all.

    Each timed run follows an untimed one of the same call: threads awake and caches as a loop over it would have them.
    """
    for call in calls:
        call()
    rounds = max(least, min(most, int(seconds / max(1e-6, 2 * sum(_once(call) for call in calls)))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            call()
            own.append(_once(call))
    return [{"median": statistics.median(own), "min": min(own), "runs": len(own)} for own in times]
