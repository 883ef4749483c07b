"""PooledStatistics of batches, pooled, against those of all values at once."""

import numpy as np
import pytest

from bn_tf1.population.pooling import BatchStatistics, Pool, PooledStatistics


def _batch(values):
    statistics = PooledStatistics(values.mean(axis=0), values.var(axis=0))
    return BatchStatistics(float(len(values)), statistics)


@pytest.mark.parametrize("sizes", [[2, 2, 4, 8, 16, 32, 64], [8] * 5, [1, 1, 1], [7]])
def test_the_pool_is_the_population(sizes):
    random = np.random.RandomState(len(sizes))
    parts = [random.normal(random.normal(0, 9), 2.0, [n, 5]) for n in sizes]
    pool = Pool()
    for part in parts:
        pool.add(_batch(part))
    everything = np.concatenate(parts)
    np.testing.assert_allclose(pool.statistics.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        pool.statistics.variance, everything.var(0), rtol=1e-12, atol=1e-30
    )
    assert pool.count == len(everything)


def test_a_batch_without_values_changes_nothing():
    pool = Pool()
    nothing = BatchStatistics(
        0.0, PooledStatistics(np.full(2, np.nan), np.full(2, np.nan))
    )
    pool.add(nothing)
    pool.add(_batch(np.array([[1.0, 2.0], [3.0, 6.0]])))
    pool.add(nothing)
    np.testing.assert_array_equal(pool.statistics.mean, [2.0, 4.0])
    np.testing.assert_array_equal(pool.statistics.variance, [1.0, 4.0])


def test_a_large_mean_costs_no_precision():
    values = np.random.RandomState(0).normal(1e6, 1e-2, [60, 1])
    pool = Pool()
    for part in np.split(values, 20):
        pool.add(_batch(part))
    np.testing.assert_allclose(pool.statistics.variance, values.var(0), rtol=1e-6)
