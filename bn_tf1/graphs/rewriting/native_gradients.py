"""Gives the layers of `bn_tf1` in a graph TensorFlow's own gradients.

What composes a layer is differentiable by itself; a gradient by hand, which only a program
that has imported `bn_tf1` knows, is faster. Two operations stand in the way: the fused
kernel that is given the statistics of the batch, and takes them for constants, and the norm
of what is constant, which has no gradient. Arithmetic takes their place.

Contract: the outputs are the same up to rounding, and keep their names. Second derivatives
of a gradient by hand that is in the graph already, and statistics of several workers, stay
`bn_tf1`'s: without it they are a LookupError, and not wrong.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.formulas import (
    add_to_contexts,
    compose,
    replace_in_bodies,
)
from bn_tf1.statistics.registered_gradients import (
    FUSED_BATCH,
    NORMALIZE_BATCH,
    SUM_OF_SQUARES,
)

_ATTRIBUTE = "_gradient_op_type"
_NATIVE = (FUSED_BATCH, NORMALIZE_BATCH, SUM_OF_SQUARES)
_KERNELS = ("FusedBatchNormV2", "FusedBatchNormV3")
_SAME_VALUES = ("Identity", "Reshape", "Cast", "Sum", "Squeeze")


def give_native_gradients(meta: tf.MetaGraphDef) -> list[str]:
    """Changes `meta`; returns the names of the nodes that lost a gradient by hand."""
    changed, made = replace_in_bodies(meta.graph_def, _without_gradient)
    add_to_contexts(meta, made)
    return changed


def _without_gradient(node, by_name, in_function):
    # Graphs of 0.1.0 have settings behind the name. To go with 1.0.
    own = node.attr[_ATTRIBUTE].s if _ATTRIBUTE in node.attr else b""
    name = own.decode("utf-8", "replace").partition("(")[0]
    if name not in _NATIVE:
        return None
    del node.attr[_ATTRIBUTE]
    if name == NORMALIZE_BATCH:
        kernel = _behind(by_name, node.input[0], *_KERNELS)
        if kernel is not None and not kernel.attr["is_training"].b:
            return _without_kernel(kernel, in_function)
    elif name == SUM_OF_SQUARES:
        square = _behind(by_name, node.input[0], "Square")
        if square is not None:
            norm = _behind(by_name, square.input[0], "EuclideanNorm")
            return _without_norm(square, norm, in_function)
    return [], {}


def _behind(by_name, reference, *types):
    """The node of one of the `types` whose numbers `reference` has, or None."""
    for _ in range(len(by_name)):  # no longer way than that is without a cycle
        node = by_name.get(reference.split(":")[0])
        if node is None or node.op in types:
            return node
        if node.op not in _SAME_VALUES:
            return None
        reference = node.input[0]
    return None


def _without_kernel(kernel, in_function):
    """Makes of its first output, the one that is taken, (x - mean) * factor + offset."""
    epsilon = kernel.attr["epsilon"].f

    def build(x, scale, offset, mean, variance):
        factor = tf.rsqrt(variance + epsilon) * scale
        return [tf.cast((tf.cast(x, mean.dtype) - mean) * factor + offset, x.dtype)]

    values, statistics = (tf.as_dtype(kernel.attr[key].type) for key in ("T", "U"))
    made = compose(kernel, [values] + [statistics] * 4, build, in_function)
    return made, {f"{kernel.name}:y:0": f"{kernel.name}:output:0"}


def _without_norm(square, norm, in_function):
    """Makes a sum of squares of a squared norm."""
    # By hand: the norm keeps its name, and nothing of it is left beside the sum.
    squares = tf.NodeDef(name=f"{norm.name}/composed/squares", op="Mul")
    squares.device = norm.device
    squares.input.extend([norm.input[0], norm.input[0]])
    squares.attr["T"].CopyFrom(norm.attr["T"])
    norm.op = "Sum"
    norm.input[0] = squares.name + (":z:0" if in_function else "")
    square.op = "Identity"
    return [squares], {f"{square.name}:y:0": f"{square.name}:output:0"}
