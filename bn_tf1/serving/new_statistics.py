"""Statistics computed anew for a model, over the examples that are given.

Layer by layer, in the order in which the data passes them, each with all before it
normalised by their new statistics: what a layer gets is then the population that it will
be served. A network that never had moving statistics gets them in the same way.

Mean and biased variance over all examples, combined from batches in float64.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import Analysis
from bn_tf1.graphs.node_values import static_shape
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    input_for,
    node_name,
)
from bn_tf1.graphs.rewriting.moving_statistics import Statistics, normalise_with
from bn_tf1.graphs.view import GraphView
from bn_tf1.population.pooling import BatchStatistics, Pool, PooledStatistics
from bn_tf1.serving.checking import Examples
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.isolated_run import Isolated
from bn_tf1.serving.preparing import Model, NewLayer

_BATCH_SIZE = 32


def with_new_statistics(
    model: Model, layers: Sequence[NewLayer], examples: Examples, isolated: Isolated
) -> Model:
    """The model with statistics of `examples`.

    Args:
        model: a model whose `layers` take constants, to be computed.
        layers: the layers.
        examples: what the statistics are those of; all of it.
        isolated: runs the model.

    Raises:
        ExportError: it cannot be run, or a value is not finite.
    """
    graph = model.graph.copy()
    for layer in _in_order(graph, layers):
        found = _measured(graph, layer, model, examples, isolated)
        for name, value in zip(layer.constants, found):
            if not np.all(np.isfinite(value)):
                raise ExportError(
                    f"the statistics of {layer.name} over the examples are not finite"
                )
            graph.make_constant(name, value.astype(np.float32))
    note = f"{len(layers)} layers have statistics of {examples.count()} examples"
    return model._replace(graph=graph, changed=(*model.changed, note))


def _in_order(graph, layers):
    """The layers, each after those that its input depends on."""
    # By how many layers are before each, directly or not: that is the order of the data.
    depth = {}
    for layer in layers:
        needed = graph.ancestors([node_name(layer.x)])
        depth[layer.name] = sum(other.constants[0] in needed for other in layers)
    return sorted(layers, key=lambda layer: depth[layer.name])


def _measured(graph, layer, model, examples, isolated):
    """Mean and biased variance of what a layer normalises, over all examples."""
    trial = graph.copy()
    outputs = _with_moments(trial, layer)
    count = examples.count()
    size = model.batch_size or min(_BATCH_SIZE, count)
    # An example that filled up the last batch would count twice.
    if model.batch_size and count % size:
        raise ExportError(
            f"the graph takes {size} examples at once, and {count} is no multiple of "
            f"{size}: give {count - count % size or size} to recalibrate over"
        )
    feeds = [
        {
            name: array[start : start + size] if array.ndim else array
            for name, array in examples.arrays.items()
        }
        for start in range(0, count, size)
    ]
    pool = Pool()
    for mean, variance, sizes in isolated.run(trial, feeds, outputs):
        own = PooledStatistics.of(mean, variance)
        pool.add(BatchStatistics(np.prod(sizes) // mean.size, own))
    return pool.statistics


def _with_moments(graph, layer):
    """Adds the mean, variance and shape of what a layer normalises, in float64.

    A float32 variance of a far mean has no digits left.
    """
    scope = f"{layer.name}/moments_of_examples"
    x = graph.add("Cast", f"{scope}/x", [layer.x], SrcT=tf.float32, DstT=tf.float64)
    axes = graph.constant(f"{scope}/axes", np.array(layer.axes, np.int32))
    types = {"T": tf.float64, "Tidx": tf.int32}
    mean = graph.add("Mean", f"{scope}/mean", [x, axes], keep_dims=True, **types)
    apart = graph.add("SquaredDifference", f"{scope}/apart", [x, mean], T=tf.float64)
    variance = graph.add(
        "Mean", f"{scope}/variance", [apart, axes], keep_dims=True, **types
    )
    shape = graph.add("Shape", f"{scope}/shape", [x], T=tf.float64, out_type=tf.int64)
    return mean, variance, shape


def take_new_statistics(
    graph: EditableGraph, view: GraphView, layers: Sequence[Analysis]
) -> list[NewLayer]:
    """Lets the layers take constants, which are to be computed.

    Raises:
        ExportError: the shape of what one normalises is not known.
    """
    found = []
    for analysis in layers:
        # Towers and siblings: what each call gets would have to be pooled.
        if len(analysis.calls) != 1:
            raise ExportError(
                f"{analysis.layer.name} is called {len(analysis.calls)} times: it cannot "
                "be recalibrated on the way; use `python -m bn_tf1 recalibrate`"
            )
        (call,) = analysis.calls
        shape = static_shape(view, call.x)
        name = analysis.layer.name
        axis = 1 if call.layout == "NCHW" else len(shape or ()) - 1
        channels = shape and (analysis.layer.channels or shape[axis])
        if not channels:
            raise ExportError(f"the shape of what {name} normalises is not known")
        constants = tuple(
            graph.constant(f"{name}/of_examples/{role}", np.full(channels, fill, "f4"))
            for role, fill in (("mean", 0), ("variance", 1))
        )
        normalise_with(graph, view, call, Statistics(*constants))
        axes = tuple(i for i in range(len(shape)) if i != axis)
        found.append(NewLayer(name, constants, input_for(view, call.x), axes))
    return found
