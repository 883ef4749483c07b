"""Checkpoints with recalibrated statistics: the source's tensors, and new statistics.

Contract: everything that is no statistic is the source's, bit for bit: slots of an
optimizer, the global step and what else is there; where weights are promoted, a variable
that has a shadow takes its value. Nothing is written over anything, and what was written
is read back and compared.
"""

from __future__ import annotations

import os
import shutil
from typing import Mapping

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import AVERAGE, find_shadows
from bn_tf1.checkpoints.reader_writer import (
    Checkpoint,
    CheckpointError,
    Entry,
    check_new,
    write_checkpoint,
)


def sources_of(checkpoint: Checkpoint, *, ema: bool) -> dict[str, str]:
    """The tensor of `checkpoint` that each variable takes: itself, or its shadow.

    Raises:
        ValueError: `ema` is true, but there are no shadows.
    """
    # The shadows stay where they are: training can go on from what is written.
    sources = {name: name for name in checkpoint.shapes}
    if ema:
        try:
            sources.update(find_shadows(checkpoint.shapes, AVERAGE))
        except ValueError as error:
            what = f"--ema is given, but in {checkpoint.prefix} {error}"
            raise ValueError(what) from error
    return sources


def check_free(destination: str) -> None:
    """Raises CheckpointError unless a checkpoint and its graph can be made there."""
    # Before hours of measuring, and not when they are over.
    check_new(destination)
    if os.path.exists(destination + ".meta"):
        raise CheckpointError(f"{destination}.meta exists, and nothing is written over")


def write_recalibrated(
    destination: str,
    checkpoint: Checkpoint,
    statistics: Mapping[str, np.ndarray],
    *,
    graph: str | None = None,
    ema: bool = False,
) -> None:
    """Writes `checkpoint` with `statistics`, arrays by name, to `destination`.

    The file `graph` is copied beside it, as a `tf.train.Saver` has it.

    Raises:
        CheckpointError: as `write_checkpoint`.
        ValueError: as `sources_of`.
    """
    entries = [
        Entry(name, checkpoint.shapes[name], checkpoint.dtypes[name], source)
        for name, source in sources_of(checkpoint, ema=ema).items()
        if name not in statistics
    ]
    # Of the source's shape and dtype, so that whoever restored that restores this.
    for name, values in statistics.items():
        shape, dtype = values.shape, tf.float32
        if name in checkpoint.shapes:
            shape, dtype = checkpoint.shapes[name], checkpoint.dtypes[name]
        array = values.reshape(shape).astype(dtype.as_numpy_dtype)
        entries.append(Entry(name, tuple(shape), dtype, None, array))
    write_checkpoint(destination, checkpoint, entries)
    # Last: with a .meta file beside it, tools take a checkpoint for complete.
    if graph is not None:
        shutil.copyfile(graph, destination + ".meta")
