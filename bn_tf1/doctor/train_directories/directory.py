"""Checks of a training directory: its newest checkpoint and graph, and its history.

Contract: only names and files of checkpoints, graphs and events are looked at. A
checkpoint that cannot be read is a finding, and the newest that can is examined.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from bn_tf1.checkpoints.layer_values import CheckpointValues
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.doctor.checkpoint_checks.whole_checkpoint import (
    Audit,
    audit_file,
    check_tensors,
    saved_layers,
    unreadable_graph,
)
from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.lint import lint_facts
from bn_tf1.doctor.register import found_by
from bn_tf1.doctor.train_directories.events import check_events, event_files
from bn_tf1.doctor.train_directories.history import check_history
from bn_tf1.doctor.train_directories.state_file import read_train_state
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.layer_analysis import GraphLayer
from bn_tf1.graphs.view import read_graph

# So many of the newest checkpoints are read.
_MAX_CHECKPOINTS = 20


class DirectoryAudit(NamedTuple):
    """What was found in a training directory.

    Attributes:
        newest: the newest checkpoint that can be read; None if there is none.
        history: the checkpoints that were read, the newest last.
        older: how many checkpoints are older than those that were read.
        graph: the path of its newest graph; None if there is none.
        graph_layers: the layers of that graph.
        has_events: whether there are event files.
        findings: what is wrong.
    """

    newest: CheckpointValues | None
    history: tuple[CheckpointValues, ...]
    older: int
    graph: str | None
    graph_layers: tuple[GraphLayer, ...]
    has_events: bool
    findings: tuple[Finding, ...]


def examine_directory(directory: str) -> DirectoryAudit:
    """Examines a training directory.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        state = read_train_state(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error.strerror}"
        ) from error
    graph = _newest_graph(directory, state.present)
    graph_layers, findings = _layers_of(graph) if graph else ([], [])
    findings += state.findings
    audits: list[Audit] = []
    for prefix in state.present[-_MAX_CHECKPOINTS:]:
        is_newest = prefix == state.present[-1]
        try:
            audits.append(_examine_checkpoint(prefix, graph_layers))
        except CheckpointError as error:
            findings.append(_damaged(prefix, error, is_newest=is_newest))
    for audited in audits[:-1]:
        findings += [f for f in audited.findings if f.check == "damaged-tensor"]
    findings += audits[-1].findings if audits else ()
    history = tuple(audited.values for audited in audits)
    findings += check_history(history)
    events = event_files(directory)
    findings += check_events(events)
    return DirectoryAudit(
        history[-1] if history else None,
        history,
        max(len(state.present) - _MAX_CHECKPOINTS, 0),
        graph,
        tuple(graph_layers),
        bool(events),
        tuple(by_gravity(findings)),
    )


def _newest_graph(directory, prefixes):
    paths = [prefix + ".meta" for prefix in reversed(prefixes)]
    paths.append(os.path.join(directory, "graph.pbtxt"))
    return next((path for path in paths if os.path.isfile(path)), None)


def _layers_of(graph):
    """The layers of the graph at a path, and what is wrong with it."""
    try:
        facts = Facts(read_graph(graph))
        layers = saved_layers(facts.view, facts.graph_layers())
        return layers, lint_facts(facts)
    except ValueError as error:
        return [], [unreadable_graph(graph, error)]


def _examine_checkpoint(prefix, graph_layers):
    file = open_tensors(prefix)
    found = audit_file(file, graph_layers)
    return Audit(found.values, (*found.findings, *check_tensors(file, found.values)))


def _damaged(prefix, error, *, is_newest):
    return found_by(
        "checkpoint-damaged",
        gravity="error" if is_newest else "warning",
        certainty="certain",
        where=prefix,
        what=f"{error}.",
        directory=os.path.dirname(prefix),
    )
