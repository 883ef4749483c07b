"""How the statistics of a batch are had from one call of a layer.

    of_statistics   the layer computes them itself, in training mode: they are fetched
    of_input        they are computed from what the layer normalises, in any mode

FusedBatchNorm, V1 to V3, gives the mean and the unbiased variance in outputs 1 and 2, on
every device, unless it averages them itself (exponential_avg_factor < 1); then outputs 3
and 4 of the CPU's kernel are the batch's mean and biased variance.

Contract: no operation is added to a finalized graph: there the input itself is fetched,
and its statistics are computed here. Operations that are added are added once.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.population.pooling import BatchStatistics, PooledStatistics

# A tuple, as in `built_layers`: what has a string for a key is written with the graph.
_MADE_KEY = ("bn_tf1_population_probes",)


class Probe(NamedTuple):
    """What to fetch, and what it means.

    Attributes:
        fetches: tensors.
        read: from their values to `BatchStatistics`.
        switch: a tensor that tells whether the layer uses batch statistics; None where
            none does.
        when: the value that it has then.
        is_chosen: a scalar bool tensor, whether a run is for this bank of the layer; None
            where each is.
    """

    fetches: tuple[tf.Tensor, ...]
    read: Callable[[Sequence[np.ndarray]], BatchStatistics]
    switch: Any = None
    when: int = 1
    is_chosen: Any = None

    def tensors(self) -> list[tf.Tensor]:
        """All that is to be fetched."""
        switches = self.switch, self.is_chosen
        return [*self.fetches, *(s for s in switches if s is not None)]

    def batch(self, values: Sequence[np.ndarray]) -> BatchStatistics | None:
        """What the values of `tensors` mean; None without batch statistics.

        A run for another bank has no values for this one.
        """
        values = list(values)
        if self.is_chosen is not None and not values.pop():
            return _OF_ANOTHER_BANK
        if self.switch is not None and int(values[-1]) != self.when:
            return None
        return self.read(values[: len(self.fetches)])


# Of no values, and so of no channels: a pool takes nothing of it.
_OF_ANOTHER_BANK = BatchStatistics(0.0, PooledStatistics(np.zeros([0]), np.zeros([0])))


def of_statistics(
    mean: tf.Tensor, variance: tf.Tensor, *, size: tf.Tensor, unbiased: bool = False
) -> Probe:
    """The probe of a layer that gives its batch statistics, of any shape.

    `size` is the number of values that they were computed from, or these values themselves.
    """
    mean, variance, is_fused = _of_fused(mean, variance)

    def read(values):
        found, size = PooledStatistics.of(*values[:2]), values[2]
        # In a finalized graph, the values themselves are fetched for their number.
        count = float(size if np.ndim(size) == 0 else size.size) / found.mean.size
        if (unbiased or is_fused) and count > 1:
            found = found._replace(variance=found.variance * ((count - 1) / count))
        return BatchStatistics(count, found)

    return Probe((mean, variance, size), read)


def _of_fused(mean, variance):
    """(mean, variance, whether it is unbiased), of the kernel that makes them if any."""
    op = variance.op
    if "FusedBatchNorm" not in op.type or "Grad" in op.type:
        return mean, variance, False
    factor = 1.0
    # The kernels of 1.15 have no such attribute.
    if "exponential_avg_factor" in op.node_def.attr:
        factor = op.get_attr("exponential_avg_factor")
    if variance.value_index == 2 and factor < 1:
        return op.outputs[3], op.outputs[4], False
    return mean, variance, variance.value_index == 2


def of_input(
    x: tf.Tensor, axis: Any, weights: Any = None, is_chosen: Any = None
) -> Probe:
    """The probe of a layer by what it normalises, of known rank and channels.

    Args:
        x: that.
        axis: its channel axis, or several of them.
        weights: how much a value counts, as in `batch_norm`; None for 1.
        is_chosen: as in `Probe`.
    """
    kept = statistics.channel_axes(x.shape.ndims, axis)
    axes = tuple(axis for axis in range(x.shape.ndims) if axis not in kept)
    # A MonitoredSession has finalized it: then whole inputs are fetched.
    if x.graph.finalized:
        fetches = (x,) if weights is None else (x, weights)
        read = functools.partial(_in_numpy, axes=axes)
        return Probe(fetches, read, is_chosen=is_chosen)
    key = "moments", x.name, axes, getattr(weights, "name", None)
    made = made_once(x.graph, key, lambda: _moments(x, axes, weights))
    return Probe(made, _read_moments, is_chosen=is_chosen)


def _read_moments(values):
    mean, variance, count = values
    return BatchStatistics(float(count), PooledStatistics.of(mean, variance))


def _moments(x, axes, weights):
    x = tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)
    if weights is None:
        mean, variance = tf.nn.moments(x, axes)
        return mean, variance, tf.size(x) // tf.size(mean)
    weights = statistics.weights_like(x, tf.cast(weights, x.dtype))
    weights *= tf.ones_like(x)
    mean, variance = tf.nn.weighted_moments(x, axes, weights)
    return mean, variance, tf.reduce_sum(weights) / tf.cast(tf.size(mean), x.dtype)


def _in_numpy(values, axes):
    x = np.float64(values[0])
    weights = np.ones(())
    if len(values) > 1:
        weights = np.float64(values[1])
        weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    # In float64, which costs nothing beside fetching the whole input.
    weights = np.broadcast_to(weights, x.shape)
    count = weights.sum(axes, keepdims=True)
    divisor = count if np.any(count) else np.ones_like(count)
    mean = (x * weights).sum(axes, keepdims=True) / divisor
    variance = ((x - mean) ** 2 * weights).sum(axes, keepdims=True) / divisor
    return BatchStatistics(float(count.flat[0]), PooledStatistics.of(mean, variance))


def size_of(x: tf.Tensor) -> tf.Tensor:
    """A tensor with the number of values of `x`; `x` itself where none can be made."""
    # An operation costs less than a large tensor that is fetched to be counted.
    if x.graph.finalized:
        return x
    key = "size", x.name
    return made_once(x.graph, key, lambda: tf.size(x, out_type=tf.int64))


def made_once(graph: tf.Graph, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` made in `graph`, outside of all conditions, the first time for `key`."""
    collection = graph.get_collection_ref(_MADE_KEY)
    if not collection:
        collection.append({})
    made = collection[0]
    if key not in made:
        # Who asks may be inside of a cond, or wait for something: what is kept must not.
        with graph.as_default(), tf.control_dependencies(None):
            made[key] = make()
    return made[key]
