"""Times contenders in turns, so that whatever slows the machine down slows them all."""

from __future__ import annotations

import random
import statistics
import time
from typing import Callable, Mapping, NamedTuple


class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        median: of all rounds.
        spread: the distance between the quartiles.
    """

    median: float
    spread: float


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        case: what was measured, on what.
        contender: who was measured.
        value: the median.
        spread: the distance between the quartiles; 0 for what does not vary.
        unit: of both.
    """

    case: str
    contender: str
    value: float
    spread: float
    unit: str


def in_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 2
) -> dict[str, Timing]:
    """Calls every contender once in each of `rounds` rounds, after those to warm up.

    Each round has an order of its own, so that what a contender leaves behind, in the
    caches and in the allocator, is not always the same one's burden.
    """
    seconds = {name: [] for name in contenders}
    order = random.Random(0)
    for turn in range(warm_up + rounds):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def rows(case: str, timings: Mapping[str, Timing]) -> list[Row]:
    """The lines of the table for the timings of one case."""
    return [
        Row(case, name, timing.median, timing.spread, "ms")
        for name, timing in timings.items()
    ]


def _timing(seconds):
    ordered = sorted(1e3 * value for value in seconds)
    quarter = len(ordered) // 4
    return Timing(
        statistics.median(ordered),
        ordered[len(ordered) - 1 - quarter] - ordered[quarter],
    )
