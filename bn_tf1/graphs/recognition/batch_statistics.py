"""What can be a mean or variance of a batch norm: statistics per channel, over the batch.

Layer, instance and group normalization reduce other axes than the batch; their
statistics are none of these.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

from bn_tf1.graphs.node_values import (
    Leaves,
    integers,
    leaves,
    operands_of,
    origin,
    scalars,
    static_shape,
)
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.view import GraphView, node_of, reached, reference_to

# By their last input; tf.nn.weighted_moments of 1.15 multiplies by a reciprocal.
_DIVISIONS = frozenset(["RealDiv", "Div", "DivNoNan", "Reciprocal", "Inv"])
_STEPS = 100


def statistic_leaves(view: GraphView, reference: int) -> Leaves | None:
    """The leaves of a mean or variance of a batch norm; None if it is no such thing."""
    found = leaves(view, reference)
    if found.others or not any(found):
        return None
    # A layer norm reduces each example by itself.
    for node in found.reductions:
        if not _reduces_the_batch(view, node):
            return None
    for node in found.variables | found.constants:
        if not is_per_channel(view, node):
            return None
    return found


def _reduces_the_batch(view, node):
    axes = _reduced_axes(view, node)
    if axes is None:
        # tf.range(tf.rank(x) - 1) begins with 0, whatever the rank.
        source = node_of(origin(view, view.inputs[node][-1]))
        if view.ops[source] != "Range":
            return False
        return scalars(view, view.inputs[source][0]) == {0.0}
    return 0 in axes


def _reduced_axes(view, node):
    if len(view.inputs[node]) < 2:
        return None
    axes = integers(view, view.inputs[node][1])
    if axes and min(axes) < 0:  # counted from the end
        shape = static_shape(view, view.inputs[node][0])
        if shape is not None:
            axes = tuple(axis % len(shape) if shape else axis for axis in axes)
    return axes


def is_per_channel(view: GraphView, node: int) -> bool:
    """Whether at most one size of a variable or constant is other than 1."""
    shape = static_shape(view, reference_to(node))
    return shape is not None and sum(size != 1 for size in shape) <= 1


def is_same_statistic(mean: Leaves, variance: Leaves) -> bool:
    """No mean and variance: the same variable or constant is in both places."""
    # Of one batch the variance is made from the mean.
    if mean.reductions or variance.reductions:
        return False
    return bool(mean.variables & variance.variables) or bool(
        mean.constants & variance.constants
    )


def is_weighted(view: GraphView, mean: int | None) -> bool:
    """Whether `mean` is a sum divided by one of data, as of a mask or other weights.

    Otherwise it is divided by a number that constants and shapes tell.
    """
    start = [] if mean is None else [mean]
    found = reached(start, partial(operands_of, view), _STEPS)
    # Each costs a walk of its own, and an AddN may have any number of them.
    nodes = map(node_of, islice(found, _STEPS))
    sums = [
        node
        for division in nodes
        if view.ops[division] in _DIVISIONS
        for divisor in view.inputs[division][-1:]
        for node in leaves(view, divisor).reductions
    ]
    return any(leaves(view, view.inputs[node][0]).others for node in sums)


def is_statistic_like(view: GraphView, reference: int) -> bool:
    """Whether it has one number for each channel; what is pooled for each example has not."""
    found = leaves(view, reference)
    if found.others or not all(_reduces_the_batch(view, n) for n in found.reductions):
        return False
    return all(is_per_channel(view, node) for node in found.variables | found.constants)


def through_casts(view: GraphView, reference: int) -> int:
    """Where the numbers of `reference` come from, before casts and reshapes."""
    for _ in range(8):
        if view.ops[node_of(reference)] not in ("Identity", "Cast", "Reshape"):
            break
        reference = view.inputs[node_of(reference)][0]
    return reference


def batch_axes(view: GraphView, found: Leaves) -> tuple[int, ...] | None:
    """The axes that a statistic reduces, sorted; None where it is not known."""
    for node in found.reductions:
        axes = _reduced_axes(view, node)
        if axes:
            return tuple(sorted(axes))
    return None


def layout_of(view: GraphView, x: int, axes: tuple[int, ...] | None) -> str:
    """ "NHWC" or "NCHW" of an `x` of rank 4 or 5 reduced over `axes`; "" if unknown."""
    shape = static_shape(view, x)
    if axes is None or shape is None or len(shape) not in (4, 5):
        return ""
    channels = set(range(len(shape))) - set(axes)
    # A view of several groups, as of ghost batches, has more than one axis left.
    if len(channels) != 1:
        return ""
    return {1: "NCHW", len(shape) - 1: "NHWC"}.get(min(channels), "")


def composed(
    view: GraphView,
    node: int,
    x: int,
    operands: tuple,
    epsilon: float,
    axes: tuple[int, ...] | None,
) -> Normalization:
    """A batch norm of several operations, whose last one is `node`.

    Args:
        view: the graph.
        node, x, epsilon, axes: see `Normalization`.
        operands: (gamma, beta, mean, variance).
    """
    mean, variance = operands[2:]
    return Normalization(
        node,
        "composed",
        view.ops[node],
        x,
        *operands,
        leaves(view, mean),
        leaves(view, variance),
        epsilon,
        layout_of(view, x, axes),
        axes=axes,
    )


def mode_of(variance: Leaves, mean: Leaves) -> str:
    """ "training", "inference" or "switched", by what the statistics come from."""
    from_batch = variance.reductions or variance.statistics or mean.reductions
    from_moving = variance.variables or variance.constants
    if from_batch and from_moving:
        return "switched"
    return "training" if from_batch else "inference"
