"""NaN in the event files of a training directory.

Contract: files are read record by record, a bounded number of bytes of each, newest
files first. The tail of a running job is cut off, and that is no finding; neither is a
file that holds no records.

TensorFlow's own `summary_iterator` takes records of any size into memory.

Source: tensorflow/core/util/event.proto; the records are those of `formats.tfrecords`.
"""

from __future__ import annotations

import glob
import math
import os
from typing import Iterator, NamedTuple, Sequence

import tensorflow.compat.v1 as tf
from google.protobuf.message import DecodeError

from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.formats.crc32c import masked_crc32c
from bn_tf1.formats.tfrecords import HEADER_BYTES

_MAX_FILES = 32
_MAX_BYTES = 1 << 27
# A record with a graph or images is larger than one with scalars.
_MAX_RECORD_BYTES = 1 << 20


class _History(NamedTuple):
    """When a scalar was NaN or infinite, and its last value."""

    first_step: int
    bad: int
    last: float


def check_events(paths: Sequence[str]) -> list[Finding]:
    """Findings on scalars of NaN or infinity in event files, the newest first."""
    histories: dict[tuple[str, str], _History] = {}
    left = _MAX_BYTES
    for path in paths:
        for data in _records(path, left):
            left -= len(data)
            _add_scalars(histories, path, data)
    return [_finding(*item) for item in histories.items() if item[1].bad]


def event_files(directory: str) -> list[str]:
    """The newest event files in `directory` and its folders, the newest first."""
    escaped = glob.escape(directory)
    found = [
        path
        # Evaluation writes into a folder of the run.
        for pattern in ("*tfevents*", os.path.join("*", "*tfevents*"))
        for path in glob.glob(os.path.join(escaped, pattern))
        if os.path.isfile(path)
    ]
    return sorted(found, key=_modified, reverse=True)[:_MAX_FILES]


def _modified(path):
    try:
        return os.path.getmtime(path)
    except OSError:  # removed meanwhile
        return 0.0


def _records(path, limit) -> Iterator[bytes]:
    """The small records of a file, up to `limit` bytes, until one is cut off."""
    try:
        with open(path, "rb") as file:
            while file.tell() < limit:
                header = file.read(HEADER_BYTES)
                # At its end, or where a job is writing it.
                if len(header) < HEADER_BYTES or _is_damaged(header[:8], header[8:]):
                    return
                length = int.from_bytes(header[:8], "little")
                # It holds a graph or images: its checksum would mean to read it all.
                if length > _MAX_RECORD_BYTES:
                    file.seek(length + 4, os.SEEK_CUR)
                    continue
                data = file.read(length)
                if len(data) < length or _is_damaged(data, file.read(4)):
                    return
                yield data
    except OSError:  # removed meanwhile, or not ours to read
        return


def _is_damaged(data, checksum):
    return masked_crc32c(data) != int.from_bytes(checksum, "little")


def _add_scalars(histories, path, data):
    try:
        event = tf.Event.FromString(data)
    except DecodeError:
        return
    for value in event.summary.value:
        number = _scalar(value)
        if number is None:
            continue
        # By file, too: training and evaluation have tags of one name.
        place = (path, value.tag)
        before = histories.get(place, _History(event.step, 0, 0.0))
        first = before.first_step if before.bad else event.step
        is_bad = not math.isfinite(number)
        histories[place] = _History(first, before.bad + is_bad, number)


def _scalar(value):
    """The number of a summary; None for what is no scalar."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    if kind == "histo":
        return value.histo.sum
    floats = (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum)
    # A tensor of another shape may be said to be of any size.
    if kind != "tensor" or value.tensor.tensor_shape.dim:
        return None
    if value.tensor.dtype not in floats:
        return None
    # Without any, TensorFlow takes 0: the last of a loss would be finite.
    if not (
        value.tensor.tensor_content or value.tensor.float_val or value.tensor.double_val
    ):
        return None
    try:
        return float(tf.make_ndarray(value.tensor))
    except ValueError:  # its bytes are not those of one number
        return None


def _finding(place, history):
    path, tag = place
    is_loss = "loss" in tag.lower() or "cost" in tag.lower()
    is_lost = is_loss and not math.isfinite(history.last)
    what = (
        f"{tag!r} was NaN or infinite {history.bad} times, first at step "
        f"{history.first_step}; its last value is {history.last:.4g}."
    )
    # What is no loss may be NaN on purpose: a ratio of nothing to nothing.
    return found_by(
        "events-not-finite",
        "certain" if is_lost else "likely",
        f"{path}: {tag}",
        what,
        gravity="error" if is_lost else "warning",
    )
