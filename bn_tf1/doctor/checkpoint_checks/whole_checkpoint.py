"""The checks of one checkpoint, with what the graph beside it tells.

Contract: a checkpoint that cannot be opened is a `CheckpointError`; what is wrong inside
of it is a finding. A healthy one has no finding of gravity "error".

A graph beside the checkpoint (PREFIX.meta) tells decay, epsilon and mode; without it
checks that need them assume the usual values and are less sure.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Sequence

import numpy as np

from bn_tf1.checkpoints.dialects import ROLES
from bn_tf1.checkpoints.layer_values import CheckpointValues, read_values
from bn_tf1.checkpoints.object_names import as_in_checkpoint
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import TensorFile, open_tensors
from bn_tf1.doctor.checkpoint_checks.numbers import check_layer
from bn_tf1.doctor.checkpoint_checks.presence import check_presence
from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.layer_analysis import GraphLayer, find_layers
from bn_tf1.graphs.node_values import VARIABLES, variable_name
from bn_tf1.graphs.view import GraphView, read_graph


class Audit(NamedTuple):
    """What was found in one checkpoint.

    Attributes:
        values: its layers with their numbers.
        findings: what is wrong with them.
    """

    values: CheckpointValues
    findings: tuple[Finding, ...]


def graph_beside(prefix: str) -> tuple[list[GraphLayer], list[Finding]]:
    """The layers of the graph PREFIX.meta, and a finding if it cannot be read."""
    path = prefix + ".meta"
    if not os.path.exists(path):
        return [], []
    try:
        view = read_graph(path)
        return saved_layers(view, find_layers(view)), []
    except ValueError as error:
        return [], [unreadable_graph(path, error)]


def saved_layers(view: GraphView, layers: Sequence[GraphLayer]) -> list[GraphLayer]:
    """The layers of a graph, with such variables as a checkpoint can hold."""
    # What was frozen, or never was a variable, no checkpoint has.
    variables = {
        variable_name(view, node) for node, op in enumerate(view.ops) if op in VARIABLES
    }
    return [
        layer._replace(
            **{role: None for role in ROLES if getattr(layer, role) not in variables}
        )
        for layer in layers
    ]


def unreadable_graph(path: str, error: Exception) -> Finding:
    """The finding on a graph file that cannot be read."""
    what = f"The graph cannot be read: {error}."
    return found_by("graph-unreadable", "certain", path, what, path=path)


def audit_checkpoint(prefix: str, graph_layers: Sequence[Any]) -> Audit:
    """Opens a checkpoint, checks its layers, and then reads every other tensor of it.

    Raises:
        CheckpointError: it cannot be opened.
    """
    file = open_tensors(prefix)
    values, findings = audit_file(file, graph_layers)
    return Audit(values, (*findings, *_check_tensors(file, values)))


def audit_file(file: TensorFile, graph_layers: Sequence[Any] = ()) -> Audit:
    """Checks the batch-norm layers of an open checkpoint; reads nothing else of it."""
    # A SavedModel of TensorFlow 2 numbers in its graph what it saves by object.
    graph_layers = as_in_checkpoint(file, graph_layers)
    values = read_values(file, graph_layers)
    findings = [_damaged(file.prefix, *item) for item in values.damaged.items()]
    layers = [layer.layer for layer in values.layers]
    findings += check_presence(file, layers, graph_layers)
    for layer in values.layers:
        findings += check_layer(layer, values)
    return Audit(values, tuple(by_gravity(findings)))


def _check_tensors(file, values):
    """Findings on wrong checksums and on weights of NaN."""
    # The variables of the layers were read, and found fault with, already.
    known = {name for layer in values.layers for name in layer.layer.names.values()}
    for name, tensor in file.tensors.items():
        # The checksum of strings is not that of their bytes.
        if tensor.dtype is None or name in known or name in values.damaged:
            continue
        bad = 0
        try:
            for chunk in tensor.chunks():
                if tensor.is_floating:
                    bad += chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
        except CheckpointError as error:
            # A checksum is known at the end alone: what was counted may be garbage.
            yield _damaged(file.prefix, name, error)
            continue
        if bad:
            where = f"{file.prefix}: {name}"
            what = f"{bad} of {tensor.elements} values of {name} are NaN or infinite."
            yield found_by("weights-not-finite", "certain", where, what)


def _damaged(prefix, name, reason):
    what = f"{name} cannot be read: {reason}."
    return found_by("damaged-tensor", "certain", f"{prefix}: {name}", what)
