"""Recalibration: moving statistics replaced by those of the weights as they are now.

Moving averages are those of the weights of many steps, and hardly there after few; of
weights that were averaged or edited afterwards they are none at all. Here training-mode
batches are run once more, and each layer gets the mean and the biased variance of all of
their examples together, whatever the sizes of the batches.

In one pass a layer sees inputs that the layers before it normalised by the batch, while
in inference they are normalised by the population: the mean that it then meets is off by
the layer's *mismatch*, the smaller the larger the batches. `exact` measures layer by
layer, each behind the final statistics of those before it, which costs a pass for each.
To repeat a pass in inference mode until nothing changes is no way: it may diverge.

Contract: moving means and variances are written when all is measured; all else, and on
an error or an interrupt all, is afterwards bit for bit as it was.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 2; Wu
& Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576), section 3.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import check_session, unfit
from bn_tf1.population.measured_layers import MeasuredLayer, given_layers, layers_of
from bn_tf1.population.measuring_passes import Passes, in_order, unwatched
from bn_tf1.population.pooling import (
    PooledStatistics,
    distance,
    table,
    variance_ratio,
)
from bn_tf1.population.variable_cells import (
    kept,
    lack_of_values_told,
    runs_before,
    write,
    written_by,
)


class RecalibratedLayer(NamedTuple):
    """What became of one layer.

    Attributes:
        name: the layer.
        variables: the names of those of its mean, and of those of its variance.
        before: its moving statistics; None where it has none.
        after: the statistics of the population, as they were written.
        count: how many values for each channel they were made from.
        distance: the largest distance of the mean before from that after, in deviations
            of the channel; None without `before`.
        variance_ratio: the largest factor, >= 1, between the two variances.
        mismatch: the largest distance of the mean that inference mode then sees from
            that after, in deviations; None where it was not measured.
    """

    name: str
    variables: tuple[tuple[str, ...], tuple[str, ...]]
    before: PooledStatistics | None
    after: PooledStatistics
    count: float
    distance: float | None
    variance_ratio: float | None
    mismatch: float | None = None


class Recalibration(NamedTuple):
    """What `recalibrate` did; its str() is a table.

    Attributes:
        layers: the layers, in the order of the graph.
        skipped: by name of a layer, or call, that was found but not measured, the
            reason.
    """

    layers: tuple[RecalibratedLayer, ...]
    skipped: Mapping[str, str]

    def values(self) -> dict[str, np.ndarray]:
        """The new values of the variables, by name."""
        return {
            name: values
            for layer in self.layers
            for names, values in zip(layer.variables, layer.after)
            for name in names
        }

    def __str__(self) -> str:
        header = ("layer", "values", "mean moved by", "variance by", "mismatch")
        rows = [
            (
                layer.name,
                f"{layer.count:.0f}",
                _number(layer.distance, "{:.3g} dev."),
                _number(layer.variance_ratio, "x{:.3g}"),
                _number(layer.mismatch, "{:.2g} dev."),
            )
            for layer in self.layers
        ]
        lines = table(header, rows)
        lines += [f"not measured: {n}: {why}" for n, why in self.skipped.items()]
        return "\n".join(lines)


def _number(value, form):
    return "-" if value is None else form.format(value)


def recalibrate(
    session: tf.Session,
    batches: Iterable[Mapping[Any, Any]],
    *,
    num_batches: int | None = None,
    layers: Sequence[Any] | None = None,
    inference: Mapping[Any, Any] | None = None,
    exact: bool = False,
    watch: Callable | None = None,
) -> Recalibration:
    """Replaces moving statistics by the population's: all examples' of `batches`.

    Args:
        session: a session on the graph, with its variables restored.
        batches: a feed for each batch, which switches to training mode, such as
            {images: x, is_training: True}; larger ones give a smaller mismatch. An
            input pipeline in the graph needs no more than [{is_training: True}] * n.
        num_batches: how many of them to run, all by default.
        layers: `bn_tf1.batch_norm_calls()`, `LayerTensors` of any other library, or a
            part of them. By default all of the graph: ours by their records, others as
            the doctor recognises them.
        inference: the feed that switches to inference mode, {is_training: False}. With
            it the mismatch is measured, in a pass of its own; `exact` needs it. More
            passes than one keep the feeds of an iterator in memory, and each feed must
            mean the same examples again.
        exact: layer by layer, each behind the final statistics of those before it.
        watch: called with the feeds of a pass and the name of the pass; gives them back,
            as tqdm does.

    Returns:
        The `Recalibration`.

    Raises:
        TypeError: `session` is none, or `batches` cannot be gone through.
        ValueError: there are fewer batches than `num_batches`; a batch has statistics
            that are not finite, or does not switch to training; a layer of `layers` is
            not reached by them, or no layer at all; a variable has no value yet;
            `exact` without `inference`. Nothing is written.
    """
    check_session(session)
    if not hasattr(batches, "__iter__"):
        must = "be feeds, such as [{images: x, is_training: True}]"
        raise unfit("batches", batches, must, TypeError)
    if num_batches is not None and not num_batches >= 1:
        raise unfit("num_batches", num_batches, "be at least 1")
    if exact and inference is None:
        raise ValueError(
            "`exact` is True, but `inference` is None: give the feed that switches to "
            "inference mode, such as {is_training: False}"
        )
    found = layers_of(session.graph) if layers is None else given_layers(layers)
    if not found:
        raise ValueError("there is no batch-norm layer: give `layers` as LayerTensors")
    # An iterator can be gone through once, and there are several passes.
    if inference is not None and iter(batches) is batches:
        batches = list(batches)
    fed, batches = _fed_by(batches, session.graph)
    measured, skipped = reached(found, fed)
    # What was asked for must be measured; of what was found, some may be left out.
    if skipped and (layers is not None or not measured):
        raise ValueError("; ".join(f"layer {n!r}: {why}" for n, why in skipped.items()))
    # Each layer behind the final statistics of those before it: the graph's order, and not
    # that in which somebody named them.
    if exact:
        measured = in_order(measured)
    passes = Passes(session, batches, num_batches, watch or unwatched)
    give = None
    if inference is not None:
        _check_switchable(measured)

        # The variables have them when the network reads them; at the end they stay there.
        def give(statistics):
            _write(session, measured, statistics)
            return inference

    with lack_of_values_told():
        return _recalibrated(passes, measured, skipped, fed, give, exact)


def _fed_by(batches, graph):
    """(the tensors that the first batch feeds, all batches)."""
    # All batches feed the same tensors, and what none feeds must be told before a long pass.
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("`batches` is empty, but must have at least one batch")
    # An iterator has lost the one that was looked at.
    if iterator is batches:
        batches = itertools.chain([first], iterator)
    keys = [graph.as_graph_element(key, allow_operation=False) for key in first]
    return keys, batches


def reached(
    layers: Sequence[MeasuredLayer], fed: Sequence[tf.Tensor]
) -> tuple[list[MeasuredLayer], dict[str, str]]:
    """The layers with those of their calls that can be measured when `fed` are fed.

    Returns:
        (the layers with such a call, by name of a layer or a call the reason why not).
    """
    probes = [call.probe for layer in layers for call in layer.calls if call.probe]
    # Of all probes at once: most often none lacks anything, and the graph may be large.
    may_lack = _unfed(probes, fed)
    measured, obstacles = [], {}
    for layer in layers:
        calls = []
        for number, call in enumerate(layer.calls, 1):
            unfed = _unfed([call.probe], fed) if may_lack and call.probe else []
            obstacle = call.obstacle
            if unfed:
                obstacle = f"no batch feeds {', '.join(unfed)}"
            if not obstacle:
                calls.append(call)
                continue
            several = f", call {number}" if len(layer.calls) > 1 else ""
            obstacles[layer.name + several] = obstacle
        if calls:
            measured.append(layer._replace(calls=tuple(calls)))
    return measured, obstacles


def _run_by(probes, fed):
    return runs_before([t for probe in probes for t in probe.tensors()], fed)


def _unfed(probes, fed):
    return sorted(op.name for op in _run_by(probes, fed) if op.type == "Placeholder")


def _check_switchable(layers):
    """Raises for a layer that cannot be measured in inference mode."""
    for layer in layers:
        what = None
        if any(call.input is None for call in layer.calls):
            what = (
                "does not tell what it normalises: give it as `x` of its LayerTensors"
            )
        if layer.moving is None:
            what = "has no moving statistics to use in that mode"
        if what is not None:
            raise ValueError(
                f"`inference` is given, but the layer {layer.name!r} {what}"
            )


def _write(session, layers, statistics):
    pairs = zip(layers, statistics)
    write(session, {c: v for layer, s in pairs for c, v in zip(layer.moving or (), s)})


def _recalibrated(passes, layers, skipped, fed, give, exact):
    session = passes.session
    moving = [cell for layer in layers for cell in layer.moving or ()]
    names = {cell.name for cell in moving}
    probes = [call.probe for layer in layers for call in layer.calls]
    # Updates in place and counters run with the batches: their variables are put back.
    others = [c for c in written_by(_run_by(probes, fed)) if c.name not in names]
    # The moving ones are written at the end; until then, an error or an interrupt puts back
    # what updates in place, and the exact passes, have made of them.
    with kept(session, others), kept(session, moving, after_an_error_only=True) as old:
        rows = []
        for layer, row in zip(layers, passes.measured(layers, give, exact=exact)):
            before, variables = None, ((), ())
            if layer.moving:
                before = PooledStatistics.of(*(old[cell.name] for cell in layer.moving))
                variables = tuple((cell.name,) for cell in layer.moving)
            rows.append(compared(layer, variables, before, *row))
        _write(session, layers, [row.after for row in rows])
    return Recalibration(tuple(rows), skipped)


def compared(
    layer: MeasuredLayer,
    variables: tuple[tuple[str, ...], tuple[str, ...]],
    before: PooledStatistics | None,
    after: PooledStatistics,
    count: float,
    mismatch: float | None,
) -> RecalibratedLayer:
    """The row of one layer in the report; the last three as `Passes.measured` gives them."""
    apart = None, None
    if before is not None:
        apart = (
            distance(before.mean, after, layer.epsilon),
            variance_ratio(before, after, layer.epsilon),
        )
    return RecalibratedLayer(
        layer.name, variables, before, after, count, *apart, mismatch
    )
