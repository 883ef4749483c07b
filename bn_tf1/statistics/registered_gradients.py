"""Gradients by hand, known to TensorFlow by a name.

Contract: a graph names the gradient of an operation, and its file keeps the name. The
names are few and never change, they are registered as soon as `bn_tf1` is imported, and a
gradient takes all that it needs from its operation: so a graph can be imported, and
differentiated, by another process on another version of TensorFlow.

`tf.custom_gradient` is not used because its gradient finds the tensors of the graph that
it was built in, and not those of the copy that a function or a branch of control flow v2
becomes: TensorFlow 1.15 fails there.
"""

from __future__ import annotations

from typing import Callable, Sequence

import tensorflow.compat.v1 as tf

# Of an IdentityN, as `with_gradient` makes it.
NORMALIZE_BATCH = "bn_tf1.normalize_batch"
NORMALIZE_PART = "bn_tf1.normalize_part"
OUTPUT_GRADIENTS = "bn_tf1.output_gradients"
PART_MOMENTS = "bn_tf1.part_moments"
SUM_OF_SQUARES = "bn_tf1.sum_of_squares"
# Of a fused kernel.
FUSED_BATCH = "bn_tf1.fused_batch"


def gradient_of(name: str) -> Callable:
    """Registers the function below as the gradient of that name.

    It is called with an operation and the gradients of its outputs, and returns those of
    its inputs.
    """

    def register(gradient):
        try:
            tf.RegisterGradient(name)(gradient)
        except KeyError:
            pass  # this library was loaded before, and TensorFlow remembers it
        return gradient

    return register


def with_gradient(
    name: str,
    outputs: Sequence[tf.Tensor],
    inputs: Sequence[tf.Tensor],
    settings: tuple[float, tuple[int, ...]] | None = None,
) -> list:
    """`outputs`, by an IdentityN that has the gradient of that name.

    Args:
        outputs: what the gradient is given for: the first inputs of the IdentityN.
        inputs: what it is taken for, or needs: the last ones.
        settings: an epsilon and the channel axes. A constant of them comes in between.
    """
    tensors = [*outputs, *inputs]
    # A tensor, since an IdentityN has no attribute to hold them; float64, so that epsilon
    # is the same number in the gradient.
    if settings is not None:
        epsilon, axes = settings
        constant = tf.constant([epsilon, *axes], tf.float64, name="settings")
        tensors.insert(len(outputs), constant)
    # Of all operations that copy, this one takes several tensors, and every tool knows it.
    with tf.get_default_graph().gradient_override_map({"IdentityN": name}):
        return tf.identity_n(tensors)[: len(outputs)]


def settings_of(constant: tf.Tensor) -> tuple[float, tuple[int, ...]]:
    """The epsilon and the channel axes that `with_gradient` was given."""
    epsilon, *axes = tf.get_static_value(constant).tolist()
    return epsilon, tuple(map(int, axes))
