"""From a configuration to a network on a data set: what both jobs build.

The training and the evaluation job must mean the same model and the same data by the
same `config.json`; this is the one place that translates it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.arguments import WarmUp
from bn_tf1.jobs import models, slim_models
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.data import datasets, record_shards
from bn_tf1.jobs.data.idx_and_cifar import DataFileError


class Objective(NamedTuple):
    """What is minimised and what is reported, float32.

    Attributes:
        logits: shape [batch, num_classes].
        losses: cross-entropy by example in nats, shape [batch].
        hits: 1 where the label is the largest logit and 0 elsewhere, shape [batch].
    """

    logits: tf.Tensor
    losses: tf.Tensor
    hits: tf.Tensor


def open_split(
    config: Config, split: str
) -> datasets.ImageDataset | datasets.StreamedDataset:
    """The checked data set of `config`; `split` is "train" or "test".

    Raises:
        ConfigError: the data set needs --data_dir.
        DataFileError: a data file is missing or damaged.
    """
    try:
        return datasets.open_dataset(
            config.dataset,
            split,
            data_dir=config.data_dir or None,
            synthetic=datasets.SyntheticImages(
                image_size=config.synthetic_size,
                channels=config.synthetic_channels,
                num_classes=config.synthetic_classes,
                num_examples=config.synthetic_examples,
                seed=config.seed,
            ),
            streaming=datasets.Streaming(
                image_size=config.image_size,
                augments_photos=config.augment_photos,
                max_bad_examples=config.max_bad_examples,
                test_share=config.test_share,
                seed=config.seed,
                features=record_shards.Features(
                    config.record_image, config.record_label, config.label_offset
                ),
                num_classes=config.record_classes or None,
                index_folder=config.model_dir,
            ),
        )
    # It is a ValueError, too, but of a file and not of an argument.
    except DataFileError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build(
    images: tf.Tensor,
    labels: tf.Tensor,
    is_training,
    config: Config,
    num_classes: int,
    *,
    fold_once: bool = False,
    data_format: str = "NHWC",
    sync: Any = None,
) -> Objective:
    """The model of `config`, applied to `images`.

    Args:
        images: float32 of shape [batch, height, width, channels] in [0, 1].
        labels: int32 of shape [batch], in [0, num_classes).
        is_training, sync: as for `batch_norm`.
        config: the configuration.
        num_classes: a count, which the data set tells.
        fold_once, data_format: as in `models.Settings`. The format of `config` is for
            training alone: channels last, the default, are what every device can evaluate.
    """
    # What a model is told has the name of the option that says it.
    options = dataclasses.asdict(config)
    options.update(data_format=data_format, fold_once=fold_once, bn_sync=sync)
    if config.bn_kernel == "compiled" and is_training is not True:
        # Only who trains has it built; others may be on another machine.
        options["bn_kernel"] = "auto"
    if config.bn_decay_warm_up:
        options["bn_decay"] = WarmUp(config.bn_decay)
    told = {name: options[name] for name in models.Settings._fields if name in options}
    settings = models.Settings(num_classes, **told)
    # Plain functions, which need not know that there is a command line.
    model = {**models.MODELS, **slim_models.MODELS}[config.model]
    logits = model(images, is_training, settings)
    # Without the penalty, which depends on the weights alone: the losses of training and of
    # evaluation are then of one kind.
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=labels, logits=logits
    )
    predicted = tf.argmax(logits, 1, output_type=tf.int32)
    return Objective(logits, losses, tf.cast(tf.equal(predicted, labels), tf.float32))


def misfit(shapes: Mapping[str, Sequence[int]], path: str) -> str | None:
    """Why a checkpoint is not of the network in the default graph; None if it is.

    Args:
        shapes: those in the checkpoint, by name. It may lack the global step, as weights
            do that were published.
        path: what the words call it.
    """
    wanted = {v.op.name: v.shape.as_list() for v in tf.global_variables()}
    missing = sorted(set(wanted) - set(shapes) - {tf.GraphKeys.GLOBAL_STEP})
    if missing:
        return (
            f"the checkpoint {path} lacks {', '.join(missing)}; save it with a "
            "tf.train.Saver of tf.global_variables(): the moving statistics are not "
            "trainable variables"
        )
    for name in sorted(set(wanted) & set(shapes)):
        found = list(shapes[name])
        if found != wanted[name]:
            return (
                f"the checkpoint {path} has {name} of shape {found}, but the "
                f"network that config.json of --model_dir tells of has {wanted[name]}: "
                "give the folder of the run that the checkpoint is of"
            )
    return None
