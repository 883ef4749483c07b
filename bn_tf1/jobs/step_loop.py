"""A training run from its start to its last step: steps, checkpoints and summaries.

`tf.train.MonitoredTrainingSession` does the same with hooks, but on TensorFlow 1.15 it
takes 0.9 seconds to the first step of a small network, as long as importing TensorFlow
takes: it makes seven runs before it, each of which prunes and optimizes the graph anew, and
writes the graph five times. Here the variables and the input are initialised in one run,
and the graph is written once, after the first step. The hooks also take 0.2 ms of a step.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf
from google.protobuf import text_format

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import fine_tuning
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.progress import Progress
from bn_tf1.jobs.reporting.live_report import LiveReport
from bn_tf1.jobs.saving import committing_saver, durable_files
from bn_tf1.jobs.saving.committing_saver import CommittingSaver, SavedCheckpoint
from bn_tf1.jobs.stop_signals import StopSignals
from bn_tf1.workers.cluster import Workers

GRAPH_FILE = "graph.pbtxt"


def _of_all(summaries: Sequence[bytes]) -> tf.Summary:
    """The summaries of the last batch, with the curves of the loss those of all."""
    read = [tf.Summary.FromString(summary) for summary in summaries]
    for values in zip(*(summary.value for summary in read)):
        if values[-1].tag in _OF_ALL_BATCHES:
            values[-1].simple_value = np.mean([v.simple_value for v in values])
    return read[-1]


# What the results of a step's batches make together.
_OF_ALL_BATCHES = {
    "summary": _of_all,
    "total_loss": np.mean,
    "loss": np.mean,
    "accuracy": np.mean,
    "labels": np.concatenate,
}


# Of each step. The last two are for the log lines only, but to begin a run with other
# fetches costs 0.1 seconds.
_RESULTS = ("train_op", "total_loss", "loss", "labels", "accuracy", "learning_rate")


class TrainingError(RuntimeError):
    """The run ended before its last step."""


class Step(NamedTuple):
    """The tensors of a training step.

    Attributes:
        train_op: operation that makes the step.
        global_step: variable, the number of steps that were made.
        total_loss: float32 scalar, what is minimised, loss + penalty, in nats.
        loss: float32 scalar, the mean cross-entropy of the batch.
        penalty: float32 scalar, the L2 penalty.
        labels: int32, shape [batch].
        accuracy: float32 scalar, the share of the batch that is classified rightly.
        learning_rate: float32 scalar.
        initialize_input: operation that begins the input; runs after the global step was
            restored.
        first_step: int64 scalar, the step at which the input begins; the global step
            where it is not fed.
        batches: how many runs of `train_op` make a step.
        stop: float32 scalar, 1 where this worker wants to stop after the step; None for
            one alone.
        stops: float32 scalar, how many workers do.
    """

    train_op: tf.Operation
    global_step: tf.Variable
    total_loss: tf.Tensor
    loss: tf.Tensor
    penalty: tf.Tensor
    labels: tf.Tensor
    accuracy: tf.Tensor
    learning_rate: tf.Tensor
    initialize_input: tf.Operation
    first_step: tf.Tensor
    batches: int
    stop: tf.Tensor | None = None
    stops: tf.Tensor | None = None


@contextlib.contextmanager
def started(
    config: Config,
    step: Step,
    newest: SavedCheckpoint | None,
    progress: Progress,
    workers: Workers | None = None,
) -> Iterator[TrainingRun]:
    """Starts a run of the default graph, which it finalizes, and saves it.

    The configuration is saved before the first checkpoint, once nothing is left that can
    refuse it. When the `with` block ends without an error, the run is saved again.

    Args:
        config: the configuration.
        step: the step, in the default graph.
        newest: what `committing_saver.recover` returned.
        progress: is told of each step.
        workers: those that share the work; this is the chief.
    """
    saver = CommittingSaver(config.model_dir, config.keep_checkpoint_max, newest)
    initialize = tf.global_variables_initializer()
    summary = tf.summary.merge_all()
    share = None if workers is None else workers.share(tf.global_variables())
    # An operation that is added between two steps has the graph compiled anew.
    tf.get_default_graph().finalize()
    with tf.Session() if workers is None else workers.session() as session:
        if newest is None:
            # In one run: fed, the first step is not read before it is initialised.
            fetches = [initialize, step.initialize_input]
            session.run(fetches, {step.first_step: 0})
            if config.init_checkpoint:
                fine_tuning.initialise(session, config)
            progress.begin(0)
        else:
            saver.restore(session, newest.path)
            # The input begins at the step that was restored: not in one run with it.
            restored, _ = session.run([step.global_step, step.initialize_input])
            progress.begin(int(restored))
        if share is not None:
            session.run(share)
        run = TrainingRun(config, session, step, summary, saver, progress)
        # Not before: a start that fails on a flag must not bind the next one to it. And not
        # after the first checkpoint, which nobody can read without it.
        configuration.save(config)
        run.save()
        yield run
        run.finish()


class SharedStep:
    """One step after the other, until this process, or some worker, is to stop.

    A step of several batches is made to its end, so that a checkpoint is always one of
    whole steps: its number tells all of where the run is.
    """

    def __init__(
        self,
        session: tf.Session,
        step: Step,
        fetches: Sequence[str],
        summary: tf.Tensor | None = None,
    ):
        """`fetches` are fields of `step`; `summary` is fetched when that is asked for."""
        self._feeds = [] if step.stop is None else [step.stop]
        self._stops = 0
        self._batches = step.batches
        names = [*fetches, "stops"] if self._feeds else fetches
        wanted = {name: getattr(step, name) for name in names}
        # `session.run` would look its fetches and feeds up anew in each step; and every step
        # would pay for a summary that is among them.
        self._run = session.make_callable(wanted, self._feeds)
        if summary is not None:
            wanted = {**wanted, "summary": summary}
            self._run_with_summary = session.make_callable(wanted, self._feeds)

    def __call__(
        self, signals: StopSignals | None, *, with_summary: bool = False
    ) -> dict[str, Any]:
        """The results of the step: of its last batch, but for `_OF_ALL_BATCHES`."""
        run = self._run_with_summary if with_summary else self._run
        is_stopped = float(signals is not None and signals.received is not None)
        parts = [run(*[is_stopped] * len(self._feeds)) for _ in range(self._batches)]
        results = parts[-1]
        if len(parts) > 1:
            for key in set(_OF_ALL_BATCHES) & set(results):
                results[key] = _OF_ALL_BATCHES[key]([part[key] for part in parts])
        self._stops = results.get("stops", 0)
        return results

    def goes_on(self, signals: StopSignals) -> bool:
        """Whether there is to be another step: what all workers agree on."""
        # A worker that stopped by itself would leave the others waiting in a collective.
        return not self._stops if self._feeds else signals.received is None


class FollowingRun:
    """The steps of a worker that is not the chief.

    Attributes:
        step: the last global step that was made.
        loss: its loss, of all workers; None before the first.
        goes_on: as that of `SharedStep`.
    """

    def __init__(self, session: tf.Session, step: Step, first_step: int):
        self.step = first_step
        self.loss = None
        self._make = SharedStep(session, step, ("train_op", "total_loss", "loss"))
        self.goes_on = self._make.goes_on

    def make_step(self, signals: StopSignals) -> None:
        """Makes one step; raises TrainingError if the loss is not finite."""
        results = self._make(signals)
        self.step += 1
        self.loss = float(results["loss"])
        # Each worker for itself: all have the same number, and end with the same reason.
        if not math.isfinite(results["total_loss"]):
            raise TrainingError(f"the loss is not finite at step {self.step}")


@contextlib.contextmanager
def followed(step: Step, first_step: int, workers: Workers) -> Iterator[FollowingRun]:
    """As `started`, of a worker that is not the chief: it gets the chief's variables."""
    initialize = tf.global_variables_initializer()
    share = workers.share(tf.global_variables())
    tf.get_default_graph().finalize()
    name = f"worker {workers.index} of {workers.size}"
    with workers.session() as session:
        print(f"{name} joined at step {first_step}", flush=True)
        session.run(initialize)
        session.run(share)
        session.run(step.initialize_input)
        run = FollowingRun(session, step, first_step)
        yield run
    print(f"{name} ended at step {run.step}", flush=True)


