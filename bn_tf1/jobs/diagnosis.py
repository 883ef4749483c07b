"""Which layer breaks the evaluation of a checkpoint of a training run.

The network is built once more with a tensor `is_training`, so that both modes run on the
same examples; what is compared and how layers are ranked is in `population.divergence`.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network
from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.data.array_batches import ArrayBatches
from bn_tf1.jobs.evaluation import EvaluationError
from bn_tf1.population.divergence import Divergence

_BATCH_SIZE = 256
# Each layer is measured twice on all of them.
_MAX_BATCHES = 8


def diagnose(model_dir: str, checkpoint: str, split: str = "test") -> Divergence:
    """Compares batch with moving statistics on at most 2,048 examples.

    Args:
        model_dir: folder of the training run.
        checkpoint: path of the checkpoint, without .index.
        split: "test" or "train".

    Raises:
        EvaluationError: the checkpoint was removed, or is not one of this run.
        bn_tf1.jobs.config.ConfigError: the network has no batch-norm layer.
    """
    config = configuration.load(model_dir)
    if config.normalization == "none":
        raise ConfigError("--divergence is given, but --normalization is 'none'")
    dataset = network.open_split(config, split)
    batches = _batches(dataset)
    with tf.Graph().as_default() as graph, tf.Session() as session:
        is_training = tf.placeholder_with_default(False, [])
        images = tf.placeholder(tf.float32, [None, *batches[0][0].shape[1:]])
        labels = tf.placeholder(tf.int32, [None])
        objective = network.build(
            images, labels, is_training, config, dataset.num_classes
        )
        tf.train.get_or_create_global_step()
        try:
            bn_tf1.restore(session, checkpoint)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        return bn_tf1.divergence(
            session,
            bn_tf1.batch_norm_calls(graph),
            [{images: x, labels: y} for x, y in batches],
            training={is_training: True},
            inference={is_training: False},
            metric=tf.reduce_mean(objective.hits),
        )


def _batches(dataset):
    """Batches of one size, at most `_MAX_BATCHES`."""
    size = min(_BATCH_SIZE, dataset.num_examples)
    count = min(_MAX_BATCHES, dataset.num_examples // size)
    return list(ArrayBatches(dataset, size, count * size))
