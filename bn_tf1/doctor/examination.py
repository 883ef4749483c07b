"""What is wrong with the batch norm in somebody's files: the examination of one path.

A path is a checkpoint (its prefix or .index file, in the format that TensorFlow has
written since 0.12), a .meta file, a frozen graph, the directory of a SavedModel, or a
training directory. Its content tells what it is, not its name. How an examination is
shown is the matter of the reports.

Contract: no model code, no graph is imported or run. A path that cannot be read is a
`ValueError` that names it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Sequence

import numpy as np

from bn_tf1.checkpoints.found_layers import STATISTICS
from bn_tf1.checkpoints.layer_values import CheckpointValues, LayerValues
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.doctor.checkpoint_checks.whole_checkpoint import (
    audit_file,
    check_tensors,
    graph_beside,
    saved_layers,
)
from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.lint import lint_facts
from bn_tf1.doctor.train_directories.directory import examine_directory
from bn_tf1.doctor.train_directories.state_file import STATE_FILE, is_train_directory
from bn_tf1.formats.sorted_table import is_table
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.layer_analysis import GraphLayer
from bn_tf1.graphs.view import read_graph

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt")


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


class Examination(NamedTuple):
    """What was found at one path.

    Attributes:
        path: the path as it was given.
        kind: "checkpoint", "graph", "saved_model" or "training directory".
        layers: its batch-norm layers.
        findings: what is wrong, the gravest first.
        step: the global step of the checkpoint; None without one.
    """

    path: str
    kind: str
    layers: tuple[LayerRow, ...]
    findings: tuple[Finding, ...]
    step: int | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether nothing graver than a note was found."""
        return all(finding.gravity == "note" for finding in self.findings)


def examine(path: str) -> Examination:
    """Examines what is at `path`.

    Raises:
        ValueError: there is nothing at `path`, it cannot be read, or it is nothing that
            can be examined.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise ValueError(f"{path!r} is no path")
    try:
        return _examiner(path)(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def audit(checkpoint: str) -> list[Finding]:
    """What is wrong, or may be, with the batch norm of a checkpoint.

    Tensors are read in pieces, so that memory does not grow with the checkpoint.

    Args:
        checkpoint: prefix of a checkpoint ("model.ckpt-1000"), its .index file, or a
            training directory or the directory of a SavedModel; the findings on these
            include those on their graph.

    Returns:
        The findings, the gravest first.

    Raises:
        ValueError: there is no checkpoint, or it cannot be read.
    """
    examination = examine(checkpoint)
    if examination.kind == "graph":
        raise ValueError(f"{checkpoint} is a graph and no checkpoint: use bn_tf1.lint")
    return list(examination.findings)


def _examiner(path):
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in _SAVED_MODEL):
            return _examine_saved_model
        if is_train_directory(path):
            return _examine_directory
        raise ValueError(
            f"directory {path} has neither a checkpoint nor a SavedModel: give a "
            "training directory, a checkpoint's prefix or a graph"
        )
    if os.path.exists(path + ".index") or _PART.search(path):
        return _examine_checkpoint
    if not os.path.exists(path):
        raise ValueError(
            f"there is nothing at {path}, and no {path}.index: give a checkpoint's "
            "prefix, a .meta file, a graph or a directory"
        )
    if os.path.basename(path) == STATE_FILE:
        return lambda file: _examine_directory(os.path.dirname(file) or ".")
    if is_table(path):
        raise CheckpointError(
            f"{path} is a checkpoint in TensorFlow's first format, which is not examined: "
            f"write it anew with python -m bn_tf1 convert {path} NEW --from slim --to slim "
            "(or the library that made it), and examine NEW"
        )
    return _examine_graph


def _examine_graph(path):
    facts = Facts(read_graph(path))
    rows = tuple(_row(None, layer) for layer in facts.graph_layers())
    return Examination(path, "graph", rows, tuple(lint_facts(facts)))


def _examine_saved_model(path):
    facts = Facts(read_graph(path))
    layers = facts.graph_layers()
    findings = lint_facts(facts)
    prefix = os.path.join(path, "variables", "variables")
    if not os.path.exists(prefix + ".index"):  # a frozen one has no variables
        rows = tuple(_row(None, layer) for layer in layers)
        return Examination(path, "saved_model", rows, tuple(findings))
    values, found = _audited(prefix, saved_layers(facts.view, layers))
    rows = _rows(values, layers)
    return Examination(
        path, "saved_model", rows, tuple(by_gravity([*findings, *found])), values.step
    )


def _examine_checkpoint(path):
    prefix = _PART.sub("", path)
    layers, findings = graph_beside(prefix)
    values, found = _audited(prefix, layers)
    return Examination(
        path,
        "checkpoint",
        _rows(values, layers),
        tuple(by_gravity([*findings, *found])),
        values.step,
    )


def _audited(prefix, graph_layers):
    file = open_tensors(prefix)
    found = audit_file(file, graph_layers)
    return found.values, [*found.findings, *check_tensors(file, found.values)]


def _examine_directory(path):
    found = examine_directory(path)
    if found.newest is None and not found.findings:
        raise CheckpointError(f"directory {path} has no checkpoint")
    newest = found.newest or CheckpointValues(path, None, (), {})
    return Examination(
        path,
        "training directory",
        _rows(newest, found.graph_layers, found.history),
        found.findings,
        newest.step,
    )


def _rows(
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
        _row(layer, by_name.get(layer.layer.scope), values.step)._replace(
            history=tuple(spreads.get(layer.layer.scope, ()))
        )
        for layer in values.layers
    ]
    known = {row.name for row in rows}
    rows += [_row(None, layer) for layer in graph_layers if layer.name not in known]
    return tuple(rows)


def _row(
    found: LayerValues | None, layer: GraphLayer | None, step: int | None = None
) -> LayerRow:
    row = LayerRow(found.layer.scope if found else layer.name)
    if layer is not None:
        row = row._replace(
            kind=layer.kind,
            decay=layer.decay,
            epsilon=layer.epsilon,
            mode=layer.mode,
            layout=layer.layout,
        )
    if found is None:
        return row
    sizes = [values.size for values in found.values.values()]
    row = row._replace(channels=max(sizes, default=None))
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
