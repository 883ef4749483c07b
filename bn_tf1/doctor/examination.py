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
from bn_tf1.doctor.checkpoint_checks.whole_checkpoint import (
    Audit,
    audit_checkpoint,
    graph_beside,
    saved_layers,
    unreadable_graph,
)
from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.layer_rows import LayerRow, rows_of
from bn_tf1.doctor.lint import lint_facts
from bn_tf1.doctor.register import by_place, found_by
from bn_tf1.doctor.train_directories.events import check_events, event_files
from bn_tf1.doctor.train_directories.history import check_history
from bn_tf1.doctor.train_directories.state_file import (
    STATE_FILE,
    is_train_directory,
    read_train_state,
)
from bn_tf1.formats.sorted_table import is_table
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.view import read_graph

# So many of the newest checkpoints of a run are read.
_MAX_CHECKPOINTS = 20
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
    # Python's own words for it, which differ by version, do not name the path.
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
            return _examine_graph
        if is_train_directory(path):
            return _examine_directory
        raise ValueError(
            f"directory {path} has neither a checkpoint nor a SavedModel{_runs_in(path)}"
            ": give a training directory, a checkpoint's prefix or a graph"
        )
    # A part that is missing is told of by the reader, with the file that it wanted.
    if os.path.exists(path + ".index") or _PART.search(path):
        return _examine_checkpoint
    if not os.path.exists(path):
        raise ValueError(
            f"there is nothing at {path}, and no {path}.index{checkpoints_beside(path)}: "
            "give a checkpoint's prefix, a .meta file, a graph or a directory"
        )
    # It is called `checkpoint`, and so is taken for one.
    if os.path.basename(path) == STATE_FILE:
        return lambda file: _examine_directory(os.path.dirname(file) or ".")
    # Only TensorFlow's reader knows it, which trusts whatever bytes it is given.
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
    """Of a file, or of a SavedModel, whose values are beside its graph."""
    facts = Facts(read_graph(path))
    layers, findings = facts.graph_layers(), lint_facts(facts)
    kind = "saved_model" if os.path.isdir(path) else "graph"
    prefix = os.path.join(path, "variables", "variables")
    if not os.path.exists(prefix + ".index"):  # a frozen one has no variables
        no_values = "a graph holds no values; examine its checkpoint, too"
        unchecked = [Unchecked(_names_of("checkpoint"), no_values)]
        return _examination(path, kind, None, layers, findings, unchecked)
    audited = audit_checkpoint(prefix, saved_layers(facts.view, layers))
    findings += audited.findings
    return _examination(path, kind, audited.values, layers, findings)


def _examine_checkpoint(path):
    prefix = _PART.sub("", path)
    layers, findings = graph_beside(prefix)
    audited = audit_checkpoint(prefix, layers)
    graph = prefix + ".meta"
    reason = f"a checkpoint does not tell; examine its graph, {graph}"
    if not os.path.exists(graph):
        reason = (
            f"there is no graph beside the checkpoint, no {os.path.basename(graph)}"
        )
    return _examination(
        path,
        "checkpoint",
        audited.values,
        layers,
        [*findings, *audited.findings],
        [Unchecked(_names_of("graph"), reason)],
    )


def _examine_directory(path):
    """Its newest graph, its newest checkpoints, and what they tell one after the other.

    A checkpoint that cannot be read is a finding, and the newest that can is examined.
    """
    state = read_train_state(path)
    graph = _newest_graph(path, state.present)
    layers, findings = _layers_of(graph) if graph else ([], [])
    findings += state.findings
    audits: list[Audit] = []
    for prefix in state.present[-_MAX_CHECKPOINTS:]:
        try:
            audits.append(audit_checkpoint(prefix, layers))
        except CheckpointError as error:
            findings.append(_damaged(prefix, error, prefix == state.present[-1]))
    # What else was wrong with an older one is past, or is so in the newest, too.
    for audited in audits[:-1]:
        findings += [f for f in audited.findings if f.check == "damaged-tensor"]
    findings += audits[-1].findings if audits else ()
    history = [audited.values for audited in audits]
    events = event_files(path)
    findings += [*check_history(history), *check_events(events)]
    if not history and not findings:
        raise CheckpointError(f"directory {path} has no checkpoint")
    yet = []
    if graph is None:
        yet.append(Unchecked(_names_of("graph"), "there is no graph in the directory"))
    if len({checkpoint.step for checkpoint in history}) < 2:
        courses = ("statistics-stand-still", "statistics-jump")
        yet.append(Unchecked(courses, "they need checkpoints of two steps"))
    if not events:
        yet.append(Unchecked(("events-not-finite",), "there are no event files"))
    older = len(state.present) - _MAX_CHECKPOINTS
    if older > 0:
        reason = f"of {older} older checkpoints; the newest were read"
        yet.append(Unchecked(("damaged-tensor", "statistics-jump"), reason))
    newest = history[-1] if history else None
    kind = "training directory"
    return _examination(path, kind, newest, layers, findings, yet, history)


def _newest_graph(directory, prefixes):
    paths = [prefix + ".meta" for prefix in reversed(prefixes)]
    # It comes last: it has no collections and no saver, by which more can be checked.
    paths.append(os.path.join(directory, "graph.pbtxt"))
    return next((path for path in paths if os.path.isfile(path)), None)


def _layers_of(graph):
    """The layers of the graph at a path, and what is wrong with it."""
    try:
        facts = Facts(read_graph(graph))
        return saved_layers(facts.view, facts.graph_layers()), lint_facts(facts)
    except ValueError as error:
        return [], [unreadable_graph(graph, error)]


def _damaged(prefix, error, is_newest):
    return found_by(
        "checkpoint-damaged",
        "certain",
        prefix,
        f"{error}.",
        gravity="error" if is_newest else "warning",
        directory=os.path.dirname(prefix),
    )


def _examination(path, kind, values, layers, findings, unchecked=(), history=()):
    """What was found; `values` are those of the newest checkpoint, None without one."""
    values = values or CheckpointValues(path, None, (), {})
    if values.step is None and values.layers:
        without_step = Unchecked(("not-converged",), "no global step is known")
        unchecked = [without_step, *unchecked]
    rows = rows_of(values, layers, history)
    findings = tuple(by_gravity(findings))
    return Examination(path, kind, rows, findings, values.step, tuple(unchecked))


def _names_of(place):
    return tuple(check.name for check in by_place()[place])
