"""Passes over batches that measure the population's statistics of layers.

    in_one_pass               in training mode: every layer behind the batch statistics of
                              those before it
    behind_final_statistics   layer by layer, a pass for each, in inference mode
    mismatches                a pass in inference mode: what the means really are then

How a network gets given statistics and switches to inference is for `give` to say: a
function of the `PooledStatistics` of each layer that returns what is fed besides.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.population.measured_layers import MeasuredLayer
from bn_tf1.population.packed_fetches import PackedFetches
from bn_tf1.population.pooling import Pool, PooledStatistics
from bn_tf1.population.probes import Probe, of_input

Give = Callable[[Sequence[PooledStatistics]], Mapping[Any, Any]]


def unwatched(feeds: Iterable[Any], name: str) -> Iterable[Any]:
    """The `watch` of passes that nobody watches."""
    return feeds


class Passes(NamedTuple):
    """Runs of a session over all batches.

    Attributes:
        session: the session.
        batches: the feeds; iterated once for each pass.
        num_batches: how many there must be; None for as many as there are.
        watch: called with the feeds of a pass and its name; gives them back.
    """

    session: Any
    batches: Iterable[Mapping[Any, Any]]
    num_batches: int | None = None
    watch: Callable = unwatched

    def in_one_pass(self, layers: Sequence[MeasuredLayer]) -> list[Pool]:
        """The batch statistics of all calls, pooled for each layer."""
        probes = [[call.probe for call in layer.calls] for layer in layers]
        return self._pools("statistics", layers, probes, {})

    def behind_final_statistics(
        self,
        layers: Sequence[MeasuredLayer],
        first: Sequence[PooledStatistics],
        give: Give,
    ) -> list[Pool]:
        """Layer by layer, which are `in_order`, beginning with statistics `first`."""
        known, pools = list(first), []
        for i in range(len(layers)):
            name = f"layer {i + 1} of {len(layers)}"
            layer = layers[i : i + 1]
            pools += self._pools(name, layer, _input_probes(layer), give(known))
            known[i] = pools[i].statistics
        return pools

    def mismatches(
        self,
        layers: Sequence[MeasuredLayer],
        final: Sequence[PooledStatistics],
        give: Give,
    ) -> list[float]:
        """How far the means in inference mode are from `final`, in deviations."""
        fed = give(final)
        pools = self._pools("mismatch", layers, _input_probes(layers), fed)
        return [
            distance(pool.statistics.mean, statistics, layer.epsilon)
            for pool, statistics, layer in zip(pools, final, layers)
        ]

    def _pools(self, of, layers, probes: Sequence[Sequence[Probe]], fed):
        pools = [Pool() for _ in layers]
        packed = PackedFetches(
            tensor for row in probes for probe in row for tensor in probe.tensors()
        )
        count = 0
        feeds = itertools.islice(iter(self.batches), self.num_batches)
        for feed in self.watch(feeds, of):
            try:
                values = self.session.run(packed.fetches, {**feed, **fed})
            except tf.errors.OutOfRangeError:  # an input pipeline is at its end
                break
            by_name = packed.by_name(values)
            # Of all at once: the packed values are few, and the layers may be many.
            is_finite = all(np.all(np.isfinite(value)) for value in values)
            for pool, layer, row in zip(pools, layers, probes):
                for probe in row:
                    found = probe.batch([by_name[t.name] for t in probe.tensors()])
                    pool.add(_checked(found, layer.name, count, is_finite))
            count += 1
        self._check(count, pools, layers)
        return pools

    def _check(self, count, pools, layers):
        if count < (self.num_batches or 1):
            wanted = self.num_batches or "at least 1"
            raise ValueError(
                f"`num_batches` is {wanted}, but `batches` has {count}; nothing was "
                "written"
            )
        for pool, layer in zip(pools, layers):
            if not pool.count:
                raise ValueError(
                    f"no batch has a value for the layer {layer.name!r}"
                    + (
                        ", since none chooses this bank: feed such batches, too, or give "
                        "`layers` without it"
                        if any(call.is_of_a_bank for call in layer.calls)
                        else ""
                    )
                )


def distance(mean: np.ndarray, statistics: PooledStatistics, epsilon: float) -> float:
    """The largest distance of `mean` from that of `statistics`, in its deviations."""
    difference = np.abs(mean - statistics.mean)
    deviation = np.sqrt(statistics.variance + epsilon)
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = np.where(difference == 0, 0.0, difference / deviation)
    return float(np.max(np.where(np.isnan(distances), np.inf, distances)))


def in_order(layers: Sequence[MeasuredLayer]) -> list[MeasuredLayer]:
    """The layers, those first that are first in the graph."""
    operations = layers[0].calls[0].probe.fetches[0].graph.get_operations()
    place = {op: number for number, op in enumerate(operations)}
    return sorted(layers, key=lambda layer: place[layer.calls[0].probe.fetches[0].op])


def _input_probes(layers):
    return [
        [
            call.input if isinstance(call.input, Probe) else of_input(call.input)
            for call in layer.calls
        ]
        for layer in layers
    ]


def _checked(batch, name, number, is_finite):
    if batch is None:
        raise ValueError(
            f"batch {number} runs the layer {name!r} with its moving statistics: "
            "`batches` must switch the network to training, as {is_training: True} does"
        )
    if is_finite or not batch.count:
        return batch
    if not all(np.all(np.isfinite(v)) for v in batch.statistics):
        raise ValueError(
            f"batch {number} has statistics of the layer {name!r} that are not finite; "
            "nothing was written"
        )
    return batch
