"""How the scripts end: an exit code, and one line for an expected failure.

Exit codes:
    0: the job did what it was asked.
    1: it failed.
    2: a flag is unknown or out of range, or contradicts the run's config.json.
    3: the evaluation saw no new checkpoint in time, and no process is training.
    4: the evaluation saw no new checkpoint in time, though a process is training.
    5: another process is training in the model directory.
    69: another worker is gone, or did not come: start all of them again
        (EX_UNAVAILABLE).
    75: a signal stopped the training, and every step is saved: run again to go on
        (EX_TEMPFAIL of sysexits.h).
    76: the workers do not fit together (EX_PROTOCOL).
    130, 143: SIGINT or SIGTERM ended it, and nothing more was saved.

With --verbose an error of TensorFlow's comes with its place in the graph, too.
"""

from __future__ import annotations

import sys
from typing import Callable

import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import first_line
from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from bn_tf1.jobs.evaluation import (
    EvaluationError,
    EvaluationTimeout,
    TrainingStalled,
)
from bn_tf1.jobs.process.command_line import fail
from bn_tf1.jobs.saving.committing_saver import SavingError
from bn_tf1.jobs.saving.run_lock import LockedError
from bn_tf1.jobs.training import TrainingError, TrainingStopped
from bn_tf1.workers.handshake import WorkersError

_STOPPED = 75
# The first that fits counts: a class stands before those it is derived from.
_EXIT_CODES = {
    WorkersError: 1,  # it has its own
    SavingError: 1,
    ConfigError: 2,
    DataFileError: 1,
    TrainingStalled: 4,
    EvaluationTimeout: 3,
    EvaluationError: 1,
    LockedError: 5,
    OSError: 1,
    TrainingError: 1,
    tf.errors.OpError: 1,
}


def run(work: Callable[[], None], *, verbose: bool) -> None:
    """Does `work` in graph mode; an expected failure ends the process with its code."""
    tf.disable_v2_behavior()
    try:
        work()
    except TrainingStopped as error:
        # Somebody asked for it: no error.
        print(error, file=sys.stderr)
        sys.exit(_STOPPED)
    except tuple(_EXIT_CODES) as error:
        if isinstance(error, tf.errors.OpError) and verbose:
            raise  # with thirty lines of where in the graph
        codes = [code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)]
        fail(_told(error), getattr(error, "exit_code", codes[0]))


def _told(error):
    """An error in words: the system's without its number, TensorFlow's without where."""
    if isinstance(error, tf.errors.OpError):
        return f"{first_line(error)}; --verbose tells where"
    # Python's own words begin with "[Errno 13]".
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return str(error)
