"""Times contenders in turns, so that whatever slows the machine down slows them all."""

from __future__ import annotations

import random
import statistics
import time
from typing import Callable, Mapping, NamedTuple, Sequence

# The contender that all others are compared with: this library.
OURS = "bn_tf1"


class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        median: of all rounds.
        spread: the distance between the quartiles.
        rounds: the single ones, in order.
    """

    median: float
    spread: float
    rounds: tuple[float, ...]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        case: what was measured, on what.
        contender: who was measured.
        value: the median.
        spread: the distance between the quartiles; 0 for what does not vary.
        unit: of both.
        ratio: this library's figure over the contender's in the same round, the median
            of all rounds; None where they were not measured in the same rounds.
    """

    case: str
    contender: str
    value: float
    spread: float
    unit: str
    ratio: float | None = None


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 2,
    calls: int = 1,
    seconds: float = 0.0,
) -> dict[str, Timing]:
    """Calls every contender in each of `rounds` rounds, after those to warm up.

    Each round has an order of its own, so that what a contender leaves behind, in the
    caches and in the allocator, is not always the same one's burden.

    Args:
        contenders: what to call, by name.
        rounds: how many are counted, at least.
        warm_up: how many come before them.
        calls: how often a contender is called in its turn, of which the last is
            measured. Where a call takes milliseconds, threads of the contender before
            it still spin, waiting for more.
        seconds: counts more rounds until so many seconds are over.
    """
    found = {name: [] for name in contenders}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < warm_up + rounds or time.perf_counter() < end:
        for name in order.sample(list(contenders), len(contenders)):
            for _ in range(calls - 1):
                contenders[name]()
            start = time.perf_counter()
            contenders[name]()
            if turn >= warm_up:
                found[name].append(time.perf_counter() - start)
        turn += 1
    return {name: _timing(values) for name, values in found.items()}


def rows(case: str, timings: Mapping[str, Timing]) -> list[Row]:
    """The lines of the table for the timings of one case."""
    return [
        Row(case, name, timing.median, timing.spread, "ms", _ratio(timings, timing))
        for name, timing in timings.items()
    ]


def beyond(case: str, timings: Mapping[str, Timing], limit: str) -> list[Row]:
    """The lines of the table for what each takes longer than `limit` in the same round."""
    base = timings[limit].rounds
    return [
        row(
            f"{case}, beyond {limit}",
            name,
            [own - least for own, least in zip(timing.rounds, base)],
            "ms",
        )
        for name, timing in timings.items()
        if name != limit
    ]


def _ratio(timings, timing):
    if OURS not in timings:
        return None
    pairs = zip(timings[OURS].rounds, timing.rounds)
    return statistics.median(ours / other for ours, other in pairs)


def row(case: str, contender: str, values: Sequence[float], unit: str) -> Row:
    """The line of the table for the figures of one contender."""
    return Row(case, contender, statistics.median(values), _spread(values), unit)


def _timing(seconds):
    values = [1e3 * value for value in seconds]
    return Timing(statistics.median(values), _spread(values), tuple(values))


def _spread(values):
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[len(ordered) - 1 - quarter] - ordered[quarter]
