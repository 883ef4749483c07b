"""Passes over batches that measure the population's statistics of layers.

    statistics     in training mode: every layer behind the batch statistics of those before
    layer i of n   exact: layer by layer, a pass for each, in inference mode
    mismatch       in inference mode: what the means really are then

How a network gets given statistics and switches to inference is for `give` to say: a
function of the `PooledStatistics` of each layer that returns what is fed besides.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.population.measured_layers import MeasuredLayer
from bn_tf1.population.pooling import Pool, PooledStatistics, distance
from bn_tf1.population.probes import Probe, made_once

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

    def measured(
        self, layers: Sequence[MeasuredLayer], give: Give | None, *, exact: bool
    ) -> list[tuple[PooledStatistics, float, float | None]]:
        """(the statistics, of how many values they are, the mismatch or None) by layer.

        With `exact` the layers are in the order of the graph. Without `give` there is no
        mismatch.
        """
        training = [[call.probe for call in layer.calls] for layer in layers]
        # Made where they are needed only: they are operations in somebody's graph.
        inputs = []
        if give is not None:
            inputs = [[call.input() for call in layer.calls] for layer in layers]
        pools = self._pools("statistics", layers, training, {})
        if exact:
            # Those of the first pass stand in for what is not final yet; a layer sees only
            # those before it, which are.
            known = [pool.statistics for pool in pools]
            for i, layer in enumerate(layers):
                name = f"layer {i + 1} of {len(layers)}"
                (pools[i],) = self._pools(name, [layer], [inputs[i]], give(known))
                known[i] = pools[i].statistics
        # As the variables of the layers will hold them.
        dtypes = [x.moving[0].dtype if x.moving else np.float32 for x in layers]
        final = [
            PooledStatistics.of(*(values.astype(dtype) for values in pool.statistics))
            for pool, dtype in zip(pools, dtypes)
        ]
        mismatches = [None] * len(layers)
        if give is not None:
            met = self._pools("mismatch", layers, inputs, give(final))
            mismatches = [
                distance(pool.statistics.mean, statistics, layer.epsilon)
                for pool, statistics, layer in zip(met, final, layers)
            ]
        return list(zip(final, [pool.count for pool in pools], mismatches))

    def _pools(self, of, layers, probes: Sequence[Sequence[Probe]], fed):
        pools = [Pool() for _ in layers]
        fetches, by_name_of = packed_fetches(
            tensor for row in probes for probe in row for tensor in probe.tensors()
        )
        # Counted here: neither an iterator nor an input pipeline tells how many it has.
        count = 0
        # Not one more is taken than is used: an input pipeline may be trained on afterwards.
        feeds = itertools.islice(iter(self.batches), self.num_batches)
        for feed in self.watch(feeds, of):
            try:
                values = self.session.run(fetches, {**feed, **fed})
            except tf.errors.OutOfRangeError:  # an input pipeline is at its end
                break
            by_name = by_name_of(values)
            # Of all at once: the packed values are few, and the layers may be many.
            is_finite = all(np.all(np.isfinite(value)) for value in values)
            for pool, layer, row in zip(pools, layers, probes):
                for probe in row:
                    found = probe.batch([by_name[t.name] for t in probe.tensors()])
                    pool.add(_checked(found, layer.name, count, is_finite))
            count += 1
        self._check(count, pools, layers, probes)
        return pools

    def _check(self, count, pools, layers, probes):
        if count < (self.num_batches or 1):
            wanted = self.num_batches or "at least 1"
            raise ValueError(
                f"`num_batches` is {wanted}, but `batches` has {count}; nothing was "
                "written"
            )
        for pool, layer, row in zip(pools, layers, probes):
            if not pool.count:
                what = f"no batch has a value for the layer {layer.name!r}"
                if any(probe.is_chosen is not None for probe in row):
                    what += ", since none chooses this bank: feed such batches, too, "
                    what += "or give `layers` without it"
                raise ValueError(what)


def packed_fetches(
    tensors: Iterable[tf.Tensor],
) -> tuple[list[tf.Tensor], Callable[[Sequence[Any]], dict[str, np.ndarray]]]:
    """What to fetch for `tensors`, and a function from that to the value by their names.

    Vectors of one dtype are concatenated and scalars stacked: a session spends more on each
    fetch than a small layer does. A finalized graph takes no operation for that.
    """
    groups: dict[Any, list[tf.Tensor]] = {}
    for tensor in {tensor.name: tensor for tensor in tensors}.values():
        key: Any = tensor.name
        is_small = tensor.shape.ndims in (0, 1) and tensor.shape.is_fully_defined()
        if is_small and not tensor.graph.finalized:
            key = tensor.dtype.base_dtype, tensor.shape.ndims
        groups.setdefault(key, []).append(tensor)

    def by_name(values):
        found = {}
        for group, value in zip(groups.values(), values):
            parts = [value]
            if len(group) > 1:
                ends = np.cumsum([tensor.shape.num_elements() for tensor in group])
                is_of_scalars = group[0].shape.ndims == 0
                parts = list(value) if is_of_scalars else np.split(value, ends[:-1])
            found.update(zip([tensor.name for tensor in group], parts))
        return found

    return [_packed(group) for group in groups.values()], by_name


def _packed(group):
    if len(group) == 1:
        return group[0]
    join = tf.stack if group[0].shape.ndims == 0 else lambda g: tf.concat(g, 0)
    key = ("packed", *(tensor.name for tensor in group))
    return made_once(group[0].graph, key, lambda: join(group))


def in_order(layers: Sequence[MeasuredLayer]) -> list[MeasuredLayer]:
    """The layers, those first that are first in the graph."""
    # A graph's operations are in the order of their making, inputs before what takes them.
    operations = layers[0].calls[0].probe.fetches[0].graph.get_operations()
    place = {op: number for number, op in enumerate(operations)}
    return sorted(layers, key=lambda layer: place[layer.calls[0].probe.fetches[0].op])


def _checked(batch, name, number, is_finite):
    # In inference mode the "batch statistics" of a cond are the moving ones: the result
    # would be what was there before, and nobody would notice.
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
