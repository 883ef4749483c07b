"""The session of a training run: how it starts, what is saved and what is reported.

`tf.train.MonitoredTrainingSession` offers the same, but on TensorFlow 1.15 it takes 0.9
seconds to get to the first step of a small network, as long as importing TensorFlow
takes: every `session.run` with other fetches prunes and optimizes the graph anew, and it
makes seven of them; and it writes the graph five times. Here the variables and the input
are initialised in one run, and the graph is written once, after the first step.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.jobs import checkpoints
from bn_tf1.jobs.checkpoints import Checkpoint, CommittingSaver
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.progress import ProgressHook

GRAPH_FILE = "graph.pbtxt"


class Inputs(NamedTuple):
    """How the input of a training step begins.

    Attributes:
        initializer: operation that begins it; runs after the global step is restored.
        first_step: int64 scalar tensor with the step at which it begins; where it is
            not fed, the global step.
    """

    initializer: tf.Operation
    first_step: tf.Tensor


def start(
    config: Config,
    inputs: Inputs,
    newest: Checkpoint | None,
    progress: ProgressHook,
    hooks: Sequence[tf.train.SessionRunHook],
) -> tf.train.MonitoredSession:
    """Starts a session in the default graph, and finalizes it.

    Args:
        config: the configuration.
        inputs: of the step that will run.
        newest: what `checkpoints.recover` returned.
        progress: runs before `hooks`.
        hooks: run before a save: nothing is saved when they end the run with an error.
    """
    saver = CommittingSaver(config.model_dir, config.keep_checkpoint_max, newest)
    summaries = tf.train.SummarySaverHook(
        save_steps=config.summary_steps,
        summary_writer=progress.writer,
        summary_op=tf.summary.merge_all(),
    )
    return tf.train.MonitoredSession(
        _SessionCreator(config.model_dir, saver, inputs),
        [summaries, progress, *hooks, _SaveHook(config, saver, progress)],
    )


class _SaveHook(tf.train.SessionRunHook):
    """Saves at the start, every `save_checkpoint_steps` steps and at the end.

    After the first step it writes the graph, to `graph.pbtxt` and for TensorBoard.
    """

    def __init__(
        self,
        config: Config,
        saver: CommittingSaver,
        progress: ProgressHook,
    ):
        self._config = config
        self._saver = saver
        self._writer = progress.writer
        self._progress = progress
        self._saved_step = None
        self._graph_is_written = False

    def after_create_session(self, session, coord):
        self._save(session)

    def after_run(self, run_context, run_values):
        if not self._graph_is_written:
            self._write_graph(run_context.session.graph)
            self._graph_is_written = True
        steps = self._progress.step - self._saved_step
        if steps >= self._config.save_checkpoint_steps:
            self._save(run_context.session)

    def end(self, session):
        if self._progress.step != self._saved_step:
            self._save(session)
        self._writer.flush()

    def _save(self, session):
        step = self._progress.step
        path = os.path.join(self._config.model_dir, checkpoints.PREFIX)
        self._saver.save(session, path, global_step=step)
        log = tf.SessionLog(status=tf.SessionLog.CHECKPOINT, checkpoint_path=path)
        self._writer.add_session_log(log, step)
        self._saved_step = step

    def _write_graph(self, graph):
        with graph.as_default():
            meta_graph = self._saver.export_meta_graph()
        folder = self._config.model_dir
        try:
            tf.train.write_graph(meta_graph.graph_def, folder, GRAPH_FILE)
        except tf.errors.OutOfRangeError as error:
            # A limit on the file size; a MonitoredSession takes it for the end of the data.
            raise OSError(checkpoints.first_line(error)) from error
        self._writer.add_graph(graph)
        self._writer.add_meta_graph(meta_graph)


class _SessionCreator(tf.train.SessionCreator):
    """Restores the newest checkpoint, or initialises the variables; then the input."""

    def __init__(self, model_dir, saver, inputs):
        self._model_dir = model_dir
        self._saver = saver
        self._inputs = inputs
        self._initialize = tf.global_variables_initializer()

    def create_session(self):
        tf.get_default_graph().finalize()
        session = tf.Session()
        newest = tf.train.latest_checkpoint(self._model_dir)
        if newest is None:
            # In one run: fed, the first step is not read before it is initialised.
            fetches = [self._initialize, self._inputs.initializer]
            session.run(fetches, {self._inputs.first_step: 0})
        else:
            self._saver.restore(session, newest)
            session.run(self._inputs.initializer)
        return session
