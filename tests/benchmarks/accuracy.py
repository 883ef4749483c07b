"""How far layers are from float64, for means of no and of 300 deviations."""

from __future__ import annotations

import numpy as np
import tensorflow.compat.v1 as tf

from tests import reference
from tests.benchmarks import peers, timing

CONTENDERS = {
    "recipe": peers.recipe,
    peers.OURS: peers.ours,
    "bn_tf1 composed": peers.composed,
}
if peers.is_built():
    CONTENDERS[peers.COMPILED] = peers.compiled

_FIGURES = ("output", "mean", "gradient of x", "gradient of gamma")


def measure(shapes, deviations=(0, 300)) -> list[timing.Row]:
    """The root mean squares of the errors of one float32 training step.

    Args:
        shapes: a mapping from a name to (shape, axis).
        deviations: how many deviations, which are 1, the mean is.
    """
    found = []
    for name, (shape, axis) in shapes.items():
        for mean in deviations:
            random = np.random.RandomState(0)
            batch = (mean + random.normal(size=shape)).astype(np.float32)
            slope = random.normal(size=shape).astype(np.float32)
            expected = _expected(batch, slope, axis)
            errors = {
                contender: _errors(layer, batch, slope, axis, expected)
                for contender, layer in CONTENDERS.items()
            }
            for index, what in enumerate(_FIGURES):
                case = f"error of the {what}, {name}, mean of {mean} deviations"
                found += _rows(case, {key: by[index] for key, by in errors.items()})
    return found


def _rows(case, errors):
    ours = errors[peers.OURS]
    return [
        timing.Row(case, contender, error, 0.0, "rms", ours / error)
        for contender, error in errors.items()
    ]


def _expected(batch, slope, axis):
    """The true `_FIGURES`."""
    gradients = reference.training_gradients(batch, slope, axis=axis)
    output = reference.training_output(batch, axis=axis)
    return output, reference.moments(batch, axis).mean, gradients.x, gradients.gamma


def _errors(layer, batch, slope, axis, expected):
    with tf.Graph().as_default(), tf.Session() as session:
        x, dy = (tf.placeholder(tf.float32, batch.shape) for _ in range(2))
        y = layer(x, True, axis)
        learned = tf.trainable_variables()
        gamma = next(v for v in learned if v.op.name.endswith("gamma"))
        moving_mean = next(v for v in tf.global_variables() if v not in learned)
        outputs = [y, *tf.gradients(y, [x, gamma], dy)]
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        session.run(tf.global_variables_initializer())
        y, dx, dgamma, _ = session.run([*outputs, updates], {x: batch, dy: slope})
        # It started at 0, and took one step.
        mean = session.run(moving_mean) / np.float64(np.float32(1 - peers.DECAY))
    return [
        float(np.sqrt(np.mean((found - values) ** 2)))
        for found, values in zip((y, mean, dx, dgamma), expected)
    ]
