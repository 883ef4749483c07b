"""The curves of a run, read from the event files that any TensorFlow program writes.

Contract: files are read with TensorFlow's own reader; the cut-off tail of a running job, and
what is no event file, are passed over. Where a run was resumed, what an earlier process
wrote of later steps is dropped, as TensorBoard does.
"""

from __future__ import annotations

import glob
import os
from typing import Mapping, Sequence

import tensorflow.compat.v1 as tf
from google.protobuf.message import DecodeError

Points = Sequence["tuple[int, float]"]
# By tag.
Curves = Mapping[str, Points]

# Of one folder; the newest count.
_MAX_FILES = 64


def curves_of(folder: str) -> dict[str, Curves]:
    """The curves in `folder` and in the folders in it, by their name; "" for itself.

    What is there but has no curve is left out.

    Raises:
        OSError: the folder cannot be read.
    """
    names = sorted(
        name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))
    )
    found = {name: curves_in(os.path.join(folder, name)) for name in ["", *names]}
    return {name: curves for name, curves in found.items() if curves}


def curves_in(folder: str) -> dict[str, Points]:
    """The scalars of the event files of one folder: (step, value) by tag, by step."""
    pattern = os.path.join(glob.escape(folder), "*tfevents*")
    paths = [path for path in glob.glob(pattern) if os.path.isfile(path)]
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(paths, key=_made)[-_MAX_FILES:]:
        # TensorBoard's own reader is not there: TensorFlow 2.21 does without TensorBoard.
        try:
            for event in tf.train.summary_iterator(path):
                _add(curves, event)
        except (tf.errors.OpError, DecodeError):
            continue
    return {tag: sorted(points.items()) for tag, points in curves.items()}


def _made(path):
    """The second in its name: a file may be written to long after the next was begun."""
    parts = os.path.basename(path).split(".")
    stamp = next((part for part in parts if part.isdigit()), "0")
    return int(stamp), path


def _add(curves, event):
    # `Progress.begin` writes it, as TensorFlow's Supervisor does.
    if event.session_log.status == tf.SessionLog.START and event.step > 0:
        for points in curves.values():
            for step in [step for step in points if step >= event.step]:
                del points[step]
    for value in event.summary.value:
        number = _scalar(value)
        if number is not None:
            curves.setdefault(value.tag, {})[event.step] = number


def _scalar(value):
    """The number of a summary of either kind; None for what is no scalar."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    plugin = value.metadata.plugin_data.plugin_name
    # Of the newer kind only the first point says what it is.
    if kind != "tensor" or plugin not in ("scalars", "") or value.tensor.string_val:
        return None
    if value.tensor.tensor_shape.dim or not value.tensor.dtype:
        return None
    return float(tf.make_ndarray(value.tensor))
