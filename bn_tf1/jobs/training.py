"""The training job: from a configuration to checkpoints, summaries and a result.

Contract: `train` returns when the global step has reached `max_steps`, and raises when
it did not. It resumes from the newest usable checkpoint in the model directory; the sequence
of examples is a function of seed and step, so it goes on where it stopped, and ends with
the same bits as a run that was never interrupted. What crashes, signals and full disks
need is in `checkpoints`, `run_lock` and `stop_signals`.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from typing import NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs import (
    allocator,
    checkpoints,
    datasets,
    image_files,
    network,
    run_lock,
    stop_signals,
    training_session,
)
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs.checkpoints import CheckpointError
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.progress import ProgressHook
from bn_tf1.jobs.stop_signals import StopHook
from bn_tf1.train_op import make_train_op

# What TensorFlow raises where a folder is gone, read-only or on a full disk, a file is
# larger than allowed (OutOfRangeError), or the disk fails (UnknownError).
_FILE_ERRORS = (
    OSError,
    tf.errors.FailedPreconditionError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnknownError,
)


class TrainingError(RuntimeError):
    """The run ended before its last step."""


class TrainingStopped(TrainingError):
    """A signal ended the run before its last step; all its steps are saved."""


class TrainingResult(NamedTuple):
    """How a run ended.

    Attributes:
        step: the global step.
        loss: the loss of the last step, in nats, with the L2 penalty; None when there
            was no step left to run.
        seconds: wall time of the job.
    """

    step: int
    loss: float | None
    seconds: float


class _FiniteLossHook(tf.train.SessionRunHook):
    """Ends the run at the first loss of NaN or infinity (NanTensorHook lets one pass)."""

    def __init__(self, config, step, progress):
        self._config = config
        self._loss_name = step.loss.name
        self._progress = progress

    def after_run(self, run_context, run_values):
        if not math.isfinite(self._progress.loss):
            raise TrainingError(
                f"the loss is not finite at step {self._progress.step}: tensor "
                f"{self._loss_name} is {self._progress.loss}, and after the step "
                f"{_not_finite(run_context.session)}; try a smaller --learning_rate "
                f"than {self._config.learning_rate}"
            )


def _not_finite(session):
    """Which of the variables are not finite, in words."""
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    values = session.run(variables)
    names = [
        variable.op.name
        for variable, value in zip(variables, values)
        if not np.all(np.isfinite(value))
    ]
    if not names:
        return "all variables are finite"
    return f"{len(names)} of {len(variables)} variables are not, {names[0]} the first"


class _Step(NamedTuple):
    """The tensors of one training step, and how its input begins."""

    inputs: training_session.Inputs
    train_op: tf.Operation
    global_step: tf.Variable
    loss: tf.Tensor
    accuracy: tf.Tensor
    learning_rate: tf.Tensor


def train(config: Config) -> TrainingResult:
    """Trains as `config` says.

    Raises:
        bn_tf1.jobs.checkpoints.CheckpointError: there are checkpoints in the model
            directory, but none can be used.
        bn_tf1.jobs.image_files.DataFileError: a data file is missing or damaged, or the
            data are not those that the run began with.
        bn_tf1.jobs.run_lock.LockedError: another process trains in the directory.
        OSError: the model directory cannot be written to.
        TrainingStopped: SIGTERM or SIGINT ended the run; it is saved.
        TrainingError: the loss or a variable is not finite, a checkpoint cannot be
            saved, or the run ended before `max_steps` for another reason.
    """
    start = time.time()
    if config.keep_memory:
        allocator.keep_memory()
    dataset = network.open_split(config, "train")
    test_dataset = network.open_split(config, "test")  # eval.py needs it
    checksum = image_files.checksum(dataset.files + test_dataset.files)
    lock = run_lock.hold(config.model_dir)
    with lock, stop_signals.caught(config.grace_secs) as signals:
        config = configuration.with_checksum(config, checksum)
        newest = checkpoints.recover(config.model_dir)
        configuration.save(config)
        with tf.Graph().as_default():
            step = _build_step(config, dataset)
            if newest is not None:
                checkpoints.check_fits(newest, tf.global_variables())
            progress = ProgressHook(step, config)
            hooks = [_FiniteLossHook(config, step, progress), StopHook(signals)]
            explained = _explained(config, progress)
            with explained, training_session.start(
                config, step.inputs, newest, progress, hooks
            ) as run:
                while progress.step < config.max_steps and not run.should_stop():
                    run.run(step.train_op)
    if progress.step < config.max_steps:
        raise _ended_early(config, progress.step, signals.received)
    return TrainingResult(progress.step, progress.loss, time.time() - start)


@contextlib.contextmanager
def _explained(config, progress):
    """Turns what ends a run too early into a `TrainingError` with step and reason."""
    ended = f"the run ended at step {{}} of {config.max_steps}: {{}}"
    try:
        yield
    except CheckpointError as error:
        raise TrainingError(ended.format(progress.step, error)) from error
    except _FILE_ERRORS as error:
        reason = checkpoints.first_line(error)
        raise TrainingError(ended.format(progress.step, reason)) from error


def _ended_early(config, step, signal_number):
    place = f"at step {step} of {config.max_steps}"
    if signal_number is None:
        # A session also ends, without an error, when something in it runs out of range
        # (tensorflow/tensorflow#15844).
        return TrainingError(f"the run ended {place}")
    name = signal.Signals(signal_number).name
    return TrainingStopped(f"stopped by {name} {place}, saved; run again to go on")


def _build_step(config, dataset):
    global_step = tf.train.get_or_create_global_step()
    inputs, (images, labels) = _next_batch(config, dataset, global_step)
    objective = network.build(images, labels, True, config, dataset.num_classes)
    penalty = tf.losses.get_regularization_loss()
    loss = tf.add(tf.reduce_mean(objective.losses), penalty, name="total_loss")
    learning_rate = _learning_rate(config, global_step)
    # Not `bn_tf1.make_train_op`: that looks at layers of other makers too, and the models
    # have none.
    train_op = make_train_op(
        loss,
        tf.train.MomentumOptimizer(learning_rate, config.momentum),
        global_step=global_step,
    )
    accuracy = tf.reduce_mean(objective.hits)
    step = _Step(inputs, train_op, global_step, loss, accuracy, learning_rate)
    _add_summaries(step, config)
    return step


def _next_batch(config, dataset, global_step):
    first_step = tf.placeholder_with_default(tf.cast(global_step, tf.int64), [])
    batches = datasets.training_batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        first_step=first_step,
        augment=config.augment,
    )
    iterator = tf.data.make_initializable_iterator(batches)
    return training_session.Inputs(
        iterator.initializer, first_step
    ), iterator.get_next()


def _learning_rate(config, global_step):
    if config.lr_schedule == "constant":
        return tf.constant(config.learning_rate)
    if config.lr_schedule == "cosine":
        return tf.train.cosine_decay(
            config.learning_rate, global_step, config.max_steps
        )
    boundaries = [config.max_steps // 2, config.max_steps * 3 // 4]
    rates = [config.learning_rate / divisor for divisor in (1, 10, 100)]
    return tf.train.piecewise_constant(global_step, boundaries, rates)


def _add_summaries(step, config):
    tf.summary.scalar("loss", step.loss)
    tf.summary.scalar("accuracy", step.accuracy)
    tf.summary.scalar("learning_rate", step.learning_rate)
    for call in bn_tf1.batch_norm_calls():
        _add_statistics_summaries(call, config.bn_epsilon)


def _add_statistics_summaries(call, epsilon):
    """The moving statistics, and how far those of the batch lie from them.

    The distances are averages over the channels: of the means, in deviations; of the
    variances, as |ln| of their ratio.
    """
    with tf.name_scope("batch_norm/" + call.name + "/"):
        # After the update of this step: without an order they might be read before.
        with tf.control_dependencies(call.updates):
            mean = call.moving_mean.read_value()
            variance = call.moving_variance.read_value()
        deviation = tf.sqrt(variance + epsilon)
        ratio = (call.batch_variance + epsilon) / (variance + epsilon)
        tf.summary.histogram("moving_mean", mean)
        tf.summary.histogram("moving_variance", variance)
        distance = tf.abs(call.batch_mean - mean) / deviation
        tf.summary.scalar("mean_distance", tf.reduce_mean(distance))
        tf.summary.scalar("variance_distance", tf.reduce_mean(tf.abs(tf.log(ratio))))
