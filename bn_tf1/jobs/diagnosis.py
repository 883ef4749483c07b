"""Which layer breaks the evaluation of a checkpoint of a training run.

The network is built with a tensor `is_training`, so that both modes run on the same
examples; what is compared and how layers are ranked is in `population.divergence`.
"""

from __future__ import annotations

import contextlib

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network_from_config
from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.data.array_batches import ArrayBatches
from bn_tf1.jobs.evaluation import EvaluationError
from bn_tf1.jobs.finished.recalibrated_runs import SwitchedNetwork
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
    dataset = network_from_config.open_split(config, split)
    # Of one size: in a smaller batch the statistics of the batch differ for that alone.
    size = min(_BATCH_SIZE, dataset.num_examples)
    count = min(_MAX_BATCHES, dataset.num_examples // size)
    switched = SwitchedNetwork(config, ArrayBatches(dataset, size, count * size))
    with contextlib.closing(switched):
        try:
            switched.restore(checkpoint, ema=False)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        return switched.divergence()
