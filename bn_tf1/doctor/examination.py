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
from typing import NamedTuple

from bn_tf1.checkpoints.layer_values import CheckpointValues
from bn_tf1.checkpoints.reader_writer import CheckpointError, checkpoints_beside
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.doctor.checkpoint_checks.whole_checkpoint import (
    audit_file,
    check_tensors,
    graph_beside,
    saved_layers,
)
from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.layer_rows import LayerRow, row_of, rows_of
from bn_tf1.doctor.lint import lint_facts
from bn_tf1.doctor.register import by_place
from bn_tf1.doctor.train_directories.directory import examine_directory
from bn_tf1.doctor.train_directories.state_file import STATE_FILE, is_train_directory
from bn_tf1.formats.sorted_table import is_table
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.view import read_graph

_MOST_RUNS = 8
_PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt")


class Unchecked(NamedTuple):
    """Checks that could not be made.

    Attributes:
        checks: their names.
        reason: what was not there, and where it matters what to give.
    """

    checks: tuple[str, ...]
    reason: str


class Examination(NamedTuple):
    """What was found at one path.

    Attributes:
        path: the path as it was given.
        kind: "checkpoint", "graph", "saved_model" or "training directory".
        layers: its batch-norm layers.
        findings: what is wrong, the gravest first.
        step: the global step of the checkpoint; None without one.
        unchecked: the checks that could not be made, and why.
    """

    path: str
    kind: str
    layers: tuple[LayerRow, ...]
    findings: tuple[Finding, ...]
    step: int | None = None
    unchecked: tuple[Unchecked, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing graver than a note was found."""
        return all(finding.gravity == "note" for finding in self.findings)


def examine(path: str) -> Examination:
    """Examines what is at `path`.

    Raises:
        TypeError: `path` is no path.
        ValueError: there is nothing at `path`, it cannot be read, or it is nothing that
            can be examined.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"`path` is {path!r}, but must be the path of a checkpoint, a graph or a run; "
            "of a graph in this process bn_tf1.lint tells"
        )
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
            f"directory {path} has neither a checkpoint nor a SavedModel{_runs_in(path)}"
            ": give a training directory, a checkpoint's prefix or a graph"
        )
    if os.path.exists(path + ".index") or _PART.search(path):
        return _examine_checkpoint
    if not os.path.exists(path):
        raise ValueError(
            f"there is nothing at {path}, and no {path}.index{checkpoints_beside(path)}: "
            "give a checkpoint's prefix, a .meta file, a graph or a directory"
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


def _runs_in(path):
    """The training directories in a folder of them, for an error; "" for none."""
    folders = sorted(os.path.join(path, name) for name in os.listdir(path))
    runs = [folder for folder in folders if _is_run(folder)]
    if not runs:
        return ""
    more = f" and {len(runs) - _MOST_RUNS} more" if len(runs) > _MOST_RUNS else ""
    return f", but {len(runs)} in it have: {', '.join(runs[:_MOST_RUNS])}{more}"


def _is_run(folder):
    try:
        return os.path.isdir(folder) and is_train_directory(folder)
    except OSError:  # not ours to read
        return False


def _examine_graph(path):
    facts = Facts(read_graph(path))
    rows = tuple(row_of(None, layer) for layer in facts.graph_layers())
    findings = tuple(lint_facts(facts))
    return Examination(path, "graph", rows, findings, unchecked=(_NO_VALUES,))


def _examine_saved_model(path):
    facts = Facts(read_graph(path))
    layers = facts.graph_layers()
    findings = lint_facts(facts)
    prefix = os.path.join(path, "variables", "variables")
    if not os.path.exists(prefix + ".index"):  # a frozen one has no variables
        rows = tuple(row_of(None, layer) for layer in layers)
        return Examination(
            path, "saved_model", rows, tuple(findings), unchecked=(_NO_VALUES,)
        )
    values, found = _audited(prefix, saved_layers(facts.view, layers))
    return Examination(
        path,
        "saved_model",
        rows_of(values, layers),
        tuple(by_gravity([*findings, *found])),
        values.step,
        _without_step(values),
    )


def _examine_checkpoint(path):
    prefix = _PART.sub("", path)
    layers, findings = graph_beside(prefix)
    values, found = _audited(prefix, layers)
    return Examination(
        path,
        "checkpoint",
        rows_of(values, layers),
        tuple(by_gravity([*findings, *found])),
        values.step,
        (*_without_step(values), _without_graph(prefix)),
    )


def _audited(prefix, graph_layers):
    file = open_tensors(prefix)
    found = audit_file(file, graph_layers)
    return found.values, [*found.findings, *check_tensors(file, found.values)]


def _examine_directory(path):
    found = examine_directory(path)
    if found.newest is None and not found.findings:
        raise CheckpointError(f"directory {path} has no checkpoint")
    # Its findings say why there is none.
    newest = found.newest or CheckpointValues(path, None, (), {})
    return Examination(
        path,
        "training directory",
        rows_of(newest, found.graph_layers, found.history),
        found.findings,
        newest.step,
        _left_out(found, newest),
    )


def _without_step(values):
    if values.step is None and values.layers:
        return (Unchecked(("not-converged",), "no global step is known"),)
    return ()


def _without_graph(prefix):
    graph = prefix + ".meta"
    reason = f"a checkpoint does not tell; examine its graph, {graph}"
    if not os.path.exists(graph):
        reason = (
            f"there is no graph beside the checkpoint, no {os.path.basename(graph)}"
        )
    return Unchecked(_names_of("graph"), reason)


def _left_out(found, newest):
    """What could not be checked of a training directory."""
    yet = []
    if found.graph is None:
        yet.append(Unchecked(_names_of("graph"), "there is no graph in the directory"))
    if len({checkpoint.step for checkpoint in found.history}) < 2:
        courses = ("statistics-stand-still", "statistics-jump")
        yet.append(Unchecked(courses, "they need checkpoints of two steps"))
    if not found.has_events:
        yet.append(Unchecked(("events-not-finite",), "there are no event files"))
    if found.older:
        reason = f"of {found.older} older checkpoints; the newest were read"
        yet.append(Unchecked(("damaged-tensor", "statistics-jump"), reason))
    return (*_without_step(newest), *yet)


def _names_of(place):
    return tuple(check.name for check in by_place()[place])


_NO_VALUES = Unchecked(
    _names_of("checkpoint"), "a graph holds no values; examine its checkpoint, too"
)
