"""Recalibration of a checkpoint of a training run, over its own training examples.

The network is built with a tensor `is_training`, and its examples are those of the
training split, each once, in the order of the first epoch and without augmentation, as
evaluation sees its own. What is measured is in `population.recalibration`.

Contract: nothing is written over anything, and nothing into the run's folder but under a
name that is asked for. The result stands beside a config.json, so that eval.py evaluates
it by its path; in a folder of its own, train.py trains it on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Callable, Iterator, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.built_layers import batch_norm_calls
from bn_tf1.checkpoints.dialects import AVERAGE
from bn_tf1.checkpoints.reader_writer import open_checkpoint
from bn_tf1.checkpoints.restore import restore
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network_from_config
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.data.array_batches import ArrayBatches
from bn_tf1.jobs.saving import committing_saver
from bn_tf1.population.divergence import Divergence, divergence
from bn_tf1.population.measuring_passes import unwatched
from bn_tf1.population.recalibrated_checkpoints import check_free, write_recalibrated
from bn_tf1.population.recalibration import Recalibration, recalibrate

# Large: in one pass a layer sees what batch statistics made of the layers before it, and
# those of larger batches are nearer to the ones that evaluation uses.
BATCH_SIZE = 1024


class RecalibratedRun(NamedTuple):
    """What was done, and what it did to the accuracy on the held-out split.

    Attributes:
        checkpoint: the checkpoint that it was done to.
        report: the `Recalibration`.
        before, after: accuracy with moving statistics, a share.
        batch: accuracy with those of batches.
        examples: how many examples the accuracies are of.
    """

    checkpoint: str
    report: Recalibration
    before: float
    batch: float
    after: float
    examples: int


def recalibrate_run(
    model_dir: str,
    destination: str,
    *,
    checkpoint: str | None = None,
    num_examples: int | None = None,
    batch_size: int = BATCH_SIZE,
    ema: bool = False,
    exact: bool = False,
    watch: Callable = unwatched,
) -> RecalibratedRun:
    """Writes a checkpoint of a run with the statistics of its weights.

    Args:
        model_dir: folder of the training run.
        destination: prefix of the checkpoint to write; nothing may be there.
        checkpoint: the checkpoint; the newest by default.
        num_examples: how many training examples to use; all by default.
        batch_size: examples in a batch.
        ema: whether weight averages become the weights first.
        exact, watch: as for `recalibrate`.

    Raises:
        ConfigError: the run has no batch norm, or the folder of `destination` is that of
            another run.
        CheckpointError: there is no checkpoint, or `destination` is not free.
        bn_tf1.jobs.data.idx_and_cifar.DataFileError: a data file is missing or damaged.
        ValueError: as `recalibrate`.
    """
    config = configuration.load(model_dir)
    if config.normalization == "none":
        raise ConfigError(f"the run in {model_dir} has --normalization='none'")
    source = open_checkpoint(checkpoint or _newest(model_dir))
    with _folder_for(destination, config), contextlib.ExitStack() as stack:
        train, test = (
            network_from_config.open_split(config, split) for split in ("train", "test")
        )
        # In batches of the same size, which the accuracy with batch statistics depends on.
        held_out = ArrayBatches(test, batch_size)
        switched = SwitchedNetwork(
            config, ArrayBatches(train, batch_size, num_examples)
        )
        stack.callback(switched.close)
        switched.restore(source.prefix, ema=ema)
        before = switched.accuracy(held_out, is_training=False)
        batch = switched.accuracy(held_out, is_training=True)
        report = switched.recalibrate(exact=exact, with_mismatch=True, watch=watch)
        after = switched.accuracy(held_out, is_training=False)
        # Without the graph of the training: it would tell a decay, from which one would
        # take statistics for averages of too few steps.
        write_recalibrated(destination, source, report.values(), ema=ema)
        _complete_folder(destination, config)
    return RecalibratedRun(source.prefix, report, before, batch, after, held_out.count)


def _newest(model_dir):
    saved = committing_saver.listed(model_dir)
    if not saved:
        raise ConfigError(f"there is no checkpoint in {model_dir}: run train.py first")
    return saved[-1].path


@contextlib.contextmanager
def _folder_for(destination, config):
    """The folder of `destination`, which is made, and removed if nothing comes of it."""
    folder = os.path.dirname(destination) or "."
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        check_free(destination)
        has_config = os.path.exists(os.path.join(folder, configuration.CONFIG_FILE))
        if has_config and not _is_same_run(configuration.load(folder), config):
            raise ConfigError(
                f"{folder} has the config.json of another run: write to a folder of its "
                "own"
            )
        yield
    except BaseException:  # Ctrl-C among them
        if made:
            with contextlib.suppress(OSError):  # it is not empty: it is left
                os.rmdir(folder)
        raise


def _is_same_run(one, other):
    # What may change in a run may have changed since.
    changed = {name: getattr(other, name) for name in configuration.CHANGEABLE}
    return dataclasses.replace(one, **changed) == other


def _complete_folder(destination, config):
    """Lets eval.py and train.py find what they need beside the checkpoint."""
    folder = os.path.dirname(destination) or "."
    # A folder that has one is the run's own, or has an earlier result: there the newest
    # checkpoint stays what it is, and this one is given by its path.
    if not os.path.exists(os.path.join(folder, configuration.CONFIG_FILE)):
        configuration.save(dataclasses.replace(config, model_dir=folder))
        if not os.path.exists(os.path.join(folder, committing_saver.STATE_FILE)):
            tf.train.update_checkpoint_state(folder, os.path.basename(destination))


class SwitchedNetwork:
    """The network of a run in a session, with a tensor `is_training`."""

    def __init__(self, config: Config, examples: ArrayBatches):
        """`examples` are those that its statistics shall be those of."""
        self._examples = examples
        self._graph = tf.Graph()
        with self._graph.as_default():
            shape = examples.dataset.image_shape
            self._is_training = tf.placeholder_with_default(False, [])
            self._images = tf.placeholder(tf.float32, [None, *shape])
            self._labels = tf.placeholder(tf.int32, [None])
            self._hits = network_from_config.build(
                self._images,
                self._labels,
                self._is_training,
                config,
                examples.dataset.num_classes,
            ).hits
            self._metric = tf.reduce_mean(self._hits)
            # Every checkpoint of a run has it, and is restored as a whole.
            tf.train.get_or_create_global_step()
        self._session = tf.Session(graph=self._graph)

    def close(self) -> None:
        """Ends the session."""
        self._session.close()

    def restore(self, checkpoint: str, *, ema: bool) -> None:
        """Restores a checkpoint of the run; the averages of its weights if `ema`.

        Raises:
            ConfigError: it is of another network.
        """
        shapes = open_checkpoint(checkpoint).shapes
        with self._graph.as_default():
            misfit = network_from_config.misfit(shapes, checkpoint)
        if misfit is not None:
            raise ConfigError(misfit)
        restore(self._session, checkpoint, ema=AVERAGE if ema else None)

    def accuracy(self, batches: ArrayBatches, *, is_training: bool) -> float:
        """The share of `batches` that is classified rightly."""
        hits = [
            self._session.run(
                self._hits,
                {self._images: x, self._labels: y, self._is_training: is_training},
            )
            for x, y in batches
        ]
        return float(np.mean(np.concatenate(hits), dtype=np.float64))

    def recalibrate(
        self, *, exact: bool = False, with_mismatch: bool = False, watch=unwatched
    ) -> Recalibration:
        """Gives the layers the statistics of the examples."""
        # A second mode costs a second pass, which an evaluation of averages does without.
        inference = {self._is_training: False} if exact or with_mismatch else None
        return recalibrate(
            self._session, self, inference=inference, exact=exact, watch=watch
        )

    def __iter__(self) -> Iterator[dict]:
        """A feed in training mode for each batch, as often as one iterates."""
        for images, _ in self._examples:
            yield {self._images: images, self._is_training: True}

    def divergence(self) -> Divergence:
        """Compares batch with moving statistics on the examples, layer by layer."""
        return divergence(
            self._session,
            batch_norm_calls(self._graph),
            [{self._images: x, self._labels: y} for x, y in self._examples],
            training={self._is_training: True},
            inference={self._is_training: False},
            metric=self._metric,
        )

    def values(self) -> dict[str, np.ndarray]:
        """The variables by name."""
        variables = self._graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
        values = self._session.run(variables)
        return {v.op.name: value for v, value in zip(variables, values)}
