"""Runs of train.py as models for serving, and what such a model reaches on their data.

A run brings what a foreign graph needs to be told: examples of its test split to check
the model on, and, for the description beside the model, the names of its classes and its
configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import Any, NamedTuple

import numpy as np

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs import network_from_config
from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.data.array_batches import arrays_of
from bn_tf1.serving import exporting, model_formats
from bn_tf1.serving.exporting import Export
from bn_tf1.serving.writing import DESCRIPTION

_BATCH_SIZE = 256
_EXAMPLES = 64


class ExportedResult(NamedTuple):
    """What an exported model reaches on a split of a data set.

    Attributes:
        path: the model.
        format: its format.
        split: the split.
        examples: the number of examples.
        accuracy: share of right predictions.
        loss: mean cross-entropy in nats.
    """

    path: str
    format: str
    split: str
    examples: int
    accuracy: float
    loss: float


def export(
    source: str, out: str, *, preprocessing: bool = False, **options: Any
) -> Export:
    """Makes a checked model for serving of a training run, or of somebody's graph.

    Args:
        source: the folder of a run of train.py, or what
            `bn_tf1.serving.exporting.export` takes.
        out: as there.
        preprocessing: whether the model of a run takes stored pixels (uint8), and not
            numbers in [0, 1].
        options: as there.

    Returns:
        As there.
    """
    if not _is_run(source):
        if preprocessing:
            raise ValueError(
                f"`preprocessing` is for a run of train.py, but {source} has no "
                f"{configuration.CONFIG_FILE}"
            )
        return exporting.export(source, out, **options)
    config = configuration.load(source)
    dataset = network_from_config.open_split(config, "test")
    scale = 1 / dataset.max_pixel if preprocessing else None
    if options.get("examples") is None:
        # Its own images: on random numbers a wrong mean may make no difference.
        images, _ = next(_batches(dataset, _EXAMPLES))
        options["examples"] = _stored(images, scale)
    numbers = map(str, range(dataset.num_classes))
    # Who serves the model has neither the data set nor config.json.
    options["description"] = {
        "class_names": list(dataset.class_names or numbers),
        "config": dataclasses.asdict(config),
    }
    return exporting.export(source, out, pixel_scale=scale, **options)


def _is_run(source):
    return os.path.isfile(os.path.join(source, configuration.CONFIG_FILE))


def _stored(images, scale):
    # Rounded: 0.1 * 255 may come out just below a whole number, which a cast would cut.
    return np.rint(images / scale).astype(np.uint8) if scale else images


def evaluate_exported(path: str, model_dir: str, split: str) -> ExportedResult:
    """Measures an exported model, by its own runtime, on the data of a run.

    Raises:
        ConfigError: `path` is no exported model of one input and one output, or
            `model_dir` no run.
    """
    described = _description(path)
    config = configuration.load(model_dir)
    dataset = network_from_config.open_split(config, split)
    (given,), (taken,) = described["inputs"], described["outputs"]
    scale = 1 / dataset.max_pixel if given["dtype"] == "uint8" else None
    size = (given["shape"] or [None])[0]
    step = {
        "kind": described["format"],
        "path": path,
        "outputs": [taken["tensor"][: -len(":0")]],
    }
    # The runtime takes feeds as it needs them, one batch ahead of what it gives.
    own, batches = itertools.tee(_batches(dataset, size or _BATCH_SIZE))
    name = given["tensor"][: -len(":0")]
    feeds = ({name: _filled(_stored(x, scale), size)} for x, _ in own)
    hits, losses = [], []
    for (logits,), (_, labels) in zip(model_formats.run(step, feeds), batches):
        # What filled up the last batch is cut off.
        logits = np.asarray(logits, np.float64)[: len(labels)]
        hits.append(logits.argmax(1) == labels)
        # Subtracted first: exp of a logit above 709 is infinite.
        largest = logits.max(1, keepdims=True)
        total = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
        losses.append(total - logits[np.arange(len(labels)), labels])
    return ExportedResult(
        path,
        described["format"],
        split,
        sum(map(len, hits)),
        float(np.mean(np.concatenate(hits))),
        float(np.mean(np.concatenate(losses))),
    )


def _filled(images, size):
    """`images`, the last batch of them filled up to the `size` that a model takes."""
    if size is None or len(images) == size:
        return images
    # A model of a fixed batch takes nothing else; what is too much is cut off again.
    return np.resize(images, (size, *images.shape[1:]))


def _description(path):
    file = os.path.join(path, DESCRIPTION) if os.path.isdir(path) else path + ".json"
    try:
        with open(file, encoding="utf-8") as opened:
            described = json.load(opened)
        if len(described["inputs"]) == len(described["outputs"]) == 1:
            return described
        reason = "the model has several inputs or outputs"
    except OSError as error:
        reason = f"{file} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        reason = f"{file} is no description of a model"
    raise ConfigError(
        f"--exported is {path!r}, but {reason}: give what `python -m bn_tf1 export` made "
        "of a run"
    )


def _batches(dataset, size):
    """(images, labels) of each example once, in order, as eval.py sees them."""
    return arrays_of(lambda: datasets.evaluation_batches(dataset, size))
