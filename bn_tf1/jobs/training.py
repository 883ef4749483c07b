"""The training job: from a configuration to checkpoints, summaries and a result.

Contract: `train` returns when the global step has reached `max_steps`, and raises when
it did not. It resumes from the newest usable checkpoint in the model directory; the sequence
of examples is a function of seed and step, so it goes on where it stopped, and ends with
the same bits as a run that was never interrupted. What crashes, signals and full disks
need is in `saving` and `stop_signals`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import compiled
from bn_tf1.checkpoints.reader_writer import first_line
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import (
    fine_tuning,
    memory_allocator,
    network_from_config,
    step_loop,
    stop_signals,
    summaries,
)
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.progress import Progress
from bn_tf1.jobs.reporting.live_report import LiveReport
from bn_tf1.jobs.saving import committing_saver, run_lock
from bn_tf1.jobs.saving.committing_saver import SavingError
from bn_tf1.jobs.step_loop import Step, TrainingError
from bn_tf1.train_step.train_op import make_train_op
from bn_tf1.workers.cluster import Workers

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

# Of one tensor: places in it are counted in int32.
_MAX_VALUES = 2**31


class TrainingStopped(TrainingError):
    """A signal ended the run before its last step; all its steps are saved."""


class TrainingResult(NamedTuple):
    """How a run ended.

    Attributes:
        step: the global step.
        loss: mean cross-entropy of the last steps, at most 100, in nats, without the L2
            penalty; None when there was no step left to run.
        seconds: wall time of the job.
    """

    step: int
    loss: float | None
    seconds: float


def train(config: Config, workers: Workers | None = None) -> TrainingResult:
    """Trains as `config` says.

    Args:
        config: the configuration.
        workers: those that share the work, each with its rows of every batch. The
            chief's configuration counts; it alone reads and writes the model directory.

    Raises:
        bn_tf1.workers.handshake.WorkersError: the workers did not come together.
        bn_tf1.jobs.saving.committing_saver.SavingError: there are checkpoints in the model
            directory, but none can be used.
        bn_tf1.jobs.data.idx_and_cifar.DataFileError: a data file is missing or damaged, or the
            data are not those that the run began with.
        bn_tf1.jobs.config.ConfigError: the run is beyond `max_steps` already.
        bn_tf1.jobs.saving.run_lock.LockedError: another process trains in the directory.
        OSError: the model directory cannot be written to.
        TrainingStopped: SIGTERM or SIGINT ended the run; it is saved.
        TrainingError: the loss or a variable is not finite, a checkpoint cannot be
            saved, or the run ended before `max_steps` for another reason.
    """
    start = time.time()
    if config.bn_kernel == "compiled":
        try:
            compiled.load()
        except compiled.NotBuiltError as error:
            raise ConfigError(f"--bn_kernel is 'compiled', but {error}") from error
    if config.keep_memory:
        memory_allocator.keep_memory()
    dataset = network_from_config.open_split(config, "train")
    _check_batch_size(config, dataset)
    _check_data_format(config)
    test_dataset = network_from_config.open_split(config, "test")  # eval.py needs it
    checksum = datasets.checksum(dataset, test_dataset)
    if workers is not None and not workers.is_chief:
        step, loss = _follow(config, dataset, checksum, workers)
        return TrainingResult(step, loss, time.time() - start)
    # From here on files may change: one process at a time, and no signal ends it half-way.
    lock = run_lock.hold(config.model_dir)
    with lock, stop_signals.caught(config.grace_secs) as signals:
        config = configuration.with_checksum(config, checksum)
        newest = committing_saver.recover(config.model_dir)
        _check_max_steps(config, newest)
        if workers is not None:
            _check_rows(config, workers)
            workers.join([newest.step if newest else 0, dataclasses.asdict(config)])
        with _told(workers), tf.Graph().as_default():
            step = _build_step(config, dataset, workers)
            # A run that lost its config.json may be started with other flags.
            if newest is not None:
                committing_saver.check_fits(newest, tf.global_variables())
            progress = Progress(config)
            started = step_loop.started(config, step, newest, progress, workers)
            ended = _ended_in_order(config, newest, progress)
            with ended, dataset.failures_named(), started as run:
                while progress.step < config.max_steps and run.goes_on(signals):
                    run.make_step(signals)
    # Not before: all is saved, and no grace period ends it.
    LiveReport(config.model_dir).write()
    if progress.step < config.max_steps:
        raise _stopped(config, progress.step, signals.received)
    _warn_of_guessing(config, progress)
    return TrainingResult(progress.step, progress.recent_loss(), time.time() - start)


def _check_batch_size(config, dataset):
    values = int(np.prod(dataset.image_shape))
    if config.batch_size * values >= _MAX_VALUES:
        raise ConfigError(
            f"--batch_size is {config.batch_size}, but of images of {values} values at most "
            f"{(_MAX_VALUES - 1) // values} go into one batch"
        )


def _check_data_format(config):
    # TensorFlow says so itself, but in the first step, in 30 lines.
    if config.data_format == "NHWC" or has_channels_first():
        return
    raise ConfigError(
        f"--data_format is 'NCHW', but TensorFlow {tf.version.VERSION} has no convolution "
        "for it on this CPU, and finds no GPU: use NHWC, or on TensorFlow 2 set "
        "TF_ENABLE_ONEDNN_OPTS=1 in the environment"
    )


def has_channels_first() -> bool:
    """Whether TensorFlow has convolutions with channels first on the devices here.

    On a CPU only oneDNN brings them, which TensorFlow 2 takes by itself where there is
    AVX512-VNNI.
    """
    with tf.Graph().as_default(), tf.Session() as session:
        image = tf.placeholder(tf.float32, [1, 1, 2, 2])
        filters = tf.ones([1, 1, 1, 1])
        y = tf.nn.conv2d(image, filters, [1] * 4, "VALID", data_format="NCHW")
        try:
            session.run(y, {image: np.ones(image.shape)})
        except tf.errors.UnimplementedError:
            return False
    return True


@contextlib.contextmanager
def _told(workers):
    """Tells the other workers of an error."""
    # They wait in a collective, which on TensorFlow 1.15 nothing else ends.
    try:
        yield
    except Exception as error:
        if workers is not None:
            workers.fail(error)
        raise


def _follow(config, dataset, checksum, workers):
    """The part of a worker that is not the chief: (last step, its loss)."""
    with stop_signals.caught(config.grace_secs) as signals:
        first_step, chosen = workers.join()
        with _told(workers), tf.Graph().as_default():
            config = configuration.as_chosen(config, chosen)
            configuration.check_checksum(config, checksum)
            step = _build_step(config, dataset, workers)
            followed = step_loop.followed(step, first_step, workers)
            with dataset.failures_named(), followed as run:
                while run.step < config.max_steps and run.goes_on(signals):
                    run.make_step(signals)
    if run.step < config.max_steps:
        raise _stopped(config, run.step, signals.received)
    return run.step, run.loss


def _check_rows(config, workers):
    if config.batch_size < workers.size:
        raise ConfigError(
            f"--batch_size is {config.batch_size}, but must be at least the number of "
            f"workers, {workers.size}: it counts the images of all of them"
        )


def _check_max_steps(config, newest):
    # Before config.json is written, which would say that the run ends where it has been.
    if newest is not None and newest.step > config.max_steps:
        raise ConfigError(
            f"--max_steps is {config.max_steps}, but the run in {config.model_dir} is at "
            f"step {newest.step}: give at least that, or choose another --model_dir for a "
            "new run"
        )


@contextlib.contextmanager
def _ended_in_order(config, newest, progress):
    """Leaves a run that fails with its last curves, or, before its first step, without a trace.

    What its disk refused becomes a `TrainingError` with the step and the reason.
    """
    try:
        with _explained(config, progress):
            try:
                yield
            except (SavingError, *_FILE_ERRORS):
                raise  # a disk that takes no checkpoint takes no curves
            except Exception:
                if progress.step > 0 and progress.writer is not None:
                    progress.end()
                    LiveReport(config.model_dir).write()
                raise
    except Exception:
        # A bad image, say. Else config.json would bind the next start to the flags and data
        # that were wrong.
        if newest is None and progress.step == 0:
            committing_saver.remove_start(config.model_dir)
            configuration.remove(config.model_dir)
        raise


@contextlib.contextmanager
def _explained(config, progress):
    try:
        yield
    except (SavingError, *_FILE_ERRORS) as error:
        reason = error if isinstance(error, SavingError) else first_line(error)
        raise TrainingError(
            f"the run ended at step {progress.step} of {config.max_steps}: {reason}"
        ) from error


def _warn_of_guessing(config, progress):
    """Says on stderr that a run came to an end, but to nothing."""
    loss = progress.recent_loss()
    if loss is None:  # there was no step left to run
        return
    guess = progress.loss_of_guessing()
    # A batch's loss varies: what is hardly better is no better.
    if guess > 0 and loss > 0.98 * guess:
        print(
            f"warning: at its end the loss is {loss:.4g} nats, no better than guessing by "
            f"the frequency of the classes ({guess:.4g}): the network has learnt nothing; "
            f"try a smaller --learning_rate, which is {config.learning_rate:g}, or a larger "
            "one where the loss went down, or more steps",
            file=sys.stderr,
        )


def _stopped(config, step, signal_number):
    name = "another worker"
    if signal_number is not None:
        name = signal.Signals(signal_number).name
    place = f"at step {step} of {config.max_steps}"
    return TrainingStopped(f"stopped by {name} {place}, saved; run it again to go on")


def _build_step(config, dataset, workers=None):
    global_step = tf.train.get_or_create_global_step()
    # Fed where a run begins, in one run with the initialisation of the step itself.
    first_step = tf.placeholder_with_default(tf.cast(global_step, tf.int64), [])
    batches = _input(config, dataset, first_step, workers)
    images, labels = batches.get_next()
    images = tf.identity(images, name="images")  # what a served model calls its input
    objective = network_from_config.build(
        images,
        labels,
        True,
        config,
        dataset.num_classes,
        data_format=config.data_format,
        sync=workers if config.sync_batch_norm else None,
    )
    penalty = tf.losses.get_regularization_loss()
    loss, accuracy = tf.reduce_mean(objective.losses), tf.reduce_mean(objective.hits)
    stop = stops = None
    minimised = {"loss": loss + penalty}
    if workers is not None:
        count = tf.shape(labels)[0]
        minimised = {"loss": loss, "penalty": penalty}
        minimised.update(workers=workers, num_examples=count)
        stop = tf.placeholder_with_default(0.0, [])
        # What is reported is of all workers, and so is the wish of one to stop: by one sum,
        # since what each collective costs is mostly its start.
        part = tf.cast(count, tf.float32) * tf.stack([loss, accuracy, 1.0])
        sums = workers.total(tf.concat([part, [stop]], 0))
        loss, accuracy, stops = sums[0] / sums[2], sums[1] / sums[2], sums[3]
    total_loss = tf.add(loss, penalty, name="total_loss")
    learning_rate = _learning_rate(config, global_step)
    step = Step(
        train_op=_train_op(config, learning_rate, global_step, minimised),
        global_step=global_step,
        total_loss=total_loss,
        loss=loss,
        penalty=penalty,
        labels=labels,
        accuracy=accuracy,
        learning_rate=learning_rate,
        initialize_input=batches.initializer,
        first_step=first_step,
        batches=config.accumulate_steps,
        stop=stop,
        stops=stops,
    )
    _add_summaries(step, config)
    return step


def _train_op(config, learning_rate, global_step, minimised):
    optimizer = tf.train.MomentumOptimizer(learning_rate, config.momentum)
    if config.weight_ema_decay:
        optimizer = _Averaging(optimizer, config.weight_ema_decay)
    # Not `bn_tf1.make_train_op`: that looks at layers of other makers too, and the models
    # have none.
    return make_train_op(
        optimizer=optimizer,
        global_step=global_step,
        variables=fine_tuning.trained_variables(config),
        accumulate_steps=config.accumulate_steps,
        **minimised,
    )


class _Averaging:
    """An optimizer that updates averages of the weights whenever it has updated them."""

    # Not behind the train op: with accumulate_steps most of its runs update no weights.

    def __init__(self, optimizer, decay):
        self.compute_gradients = optimizer.compute_gradients
        self._optimizer, self._decay = optimizer, decay

    def apply_gradients(self, pairs, global_step):
        averages = tf.train.ExponentialMovingAverage(self._decay, global_step)
        applied = self._optimizer.apply_gradients(pairs, global_step=global_step)
        with tf.control_dependencies([applied]):
            return averages.apply(tf.trainable_variables())


def _input(config, dataset, first_step, workers):
    batches = datasets.training_batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        first_step=first_step * config.accumulate_steps,  # counted in batches
        augment=config.augment,
        rows=None if workers is None else workers.rows(config.batch_size),
    )
    return tf.data.make_initializable_iterator(batches)


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
    for name in ("loss", "penalty", "accuracy", "learning_rate"):
        tf.summary.scalar(name, getattr(step, name))
    for call in bn_tf1.batch_norm_calls():
        if call.batch_mean is None:
            continue  # it normalises with the moving statistics, which stand still
        summaries.add_statistics(call, config.bn_epsilon, step.train_op)
