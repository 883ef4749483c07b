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

from bn_tf1.population.variable_cells import Cell, cell_of, kept, write


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
        rows = [header, *rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        for row in rows:
            padded = [text.rjust(width) for text, width in zip(row, widths)]
            lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
        return "\n".join(lines)


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
    feeds = list(feeds)
    grouped = _by_variable(layers)
    _check(grouped, feeds, metric)
    cells = [cell_of(v) for calls in grouped for v in _variables(calls)]
    with kept(session, cells) as saved:
        averaged = [_averaged(session, calls, feeds, training) for calls in grouped]
        # An update in place may have moved them.
        write(session, {cell: saved[cell.name] for cell in cells})
        values = [saved[cell.name] for cell in cells]
        moving = list(zip(values[0::2], values[1::2]))
        if metric is None:
            return Divergence(_ranked(grouped, moving, averaged, epsilon))
        bench = _Bench(session, feeds, metric, cells, training, inference)
        return _with_metric(bench, grouped, moving, averaged, epsilon)


def _by_variable(layers):
    """The calls of each layer: those that share a moving mean."""
    grouped: dict[str, list] = {}
    for call in layers:
        grouped.setdefault(call.moving_mean.op.name, []).append(call)
    return list(grouped.values())


def _variables(calls):
    return calls[0].moving_mean, calls[0].moving_variance


def _check(grouped, feeds, metric):
    if not grouped:
        raise ValueError("`layers` is empty: there is no batch-norm layer to compare")
    if not feeds:
        raise ValueError("`feeds` is empty, but must hold at least one batch")
    for calls in grouped:
        for call in calls:
            if call.batch_mean is None or call.batch_variance is None:
                raise ValueError(
                    f"`layers` has {call.name!r}, which has no batch statistics: build "
                    "it with a tensor `is_training` and give both feeds"
                )
    if metric is not None and not metric.shape.is_compatible_with([]):
        raise ValueError(f"`metric` is {metric!r}, but must be a scalar: its mean")


def _averaged(session, calls, feeds, training):
    """Mean and variance over the batches, float64 of the shape of a variable."""
    fetches = [
        (call.batch_mean, call.batch_variance, *_of_bank(call)) for call in calls
    ]
    runs = [
        np.asarray([mean, variance], np.float64).reshape(2, -1)
        for feed in feeds
        for mean, variance, *is_chosen in session.run(fetches, {**feed, **training})
        if all(is_chosen)
    ]
    if not runs:
        raise ValueError(
            f"`feeds` has no batch for {_name_of(calls)!r}, one of several banks: add some, "
            "or leave it out of `layers`"
        )
    return np.mean(runs, axis=0)


def _of_bank(call):
    """Of a record for one of several banks, whether a run is for it."""
    is_chosen = getattr(call, "is_chosen", None)
    return [] if is_chosen is None else [is_chosen]


def _name_of(calls):
    return getattr(calls[0], "bank_name", calls[0].name)


class _Bench(NamedTuple):
    """Measures the metric with any statistics."""

    session: Any
    feeds: Sequence[Mapping[Any, Any]]
    metric: Any
    cells: Sequence[Cell]
    training: Mapping[Any, Any]
    inference: Mapping[Any, Any]

    def of_batches(self, mode):
        values = [self.session.run(self.metric, {**f, **mode}) for f in self.feeds]
        return float(np.mean(values, dtype=np.float64))

    def of_statistics(self, statistics):
        """The metric with (mean, variance) for each layer."""
        values = [value for pair in statistics for value in pair]
        write(self.session, dict(zip(self.cells, values)))
        return self.of_batches(self.inference)


def _with_metric(bench, grouped, moving, averaged, epsilon):
    batch = bench.of_batches(bench.training)
    before = bench.of_statistics(moving)
    population = bench.of_statistics(averaged)
    found = []
    for i, layer in enumerate(_distances(grouped, moving, averaged, epsilon)):
        # Both ways: beside other broken layers, mending one alone gains nothing.
        repaired = bench.of_statistics([*moving[:i], averaged[i], *moving[i + 1 :]])
        alone = bench.of_statistics([*averaged[:i], moving[i], *averaged[i + 1 :]])
        damage = max(_gain(repaired, before), _gain(population, alone))
        found.append(layer._replace(repaired=repaired, alone=alone, damage=damage))
    ranked = sorted(found, key=lambda x: (x.damage, _rank(x)), reverse=True)
    return Divergence(tuple(ranked), before, batch, population)


def _gain(after, before):
    """after - before, where NaN is worse than any number."""
    if math.isnan(before):
        return 0.0 if math.isnan(after) else math.inf
    return -math.inf if math.isnan(after) else after - before


def _ranked(grouped, moving, averaged, epsilon):
    found = _distances(grouped, moving, averaged, epsilon)
    return tuple(sorted(found, key=_rank, reverse=True))


def _rank(layer):
    return layer.mean_distance + math.log(layer.variance_ratio)


def _distances(grouped, moving, averaged, epsilon):
    found = []
    for calls, old, new in zip(grouped, moving, averaged):
        mean, variance = (np.asarray(v, np.float64).reshape(-1) for v in old)
        with np.errstate(invalid="ignore", divide="ignore"):
            distance = np.abs(new[0] - mean) / np.sqrt(variance + epsilon)
            ratio = np.abs(np.log((new[1] + epsilon) / (variance + epsilon)))
        found.append(
            LayerDivergence(
                _name_of(calls),
                _largest(distance),
                math.exp(min(_largest(ratio), 700.0)),
            )
        )
    return found


def _largest(values):
    """The largest value; NaN, of statistics that are no numbers, is the largest."""
    largest = float(np.max(values))
    return math.inf if math.isnan(largest) else largest
