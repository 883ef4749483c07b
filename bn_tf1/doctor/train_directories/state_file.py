"""Which checkpoints a training directory has, and which its state file says it has.

`checkpoint`, the state file, names the newest checkpoint and those that are kept.
TensorFlow starts from step 0 without a word where it is missing or garbage, or names
files that are elsewhere.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import tensorflow.compat.v1 as tf
from google.protobuf import text_format

from bn_tf1.checkpoints.layer_values import step_of
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by

STATE_FILE = "checkpoint"
# A state file of ten thousand checkpoints is smaller.
_MAX_STATE_BYTES = 1 << 20
_DATA = re.compile(r"^(?P<prefix>.+)\.data-\d{5}-of-\d{5}$")
# Where nothing tells which checkpoint a new state file should name.
_ANY = "model.ckpt-STEP"


class TrainState(NamedTuple):
    """The checkpoints of a directory.

    Attributes:
        present: prefixes of those with an index, the newest last.
        findings: what is wrong with the state file and the files beside it.
    """

    present: tuple[str, ...]
    findings: tuple[Finding, ...]


def is_train_directory(directory: str) -> bool:
    """Whether there is a state file, an index or a data file in `directory`."""
    names = os.listdir(directory)
    return any(
        name == STATE_FILE or name.endswith(".index") or _DATA.match(name)
        for name in names
    )


def read_train_state(directory: str) -> TrainState:
    """Looks at the names in `directory` and at its state file.

    Raises:
        OSError: the directory cannot be read.
    """
    names = sorted(os.listdir(directory))
    indexed = [name[: -len(".index")] for name in names if name.endswith(".index")]
    indexed = [os.path.join(directory, name) for name in indexed]
    listed, findings = _listed(directory, bool(indexed), names)
    here_by_name = set(indexed)
    present, missing = [], []
    for path in listed:
        here = os.path.join(directory, os.path.basename(path))
        if os.path.exists(path + ".index"):
            present.append(path)
        elif here in here_by_name:
            present.append(here)
            findings.append(_elsewhere(directory, path))
        elif os.path.isfile(path):
            findings.append(_first_format(path))
        else:
            missing.append(path)
    findings += [_missing(directory, path, path == listed[-1]) for path in missing]
    findings += _torn(directory, names)
    known = {os.path.abspath(path) for path in present}
    others = [path for path in indexed if os.path.abspath(path) not in known]
    others.sort(key=_by_age)
    if listed and present:
        findings += _newer_than_state(directory, others, present[-1])
    return TrainState((*others, *present), tuple(findings))


def _by_age(prefix):
    step = step_of(prefix)
    try:
        modified = os.path.getmtime(prefix + ".index")
    except OSError:  # removed meanwhile
        modified = 0.0
    return (-1 if step is None else step, modified)


def _listed(directory, has_checkpoints, names):
    """The paths that the state file names, the newest last, and findings on it."""
    path = os.path.join(directory, STATE_FILE)
    if STATE_FILE not in names:
        was_trained = any("tfevents" in name or name == "graph.pbtxt" for name in names)
        if not has_checkpoints:
            return [], []
        return [], [_state_missing(path, was_trained)]
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_STATE_BYTES + 1)
    except OSError as error:
        return [], [_state_damaged(path, f"cannot be read: {error.strerror}")]
    if not content.strip():
        return [], [_state_damaged(path, "is empty")]
    state = _parsed(content)
    if state is None or not state.model_checkpoint_path:
        return [], [_state_damaged(path, "is garbage: it names no checkpoint")]
    paths = [
        _in_directory(directory, name) for name in state.all_model_checkpoint_paths
    ]
    newest = _in_directory(directory, state.model_checkpoint_path)
    return [p for p in paths if p != newest] + [newest], []


def _parsed(content):
    # The class of the message has no public name; an instance has.
    state = tf.train.generate_checkpoint_state_proto(".", "model")
    state.Clear()
    if len(content) > _MAX_STATE_BYTES or b"\0" in content:
        return None
    try:
        text_format.Parse(content.decode("utf-8"), state, allow_unknown_field=True)
    except (text_format.ParseError, UnicodeDecodeError, RecursionError):
        return None
    return state


def _in_directory(directory, name):
    return name if os.path.isabs(name) else os.path.join(directory, name)


def _state_missing(path, was_trained):
    return found_by(
        "state-file-missing",
        gravity="warning" if was_trained else "note",
        certainty="certain",
        where=path,
        what="There are checkpoints, but no state file `checkpoint`.",
        directory=os.path.dirname(path),
        checkpoint=_ANY,
    )


def _state_damaged(path, problem):
    return found_by(
        "state-file-damaged",
        certainty="certain",
        where=path,
        what=f"The state file {problem}.",
        directory=os.path.dirname(path),
        checkpoint=_ANY,
    )


def _elsewhere(directory, path):
    return found_by(
        "state-file-elsewhere",
        certainty="certain",
        where=os.path.join(directory, STATE_FILE),
        what=f"The state file names {path}, which is not there; one of that name is "
        "here.",
        directory=directory,
        checkpoint=os.path.basename(path),
    )


def _first_format(path):
    return found_by(
        "first-format",
        certainty="certain",
        where=path,
        what="It is a checkpoint in TensorFlow's first format, and was not examined.",
        path=path,
    )


def _missing(directory, path, is_newest):
    return found_by(
        "checkpoint-missing",
        gravity="error" if is_newest else "warning",
        certainty="certain",
        where=os.path.join(directory, STATE_FILE),
        what=f"The state file lists {path}, but there is no {path}.index.",
        directory=directory,
        checkpoint=_ANY,
    )


def _torn(directory, names):
    """Data files whose index is not there."""
    there = set(names)
    prefixes = {match["prefix"] for match in map(_DATA.match, names) if match}
    for prefix in sorted(prefixes):
        if prefix + ".index" not in there:
            yield found_by(
                "index-missing",
                certainty="certain",
                where=os.path.join(directory, prefix),
                what=f"There are data files of {prefix}, but no {prefix}.index.",
                data=prefix + ".data-...",
            )


def _newer_than_state(directory, others, newest):
    step = step_of(newest)
    newer = [p for p in others if step is not None and (step_of(p) or 0) > step]
    if newer:
        name = os.path.basename(newer[-1])
        yield found_by(
            "state-file-behind",
            certainty="likely",
            where=os.path.join(directory, STATE_FILE),
            what=f"The state file ends with {os.path.basename(newest)}, but there is "
            f"{name}.",
            directory=directory,
            checkpoint=name,
        )
