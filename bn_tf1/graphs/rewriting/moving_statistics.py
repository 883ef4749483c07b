"""Layers that take the statistics of the batch for good: they get the moving ones.

A layer that was built with is_training=True has no switch. Its moving statistics are in
the graph all the same: the update operations lead to them.

    fused kernel    is_training := false, mean and variance := the moving ones
    arithmetic      whoever takes the batch's mean or variance takes the moving one

To check that, `write_out` puts the formula itself in the place of a layer.
"""

from __future__ import annotations

from typing import Callable, Iterable, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.graphs.layer_analysis import Analysis
from bn_tf1.graphs.node_values import static_shape, variable_name
from bn_tf1.graphs.recognition.normalizations import Normalization
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    data_inputs,
    input_for,
    node_name,
    set_attributes,
)
from bn_tf1.graphs.view import GraphView, node_of


class Statistics(NamedTuple):
    """Where normalisations find mean and variance: inputs of nodes."""

    mean: str
    variance: str


class MissingStatistics(ValueError):
    """Layers have no moving statistics.

    Attributes:
        layers: the `Analysis` of each.
    """

    def __init__(self, layers: Iterable[Analysis]):
        self.layers = tuple(layers)
        names = ", ".join(analysis.layer.name for analysis in self.layers[:5])
        more = f" and {len(self.layers) - 5} more" if len(self.layers) > 5 else ""
        super().__init__(
            f"{names}{more} take the statistics of the batch and have no moving ones: "
            "recalibrate them with `--recalibrate --examples X.npz`"
        )


def take_moving_statistics(
    graph: EditableGraph,
    view: GraphView,
    layers: Iterable[Analysis],
    normalise: Callable[..., None] | None = None,
) -> list[str]:
    """Lets the normalisations of `layers` that take the batch's statistics take the
    moving ones.

    Args:
        graph: is changed.
        view: its view.
        layers: layers of that view.
        normalise: changes each, `normalise_with` by default.

    Returns:
        The names of the layers that were changed.

    Raises:
        MissingStatistics: some have none; nothing is changed then.
        ValueError: what one takes cannot be told.
    """
    normalise = normalise or normalise_with
    # In a switched one, what remains in the graph can still take the batch.
    batch = [a for a in layers if any(c.mode != "inference" for c in a.calls)]
    # All are named at once: whoever recalibrates does so for all.
    without = [a for a in batch if not all(a.variables[role] for role in STATISTICS)]
    if without:
        raise MissingStatistics(without)
    for analysis in batch:
        reads = Statistics(*(_read(graph, view, analysis, r) for r in STATISTICS))
        for call in analysis.calls:
            if call.mode != "inference":
                normalise(graph, view, call, reads)
    return [analysis.layer.name for analysis in batch]


def _read(graph, view, analysis, role):
    """The input that takes a moving statistic, of shape [channels]."""
    nodes = analysis.variables[role]
    names = {variable_name(view, node) for node in nodes}
    if len(names) > 1:
        raise ValueError(
            f"the layer {analysis.layer.name} has {len(names)} of {role} "
            f"({', '.join(sorted(names))}): which one is for inference cannot be told"
        )
    reads = [_value_of(graph, view.names[node]) for node in nodes]
    if len(reads) == 1:
        return reads[0]
    # A partitioned variable: its parts are joined, as the program joined them.
    axis = graph.constant(f"{analysis.layer.name}/{role}/axis", np.int32(0))
    return graph.add(
        "ConcatV2",
        f"{analysis.layer.name}/{role}/parts",
        [*reads, axis],
        N=len(reads),
        T=tf.float32,
        Tidx=tf.int32,
    )


def _value_of(graph, name):
    node = graph.nodes[name]
    if node.op != "VarHandleOp":
        return name  # a reference is its value
    # A read of its own: those that are there may be in a branch, or wait for an update.
    dtype = tf.as_dtype(node.attr["dtype"].type)
    return graph.add(
        "ReadVariableOp", f"{name}/moving/ReadVariableOp", [name], dtype=dtype
    )


def normalise_with(
    graph: EditableGraph, view: GraphView, call: Normalization, given: Statistics
) -> None:
    """Lets one normalisation take `given`, two inputs of shape [channels].

    Raises:
        ValueError: its own statistics cannot be told from other values.
    """
    name = view.names[call.node]
    if call.kind == "fused":
        node = graph.nodes[name]
        # In training these two are empty, or what is averaged with a factor.
        node.input[:] = [*data_inputs(node)[:3], given.mean, given.variance]
        set_attributes(node, is_training=False)
        if "exponential_avg_factor" in node.attr:
            del node.attr["exponential_avg_factor"]
        return
    # Its statistics went into a kernel, whose result alone is left.
    if call.op == "IdentityN":
        write_out(graph, view, call, given)
        return
    targets = {}
    for role, reference, value in zip(STATISTICS, (call.mean, call.variance), given):
        sizes = _sizes(view, call, reference)
        if len(sizes) > 1:
            value = _reshaped(graph, value, sizes, f"{name}/{role}")
        targets[input_for(view, reference)] = value
    graph.redirect(targets)


