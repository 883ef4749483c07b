"""The training job's safe checkpoints in somebody's own MonitoredTrainingSession.

    saver = bn_tf1.SafeSaver("runs/mine")  # after the whole graph is built
    with tf.train.MonitoredTrainingSession(
        checkpoint_dir="runs/mine", scaffold=tf.train.Scaffold(saver=saver)
    ) as session:
        ...

Contract: each checkpoint is read back and on the disk before it counts, one with a value
that is not finite is refused, and a start goes on from the newest that can be read, with a
warning for each that cannot (see `committing_saver`). One process writes to the folder at
a time; it is the chief where there are several workers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import Any

import tensorflow.compat.v1 as tf

from bn_tf1.jobs.saving import committing_saver, run_lock
from bn_tf1.jobs.saving.committing_saver import CommittingSaver

# What messages call the folder: its users have no flag.
_ARGUMENT = "`model_dir`"

# The locks of this process, which holds a folder until it ends.
_held: dict[str, contextlib.ExitStack] = {}


class SafeSaver(CommittingSaver):
    """A `tf.train.Saver` of all variables for `tf.train.Scaffold(saver=...)`."""

    def __init__(self, model_dir: str, *, max_to_keep: int = 5):
        """Locks the folder, puts it in order, and builds the operations of the Saver.

        Afterwards the file `checkpoint` names the newest usable checkpoint, from which
        MonitoredTrainingSession goes on.

        Args:
            model_dir: the `checkpoint_dir`; made if it is not there.
            max_to_keep: how many of the newest checkpoints to keep; 0 keeps all.

        Raises:
            bn_tf1.jobs.saving.committing_saver.SavingError: there are checkpoints, but
                none can be used.
            bn_tf1.jobs.saving.run_lock.LockedError: another process has the folder.
            OSError: the folder cannot be made or written to.
            ValueError: `max_to_keep` is negative, or the graph has no variables.
        """
        if max_to_keep < 0:
            raise ValueError(f"`max_to_keep` is {max_to_keep!r}, but must be >= 0")
        keys = (tf.GraphKeys.GLOBAL_VARIABLES, tf.GraphKeys.SAVEABLE_OBJECTS)
        if not any(map(tf.get_collection, keys)):
            raise ValueError(
                "there is no variable to save: make the SafeSaver when the graph is built"
            )
        # First: what another process writes meanwhile would be swept as a leftover.
        _hold(model_dir)
        newest = committing_saver.recover(model_dir, _ARGUMENT)
        super().__init__(model_dir, max_to_keep, newest)

    @property
    def last_checkpoints(self) -> list:
        """The paths of the checkpoints, the newest last."""
        return [c.path for c in committing_saver.listed(self._model_dir)]

    def save(
        self, sess: Any, save_path: str, global_step: Any = None, **options: Any
    ) -> str:
        """As `tf.train.Saver.save`, of a checkpoint with a step in the saver's folder.

        Raises:
            ValueError: there is no `global_step`, or `save_path` is elsewhere.
            bn_tf1.jobs.saving.committing_saver.SavingError: a value is not finite, or the
                files cannot be written; earlier checkpoints are as they were.
        """
        if global_step is None:
            raise ValueError("`global_step` is None, but a safe checkpoint has a step")
        folder = os.path.dirname(save_path)
        if os.path.realpath(folder) != os.path.realpath(self._model_dir):
            raise ValueError(
                f"`save_path` is {save_path!r}, but this saver writes to "
                f"{self._model_dir!r}: give the same folder as checkpoint_dir"
            )
        # MonitoredTrainingSession gives a number, others, as Saver.save allows, a variable.
        step = sess.run(global_step) if hasattr(global_step, "op") else global_step
        return super().save(sess, save_path, global_step=step, **options)


def _hold(model_dir):
    # A saver has no end that anybody tells it: the lock is given back with the process, and
    # a second saver of the same folder, for a second graph, takes part in it.
    key = os.path.realpath(model_dir)
    if key not in _held:
        stack = contextlib.ExitStack()
        stack.enter_context(run_lock.hold(model_dir, _ARGUMENT))
        _held[key] = stack
        atexit.register(stack.close)
