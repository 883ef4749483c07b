"""Which steps a training run ever saved, those included whose checkpoints are gone.

An evaluation that comes late sees in the folder only what was kept. From this file it
knows exactly which checkpoints it missed, wherever a stop or a crash made them fall.

Contract: the file holds one step per line, as decimal digits, in ascending order. It is
replaced as a whole and brought to the disk before the file `checkpoint` names a step, so
that it holds every step that was ever named there. It grows by one line per checkpoint.
"""

from __future__ import annotations

import os
from typing import Iterable

from bn_tf1.jobs.saving import durable_files

FILE = "saved_steps.txt"

# Of some millions of checkpoints; what is larger is no such file.
_MAX_BYTES = 1 << 26
# Of the largest int64.
_MAX_DIGITS = 19


def read(model_dir: str) -> frozenset[int]:
    """The steps; none where there is no such file, as in a folder of another program.

    A line that is no step is passed over: who misses a step in the result knows that the
    file is damaged.

    Raises:
        OSError: the file is there, but cannot be read.
    """
    path = os.path.join(model_dir, FILE)
    try:
        # A pipe in its place would be waited for without end.
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_BYTES:
            return frozenset()
        with open(path, "rb") as file:
            lines = file.read(_MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return frozenset()
    return frozenset(
        int(line) for line in lines if line.isdigit() and len(line) <= _MAX_DIGITS
    )


def record(model_dir: str, steps: Iterable[int]) -> None:
    """Adds steps to the file; on the disk when it returns.

    Raises:
        OSError: the folder cannot be read or written.
    """
    known = read(model_dir)
    # A run saves once more when it resumes, and waiting for the disk takes a while.
    if not known.issuperset(steps):
        text = "".join(f"{step}\n" for step in sorted(known.union(steps)))
        durable_files.replace_text(os.path.join(model_dir, FILE), text)