def write_out(
    graph: EditableGraph, view: GraphView, call: Normalization, given: Statistics
) -> None:
    """Puts gamma * (x - mean) / sqrt(variance + epsilon) + beta, in plain operations,
    in the place and under the name of one normalisation.

    Raises:
        ValueError: the recogniser does not know all that is in the formula.
    """
    name = view.names[call.node]
    x_shape = static_shape(view, call.x)
    kept = _channel_axes(call, x_shape)
    if not kept or call.epsilon is None:
        raise ValueError(
            f"the shape of the input of {name!r} or its epsilon is unknown"
        )
    operands = [
        node_name(input_for(view, r)) for r in (call.gamma, call.beta) if r is not None
    ]
    # Renormalization: r * gamma and d * gamma + beta have the batch in them. Those of
    # ours are variables, whose shape alone may be made of that of the input.
    is_ours = call.op == "IdentityN"
    x = input_for(view, call.x)
    if not is_ours and node_name(x) in graph.ancestors(operands):
        raise ValueError(f"gamma or beta of {name!r} depend on what it normalises")
    channels = [-1 if i == kept[-1] else 1 for i in range(len(x_shape))]
    whole = channels
    if is_ours:  # gamma and beta may be by group, as in ghost batches
        whole = [x_shape[i] or -1 if i in kept else 1 for i in range(len(x_shape))]
    scope = f"{name}/inference"

    def shaped(value, sizes, role):
        return _reshaped(graph, value, sizes, f"{scope}/{role}")

    def arithmetic(op, *inputs, place=None):
        return graph.add(op, place or f"{scope}/{op}", inputs, T=tf.float32)

    mean, variance = (
        shaped(value, channels, role) for value, role in zip(given, STATISTICS)
    )
    epsilon = graph.constant(f"{scope}/epsilon", np.float32(call.epsilon))
    scale = arithmetic("Rsqrt", arithmetic("Add", variance, epsilon))
    if call.gamma is not None:
        gamma = shaped(input_for(view, call.gamma), whole, "gamma")
        scale = arithmetic("Mul", scale, gamma)
    # The mean first: where it is far from 0, x * scale has few digits of the difference.
    y = arithmetic("Mul", arithmetic("Sub", x, mean), scale)
    offset = graph.constant(f"{scope}/none", np.float32(0))
    if call.beta is not None:
        offset = shaped(input_for(view, call.beta), whole, "beta")
    _move_away(graph, name)
    arithmetic("Add", y, offset, place=name)


def _channel_axes(call, x_shape):
    """The axes that a layer does not reduce; empty where they are not known."""
    if x_shape is None:
        return []
    if call.kind == "fused":
        # The kernels of five axes have the same attribute as those of four.
        return [1 if call.layout == "NCHW" else len(x_shape) - 1]
    return [i for i in range(len(x_shape)) if i not in call.axes] if call.axes else []


def _move_away(graph, name):
    """Gives a node another name; who takes its further outputs takes them there."""
    node = graph.nodes.pop(name)
    node.name = graph.free_name(f"{name}/of_the_batch")
    graph.nodes[node.name] = node
    graph.redirect({f"{name}:{port}": f"{node.name}:{port}" for port in range(1, 9)})


def _sizes(view, call, reference):
    """What gives a vector by channel the shape of the statistic `reference`."""
    shape = static_shape(view, reference) or _shape_by_axes(view, call, reference)
    if shape is None:
        raise ValueError(
            f"the shape of {view.names[node_of(reference)]!r}, a statistic of "
            "the batch, is not known: give the .meta file, which states the shapes"
        )
    # Statistics of ghost batches have a group beside the channels, which come last.
    channels = max((i for i, size in enumerate(shape) if size != 1), default=-1)
    return [-1 if i == channels % len(shape) else 1 for i in range(len(shape))]


def _reshaped(graph, value, sizes, name):
    target = graph.constant(f"{name}/shape", np.array(sizes, np.int32))
    return graph.add("Reshape", name, [value, target], T=tf.float32, Tshape=tf.int32)


def _shape_by_axes(view, call, reference):
    """The shape of a mean by what it reduces; None where that is not in the graph."""
    node = node_of(reference)
    keeps = view.attribute(node, "keep_dims")
    shape = static_shape(view, call.x)
    if keeps is None or call.axes is None or shape is None:
        return None
    if not keeps.b:  # a vector by channel
        return (None,)
    return tuple(1 if i in call.axes else None for i in range(len(shape)))
