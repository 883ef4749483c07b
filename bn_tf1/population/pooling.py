"""The statistics of all examples together, from those of batches of any size.

    n      = n_a + n_b
    mean   = mean_a + (mean_b - mean_a) * n_b / n
    n * variance = n_a * variance_a + n_b * variance_b + (mean_b - mean_a)^2 * n_a * n_b / n

Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979 (Stanford STAN-CS-79-773).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PooledStatistics(NamedTuple):
    """A mean and a biased variance, float64 arrays of shape [channels]."""

    mean: np.ndarray
    variance: np.ndarray


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
        self._mean = None
        self._squares = None  # sum of (x - mean)^2

    def add(self, batch: BatchStatistics) -> None:
        """Takes a batch in; one of no values changes nothing."""
        if batch.count == 0:
            return
        mean, variance = batch.statistics
        if self._mean is None:
            self._mean, self._squares = np.zeros_like(mean), np.zeros_like(mean)
        total = self.count + batch.count
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
