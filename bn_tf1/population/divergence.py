"""Which layer breaks evaluation: batch against moving statistics on the same data.

A network that is good in training and bad in evaluation has, in some layer, moving
statistics that are not those of the data. `divergence` runs batches in training mode,
averages their statistics, and measures a metric

    moving      with the moving statistics, as evaluation does,
    batch       with the statistics of each batch, as training does,
    population  with the averaged statistics in the place of all moving ones,
    repaired    with those of one layer only, all others moving,
    alone       with those of all other layers, this one moving.

The damage that a layer does is max(repaired - moving, population - alone): what it
costs by itself. One spoilt layer shows in both, many at once in the second.

Contract: the variables are afterwards as they were, also after an error. No operation is
added to the graph.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import unfit
from bn_tf1.population.measured_layers import grouped
from bn_tf1.population.pooling import (
    PooledStatistics,
    distance,
    table,
    variance_ratio,
)
from bn_tf1.population.variable_cells import kept, write


class LayerTensors(NamedTuple):
    """A layer of another library; a `BatchNormCall` can be given as it is.

    Attributes:
        name: what to call it.
        moving_mean, moving_variance: variables of one number for each channel.
        batch_mean, batch_variance: tensors with the statistics of a batch.
        x: the tensor that they are the statistics of; needed where the graph does not
            tell, or to measure it in inference mode.
    """

    name: str
    moving_mean: Any
    moving_variance: Any
    batch_mean: Any
    batch_variance: Any
    x: Any = None


class LayerDivergence(NamedTuple):
    """How far the statistics of one layer are apart, and what that costs.

    Attributes:
        name: the layer.
        mean_distance: the largest distance of a batch mean from its moving mean, in
            moving deviations.
        variance_ratio: the largest factor, >= 1, between a batch variance and its moving
            variance.
        repaired, alone: the metric, as the module says; None without one.
        damage: in units of the metric; None without one.
    """

    name: str
    mean_distance: float
    variance_ratio: float
    repaired: float | None = None
    alone: float | None = None
    damage: float | None = None


class Divergence(NamedTuple):
    """The layers, the most damaging first; its str() is a table.

    Attributes:
        layers: the layers, by damage, or by distance without a metric.
        moving, batch, population: the metric, as the module says; None without one.
    """

    layers: tuple[LayerDivergence, ...]
    moving: float | None = None
    batch: float | None = None
    population: float | None = None

    def __str__(self) -> str:
        header = ("layer", "mean distance", "variance ratio")
        rows = [
            (layer.name, f"{layer.mean_distance:.3g}", f"{layer.variance_ratio:.3g}")
            for layer in self.layers
        ]
        lines = []
        if self.moving is not None:
            lines.append(
                f"moving statistics: {self.moving:.4f}, batch statistics: "
                f"{self.batch:.4f}, averaged batch statistics: {self.population:.4f}"
            )
            header += ("damage", "repaired", "alone")
            rows = [
                row + tuple(f"{v:.4f}" for v in (layer.damage, *layer[3:5]))
                for row, layer in zip(rows, self.layers)
            ]
        return "\n".join(lines + table(header, rows))


def divergence(
    session: tf.Session,
    layers: Sequence[Any],
    feeds: Iterable[Mapping[Any, Any]],
    *,
    training: Mapping[Any, Any],
    inference: Mapping[Any, Any],
    metric: tf.Tensor | None = None,
    epsilon: float = 1e-3,
) -> Divergence:
    """Compares the batch statistics of layers with their moving ones.

    Args:
        session: a session on the graph, with its variables restored.
        layers: `bn_tf1.batch_norm_calls()`, or `LayerTensors`; several of one moving mean
            are one layer.
        feeds: the batches, one feed each, without the mode; kept in memory.
        training: the feed that switches to batch statistics, {is_training: True}.
        inference: the feed that switches to moving ones, {is_training: False}.
        metric: scalar tensor of which more is better, such as the accuracy of a batch.
        epsilon: what the layers add to the variance.

    Returns:
        The `Divergence`.

    Raises:
        ValueError: `layers` or `feeds` is empty; a layer has no batch statistics, since
            it was built with is_training=False; `metric` is no scalar; no feed is for
            one of several banks of a layer; a variable has no value yet.
    """
    # Each measurement of the metric goes through all of them again.
    feeds, found = list(feeds), grouped(layers)
    _check(found, feeds, metric)
    cells = [cell for _, pair, _ in found for cell in pair]
    with kept(session, cells) as saved:
        averaged = _averaged(session, found, feeds, training)
        # An update in place may have moved them.
        write(session, {cell: saved[cell.name] for cell in cells})
        moving = [
            PooledStatistics.of(*(saved[cell.name] for cell in pair))
            for _, pair, _ in found
        ]
        apart = [
            LayerDivergence(
                name,
                distance(new.mean, old, epsilon),
                variance_ratio(new, old, epsilon),
            )
            for (name, _, _), old, new in zip(found, moving, averaged)
        ]
        # Without a metric there is no damage to rank by, only how far they are apart.
        if metric is None:
            return Divergence(tuple(sorted(apart, key=_rank, reverse=True)))

        def of_batches(mode):
            values = [session.run(metric, {**feed, **mode}) for feed in feeds]
            return float(np.mean(values, dtype=np.float64))

        def of_statistics(statistics):
            values = [value for pair in statistics for value in pair]
            # Into the variables themselves: every library's inference mode reads those.
            write(session, dict(zip(cells, values)))
            return of_batches(inference)

        return _with_metric(
            apart, moving, averaged, of_batches(training), of_statistics
        )


def _check(layers, feeds, metric):
    if not layers:
        raise ValueError("`layers` is empty: there is no batch-norm layer to compare")
    if not feeds:
        raise ValueError("`feeds` is empty, but must hold at least one batch")
    for _, _, calls in layers:
        for call in calls:
            if call.batch_mean is None or call.batch_variance is None:
                raise ValueError(
                    f"`layers` has {call.name!r}, which has no batch statistics: build "
                    "it with a tensor `is_training` and give both feeds"
                )
    if metric is not None and not metric.shape.is_compatible_with([]):
        raise unfit("metric", metric, "be a scalar: its mean")


def _averaged(session, layers, feeds, training):
    """The mean of the batches' means, and of their variances, for each layer."""
    fetches = [[_fetches(call) for call in calls] for _, _, calls in layers]
    runs = [[] for _ in layers]
    # All layers in one run: dropout and other noise is then the same for all of them.
    for feed in feeds:
        for found, calls in zip(runs, session.run(fetches, {**feed, **training})):
            found += [
                PooledStatistics.of(mean, variance)
                for mean, variance, *is_chosen in calls
                if all(is_chosen)
            ]
    for found, (name, _, _) in zip(runs, layers):
        if not found:
            raise ValueError(
                f"`feeds` has no batch for {name!r}, one of several banks: add some, or "
                "leave it out of `layers`"
            )
    # As moving averages do it: without the spread of the means in the variance.
    return [PooledStatistics(*np.mean(found, axis=0)) for found in runs]


