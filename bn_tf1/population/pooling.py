"""Statistics of many batches: of all their examples together, and how far they are apart.

    n      = n_a + n_b
    mean   = mean_a + (mean_b - mean_a) * n_b / n
    n * variance = n_a * variance_a + n_b * variance_b + (mean_b - mean_a)^2 * n_a * n_b / n

Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979 (Stanford STAN-CS-79-773).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class PooledStatistics(NamedTuple):
    """A mean and a biased variance, float64 arrays of shape [channels]."""

    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, mean: Any, variance: Any) -> PooledStatistics:
        """Those in arrays of any float dtype, and of any shape with as many values."""
        return cls(np.float64(mean).reshape(-1), np.float64(variance).reshape(-1))


class BatchStatistics(NamedTuple):
    """Those of one batch of one layer, and of how many values for each channel."""

    count: float
    statistics: PooledStatistics


class Pool:
    """Takes batches, one after the other, and holds their joint statistics.

    Attributes:
        count: the number of values for each channel so far.
    """

    def __init__(self):
        self.count = 0.0
        self._mean = 0.0
        self._squares = 0.0  # sum of (x - mean)^2

    def add(self, batch: BatchStatistics) -> None:
        """Takes a batch in; one of no values, whose statistics may be NaN, is left out."""
        if batch.count == 0:
            return
        mean, variance = batch.statistics
        total = self.count + batch.count
        # Of differences, and not sums of x and x^2: where a mean is hundreds of times as
        # large as the deviation, what these have in common would take all digits.
        difference = mean - self._mean
        self._mean = self._mean + difference * (batch.count / total)
        self._squares = (
            self._squares
            + variance * batch.count
            + difference**2 * (self.count * batch.count / total)
        )
        self.count = total

    @property
    def statistics(self) -> PooledStatistics:
        """The joint statistics; at least one batch with values was taken."""
        # E[x^2] - E[x]^2 in float32, as many layers have it, can fall below 0.
        return PooledStatistics(self._mean, np.maximum(self._squares / self.count, 0.0))


def distance(mean: np.ndarray, statistics: PooledStatistics, epsilon: float) -> float:
    """The largest distance of `mean` from that of `statistics`, in its deviations."""
    difference = np.abs(mean - statistics.mean)
    deviation = np.sqrt(statistics.variance + epsilon)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A channel that is always 0 has no deviation, and is not infinitely far off.
        distances = np.where(difference == 0, 0.0, difference / deviation)
    return _largest(distances)


def variance_ratio(
    one: PooledStatistics, other: PooledStatistics, epsilon: float
) -> float:
    """The largest factor, >= 1, between their variances, each with `epsilon` added."""
    variances = one.variance + epsilon, other.variance + epsilon
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.abs(np.log(variances[0] / variances[1]))
    # exp(710) is infinite, which a table would show as a number that is none.
    equal = np.equal(*variances)
    return float(np.exp(min(_largest(np.where(equal, 0.0, logs)), 700.0)))


def _largest(values):
    """The largest value; NaN, of statistics that are no numbers, counts as infinite."""
    return float(np.max(np.where(np.isnan(values), np.inf, values)))


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Its lines: the first column to the left, which are names, and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        )
        for row in (header, *rows)
    ]
