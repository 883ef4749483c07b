"""The layers of what was examined, as the reports show them."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.checkpoints.layer_values import CheckpointValues, LayerValues
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
    by_name = {layer.name: layer for layer in graph_layers}
    spreads: dict[str, list] = {}
    for checkpoint in history:
        for found in checkpoint.layers:
            spread = _spreads(found, checkpoint.step)
            if spread is not None:
                spreads.setdefault(found.layer.scope, []).append(spread)
    rows = [
        row_of(layer, by_name.get(layer.layer.scope), values.step)._replace(
            history=tuple(spreads.get(layer.layer.scope, ()))
        )
        for layer in values.layers
    ]
    known = {row.name for row in rows}
    # A graph may have layers that its saver leaves out.
    rows += [row_of(None, layer) for layer in graph_layers if layer.name not in known]
    return tuple(rows)


def row_of(
    found: LayerValues | None, layer: GraphLayer | None, step: int | None = None
) -> LayerRow:
    """The row of a layer of a checkpoint, of its graph, or of both."""
    row = LayerRow(found.layer.scope if found else layer.name)
    if layer is not None:
        row = row._replace(
            kind=layer.kind,
            decay=layer.decay,
            epsilon=layer.epsilon,
            mode=layer.mode,
            layout=layer.layout,
            channels=layer.channels,
        )
    if found is None:
        return row
    # Where they differ, which is a finding of its own, the largest is the likely one.
    sizes = [values.size for values in found.values.values()]
    row = row._replace(channels=max(sizes, default=row.channels))
    spreads = _spreads(found, step)
    if spreads is None:
        return row
    return row._replace(mean=spreads[0], deviation=spreads[1])


def _spreads(found, step):
    if not found.has_statistics:
        return None
    mean, variance = (found.values[role] for role in STATISTICS)
    return _spread(mean, step), _spread(np.sqrt(np.maximum(variance, 0)), step)


def _spread(values, step):
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Spread((float("nan"),) * len(_QUANTILES), step)
    return Spread(tuple(float(q) for q in np.percentile(finite, _QUANTILES)), step)