class TrainingRun:
    """The steps of a run, each with what is due after it.

    Attributes:
        goes_on: as that of `SharedStep`.
    """

    def __init__(
        self,
        config: Config,
        session: tf.Session,
        step: Step,
        summary: tf.Tensor,
        saver: CommittingSaver,
        progress: Progress,
    ):
        """`progress` has the step that was restored, `summary` is all of them merged."""
        self._config = config
        self._session = session
        self._loss_name = step.total_loss.name
        self._make = SharedStep(session, step, _RESULTS, summary)
        self.goes_on = self._make.goes_on
        self._saver = saver
        self._progress = progress
        self._writer = progress.writer
        self._first_step = progress.step
        self._report = LiveReport(config.model_dir)
        self._saved_step = None

    def make_step(self, signals: StopSignals | None = None) -> None:
        """Makes one step, and what is due after it: reports, summaries, a checkpoint.

        Raises:
            TrainingError: the loss is not finite; nothing was saved after it.
            bn_tf1.jobs.saving.committing_saver.SavingError: the checkpoint cannot be saved.
        """
        step = self._progress.step + 1
        is_first = self._progress.step == self._first_step
        is_last = step == self._config.max_steps
        is_due = step % self._config.summary_steps == 0
        with_summary = is_first or is_last or is_due
        results = self._make(signals, with_summary=with_summary)
        self._progress.update(results)
        if with_summary:
            self._writer.add_summary(results["summary"], step)
        # Before the checkpoint: one that holds NaN would be what a restart goes on from.
        self._check_loss(float(results["total_loss"]))
        if is_first:
            # Not before the first step, which the user waits for.
            self._write_graph()
        if step - self._saved_step >= self._config.save_checkpoint_steps:
            self.save()
            self._writer.flush()
            self._report.write_if_due()

    def save(self) -> None:
        """Saves the step as it is."""
        step = self._progress.step
        path = os.path.join(self._config.model_dir, committing_saver.PREFIX)
        self._saver.save(self._session, path, global_step=step)
        log = tf.SessionLog(status=tf.SessionLog.CHECKPOINT, checkpoint_path=path)
        self._writer.add_session_log(log, step)
        self._saved_step = step

    def finish(self) -> None:
        """Saves the last step, if it is not saved, and all that was reported."""
        if self._progress.step != self._saved_step:
            self.save()
        self._progress.end()

    def _check_loss(self, total_loss):
        if not math.isfinite(total_loss):
            raise TrainingError(
                f"the loss is not finite at step {self._progress.step}: tensor "
                f"{self._loss_name} is {total_loss}, and after the step "
                f"{_not_finite(self._session)}; try a smaller --learning_rate "
                f"than {self._config.learning_rate}"
            )

    def _write_graph(self):
        graph = self._session.graph
        with graph.as_default():
            meta_graph = self._saver.export_meta_graph()
        # Not tf.train.write_graph: TensorFlow 2.20's fails with protobuf 7.
        text = text_format.MessageToString(meta_graph.graph_def)
        path = os.path.join(self._config.model_dir, GRAPH_FILE)
        durable_files.replace_text(path, text)
        self._writer.add_graph(graph)
        self._writer.add_meta_graph(meta_graph)


def _not_finite(session):
    """Which of the variables are not finite, in words."""
    # Read once, after the fact: a healthy step costs nothing more.
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    pairs = zip(variables, session.run(variables))
    names = [v.op.name for v, value in pairs if not np.all(np.isfinite(value))]
    if not names:
        return "all variables are finite"
    return f"{len(names)} of {len(variables)} variables are not, {names[0]} the first"
