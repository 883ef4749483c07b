"""What a run writes down for TensorBoard and for its report: curves with a meaning.

Training and evaluation use the same tags, in the folders `train` and `eval` of the run, so
that TensorBoard draws both in one chart. What is told of a layer stands in one group, whose
name is the layer's. The first point of each curve carries its description.

Source: the older kind of summaries, which TensorFlow 1.15 and 2.21 both write, and from
which TensorBoard takes a description, too (`summary_description` in summary.proto).
"""

from __future__ import annotations

import os
import re
from typing import Mapping

import tensorflow.compat.v1 as tf

TRAIN_FOLDER = "train"

_DESCRIPTIONS = {
    "loss": "Mean cross-entropy in nats, without the L2 penalty: of the batch (train), or "
    "of all held-out examples (eval).",
    "penalty": "L2 penalty in nats. What is minimised is loss + penalty.",
    "accuracy": "Share of the examples whose label has the largest logit.",
    "accuracy_top5": "Share of the examples whose label is among the five largest logits.",
    "learning_rate": "Learning rate of the step.",
    "examples_per_second": "Training examples per second since the point before.",
    "moving_mean": "Moving means of the channels, after the update of the step.",
    "moving_variance": "Moving variances of the channels, after the update of the step.",
    "mean_distance": "How far the means of the batch lie from the moving ones, in "
    "deviations; average over the channels.",
    "variance_distance": "How far the variances of the batch lie from the moving ones: "
    "|ln| of their ratio; average over the channels.",
    "size_of_moving_mean": "Root mean square of the moving means over the channels.",
    "size_of_batch_mean": "Root mean square of the batch's means over the channels.",
    "moving_deviation": "Root of the moving variance; average over the channels.",
    "batch_deviation": "Root of the batch's variance; average over the channels.",
}


def layer_group(scope: str) -> str:
    """The group of a layer's curves: its scope as one word, without "batch_norm"."""
    # TensorBoard groups by what stands before the first slash.
    return re.sub("/batch_norm$", "", scope.rstrip("/")).replace("/", ".")


def add_statistics(call, epsilon: float, train_op: tf.Operation) -> None:
    """Adds the summaries of one layer to the default graph.

    Of `call`, a `bn_tf1.BatchNormCall` in training mode, once `train_op` has made its
    updates; `epsilon` is added to the variances.
    """
    with tf.name_scope(layer_group(call.name) + "/"):
        # After the update of this step: without an order they might be read before. Not
        # `call.updates`: a train op may have others made in their place.
        with tf.control_dependencies([train_op]):
            mean = call.moving_mean.read_value()
            variance = call.moving_variance.read_value()
        batch_mean, batch_variance = call.batch_mean, call.batch_variance
        ratio = (batch_variance + epsilon) / (variance + epsilon)
        distance = tf.abs(batch_mean - mean) / tf.sqrt(variance + epsilon)
        tf.summary.histogram("moving_mean", mean)
        tf.summary.histogram("moving_variance", variance)
        for name, channels in (
            ("mean_distance", distance),
            ("variance_distance", tf.abs(tf.log(ratio))),
            ("moving_deviation", tf.sqrt(variance)),
            ("batch_deviation", tf.sqrt(batch_variance)),
        ):
            tf.summary.scalar(name, tf.reduce_mean(channels))
        for name, channels in (
            ("size_of_moving_mean", mean),
            ("size_of_batch_mean", batch_mean),
        ):
            tf.summary.scalar(name, tf.sqrt(tf.reduce_mean(tf.square(channels))))


class CurveWriter(tf.summary.FileWriter):
    """A writer of event files that describes what it writes."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self._last_steps: dict[str, int] = {}  # of each curve

    def add_summary(self, summary, global_step) -> None:
        """Writes a summary, serialized or not, with the descriptions of what is new."""
        if isinstance(summary, bytes):
            summary = tf.Summary.FromString(summary)
        for value in summary.value:
            # Once: TensorBoard keeps what the first point says.
            name = value.tag.rpartition("/")[2]
            if value.tag not in self._last_steps and name in _DESCRIPTIONS:
                value.metadata.summary_description = _DESCRIPTIONS[name]
            self._last_steps[value.tag] = global_step
        super().add_summary(summary, global_step)

    def has_point(self, tag: str, step: int) -> bool:
        """Whether the last point that was written of a curve is that of `step`."""
        return self._last_steps.get(tag) == step

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes values by tag."""
        points = [
            tf.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()
        ]
        self.add_summary(tf.Summary(value=points), step)


def train_folder(model_dir: str) -> str:
    """Where the training job writes its event files."""
    return os.path.join(model_dir, TRAIN_FOLDER)