def _fetches(call):
    """The statistics of a batch; of one of several banks, whether the run is for it, too."""
    is_chosen = getattr(call, "is_chosen", None)
    # What a run for another bank gives are the statistics of that one's data.
    switch = [] if is_chosen is None else [is_chosen]
    return [call.batch_mean, call.batch_variance, *switch]


def _with_metric(layers, moving, averaged, batch, of_statistics):
    before, population = of_statistics(moving), of_statistics(averaged)
    found = []
    for i, layer in enumerate(layers):
        # Both ways: beside other broken layers, mending one alone gains nothing.
        repaired = of_statistics([*moving[:i], averaged[i], *moving[i + 1 :]])
        alone = of_statistics([*averaged[:i], moving[i], *averaged[i + 1 :]])
        damage = max(_gain(repaired, before), _gain(population, alone))
        found.append(layer._replace(repaired=repaired, alone=alone, damage=damage))
    ranked = sorted(found, key=lambda x: (x.damage, _rank(x)), reverse=True)
    return Divergence(tuple(ranked), before, batch, population)


def _gain(after, before):
    """after - before, where NaN is worse than any number."""
    if math.isnan(before):
        return 0.0 if math.isnan(after) else math.inf
    return -math.inf if math.isnan(after) else after - before


def _rank(layer):
    return layer.mean_distance + math.log(layer.variance_ratio)
