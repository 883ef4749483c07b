"""The layers of what was examined, as the reports show them."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.checkpoints.layer_values import CheckpointValues
from bn_tf1.graphs.layer_analysis import GraphLayer

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


class Spread(NamedTuple):
    """The distribution of a statistic over the channels of a layer.

    Attributes:
        quantiles: the minimum, 5, 25, 50, 75, 95 % and the maximum of the finite values.
        step: the global step of the checkpoint; None where it has none.
    """

    quantiles: tuple[float, ...]
    step: int | None


class LayerRow(NamedTuple):
    """A layer as a report shows it; what is not known is None or "".

    Attributes:
        name: its scope.
        kind: "fused", "composed", "folded" or "".
        channels: the number of its channels.
        decay, epsilon, mode, layout: as a graph tells them.
        mean, deviation: the moving mean and the root of the moving variance.
        history: (mean, deviation) for each checkpoint of a training directory.
    """

    name: str
    kind: str = ""
    channels: int | None = None
    decay: float | None = None
    epsilon: float | None = None
    mode: str = ""
    layout: str = ""
    mean: Spread | None = None
    deviation: Spread | None = None
    history: tuple[tuple[Spread, Spread], ...] = ()


def rows_of(
    values: CheckpointValues,
    graph_layers: Sequence[GraphLayer],
    history: Sequence[CheckpointValues] = (),
) -> tuple[LayerRow, ...]:
    """The layers of a checkpoint, then those that only its graph has."""
    of_graph = {layer.name: _row_of_graph(layer) for layer in graph_layers}
    spreads: dict[str, list] = {}
    for checkpoint in history:
        for found in checkpoint.layers:
            spread = _spreads(found, checkpoint.step)
            if spread is not None:
                spreads.setdefault(found.layer.scope, []).append(spread)
    rows = []
    for found in values.layers:
        name = found.layer.scope
        row = of_graph.get(name, LayerRow(name))
        # Where sizes differ, which is a finding of its own, the largest is the likely one.
        sizes = [value.size for value in found.values.values()]
        mean, deviation = _spreads(found, values.step) or (None, None)
        row = row._replace(
            channels=max(sizes, default=row.channels),
            mean=mean,
            deviation=deviation,
            history=tuple(spreads.get(name, ())),
        )
        rows.append(row)
    known = {row.name for row in rows}
    # A graph may have layers that its saver leaves out.
    return (*rows, *(_row_of_graph(x) for x in graph_layers if x.name not in known))


def _row_of_graph(layer):
    return LayerRow(
        layer.name,
        layer.kind,
        layer.channels,
        layer.decay,
        layer.epsilon,
        layer.mode,
        layer.layout,
    )


def _spreads(found, step):
    if not found.has_statistics:
        return None
    mean, variance = (found.values[role] for role in STATISTICS)
    # A negative variance has a finding of its own, and no root.
    return _spread(mean, step), _spread(np.sqrt(np.maximum(variance, 0)), step)


def _spread(values, step):
    # One NaN would make every quantile NaN; it has a finding of its own.
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Spread((float("nan"),) * len(_QUANTILES), step)
    return Spread(tuple(float(q) for q in np.percentile(finite, _QUANTILES)), step)
