"""Which checkpoints a training directory has, and which its state file says it has.

`checkpoint`, the state file, names the newest checkpoint and those that are kept.
TensorFlow starts from step 0 without a word where it is missing or garbage, or names
files that are elsewhere.
"""

from __future__ import annotations

import contextlib
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
        # Also data alone: what lost its index is found.
        name == STATE_FILE or name.endswith(".index") or _DATA.match(name)
        for name in names
    )


def read_train_state(directory: str) -> TrainState:
    """Looks at the names in `directory` and at its state file.

    Raises:
        OSError: the directory cannot be read.
    """
    names = sorted(os.listdir(directory))
    indexed = [
        os.path.join(directory, name[: -len(".index")])
        for name in names
        if name.endswith(".index")
    ]
    listed, findings = _listed(directory, bool(indexed), names)
    indexed_here = set(indexed)
    present, missing = [], []
    for path in listed:
        name = os.path.basename(path)
        here = os.path.join(directory, name)
        if os.path.exists(path + ".index"):
            present.append(path)
        elif here in indexed_here:
            # The directory was moved: TensorFlow writes absolute paths unless told not to.
            present.append(here)
            what = f"The state file names {path}, which is not there; one of that name "
            what += "is here."
            findings.append(_found("state-file-elsewhere", directory, what, name))
        elif os.path.isfile(path):
            what = (
                "It is a checkpoint in TensorFlow's first format, and was not examined."
            )
            findings.append(found_by("first-format", "certain", path, what, path=path))
        else:
            gravity = "error" if path == listed[-1] else "warning"
            what = f"The state file lists {path}, but there is no {path}.index."
            missing.append(
                _found("checkpoint-missing", directory, what, gravity=gravity)
            )
    findings += [*missing, *_torn(directory, names)]
    known = {os.path.abspath(path) for path in present}
    others = [path for path in indexed if os.path.abspath(path) not in known]
    # What the state file names comes last, as the newest: it is what a restart takes.
    others.sort(key=_by_age)
    if listed and present:
        findings += _newer_than_state(directory, others, present[-1])
    return TrainState((*others, *present), tuple(findings))


def _found(check, directory, what, checkpoint=_ANY, certainty="certain", gravity=None):
    """A finding on the state file, which is mended by naming `checkpoint` in it."""
    return found_by(
        check,
        certainty,
        os.path.join(directory, STATE_FILE),
        what,
        gravity=gravity,
        directory=directory,
        checkpoint=checkpoint,
    )


def _by_age(prefix):
    step = step_of(prefix)
    try:
        modified = os.path.getmtime(prefix + ".index")
    except OSError:  # removed meanwhile
        modified = 0.0
    return (-1 if step is None else step, modified)


def _listed(directory, has_checkpoints, names):
    """The paths that the state file names, the newest last, and findings on it."""
    if STATE_FILE not in names:
        if not has_checkpoints:
            return [], []
        # Else it is a folder into which somebody copied a checkpoint.
        was_trained = any("tfevents" in name or name == "graph.pbtxt" for name in names)
        gravity = "warning" if was_trained else "note"
        what = "There are checkpoints, but no state file `checkpoint`."
        return [], [_found("state-file-missing", directory, what, gravity=gravity)]
    state, problem = _parsed(os.path.join(directory, STATE_FILE))
    if problem:
        what = f"The state file {problem}."
        return [], [_found("state-file-damaged", directory, what)]
    # A path in it is absolute, or begins at the directory.
    kept, newest = state.all_model_checkpoint_paths, state.model_checkpoint_path
    paths = [os.path.join(directory, name) for name in (*kept, newest)]
    return [path for path in paths if path != paths[-1]] + paths[-1:], []


def _parsed(path):
    """(the state file as a message, what is wrong with it)."""
    # The class of the message has no public name; an instance has.
    state = tf.train.generate_checkpoint_state_proto(".", "model")
    state.Clear()
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_STATE_BYTES + 1)
    except OSError as error:
        return state, f"cannot be read: {error.strerror}"
    if not content.strip():
        return state, "is empty"
    # After a power loss, a file whose length was written holds zeros.
    if len(content) <= _MAX_STATE_BYTES and b"\0" not in content:
        with contextlib.suppress(
            text_format.ParseError, UnicodeDecodeError, RecursionError
        ):
            text_format.Parse(content.decode("utf-8"), state, allow_unknown_field=True)
            if state.model_checkpoint_path:
                return state, ""
    return state, "is garbage: it names no checkpoint"


def _torn(directory, names):
    """Data files whose index is not there."""
    there = set(names)
    prefixes = {match["prefix"] for match in map(_DATA.match, names) if match}
    for prefix in sorted(prefixes):
        if prefix + ".index" not in there:
            where, data = os.path.join(directory, prefix), prefix + ".data-..."
            what = f"There are data files of {prefix}, but no {prefix}.index."
            yield found_by("index-missing", "certain", where, what, data=data)


def _newer_than_state(directory, others, newest):
    step = step_of(newest)
    newer = [p for p in others if step is not None and (step_of(p) or 0) > step]
    if newer:
        name = os.path.basename(newer[-1])
        what = f"The state file ends with {os.path.basename(newest)}, but there is "
        what += f"{name}."
        yield _found("state-file-behind", directory, what, name, "likely")
