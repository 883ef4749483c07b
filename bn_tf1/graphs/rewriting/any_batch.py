"""Batch sizes that were written into shapes become any size.

    Reshape to [64, 7, 7, 32]            [-1, 7, 7, 32]
    output_shape of a transposed         the batch of the input, at run time
    convolution, Fill, BroadcastTo

Contract: only what depends on the data is changed, where the first size is the batch
size of an input or output; whether the result takes any batch is for a run to show.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, node_name

# The operand that is a shape.
_SHAPES = {
    "Reshape": 1,
    "Conv2DBackpropInput": 0,
    "Conv3DBackpropInputV2": 0,
    "Fill": 0,
    "BroadcastTo": 1,
    "DepthwiseConv2dNativeBackpropInput": 0,
}


class _Batch(NamedTuple):
    """The batch size at run time: nodes that give it as a vector and as a scalar."""

    vector: str
    scalar: str


def allow_any_batch(
    graph: EditableGraph, inputs: Sequence[str], batch_size: int | None
) -> list[str]:
    """Makes the batch size of a graph any; returns the names of what was changed.

    Args:
        graph: is changed.
        inputs: the placeholders of data.
        batch_size: the batch size that it has; None where it takes any.
    """
    if batch_size is None:
        return []
    sizes = {batch_size}
    changed = []
    for name in inputs:
        shape = graph.nodes[name].attr["shape"].shape
        if shape.dim and shape.dim[0].size in sizes:
            shape.dim[0].size = -1
            changed.append(name)
    source = next((n for n in inputs if graph.nodes[n].attr["shape"].shape.dim), None)
    if source is None:
        return changed
    batch = _run_time_batch(graph, source)
    for name in _with_shapes(graph, inputs):
        node = graph.nodes[name]
        if _rewrite(graph, node, _SHAPES[node.op], sizes, batch):
            changed.append(name)
    return changed


def _run_time_batch(graph, source):
    dtype = tf.as_dtype(graph.nodes[source].attr["dtype"].type)
    shape = graph.add("Shape", "batch/shape", [source], T=dtype, out_type=tf.int32)
    bounds = [
        graph.constant(f"batch/{what}", np.array([value], np.int32))
        for what, value in (("begin", 0), ("end", 1), ("strides", 1))
    ]
    options = {"T": tf.int32, "Index": tf.int32}
    return _Batch(
        graph.add("StridedSlice", "batch/vector", [shape, *bounds], **options),
        graph.add(
            "StridedSlice",
            "batch/scalar",
            [shape, *bounds],
            shrink_axis_mask=1,
            **options,
        ),
    )


def _with_shapes(graph, inputs):
    """The operations with a shape for an operand whose data depends on the inputs."""
    found = graph.descendants(inputs)
    return [
        name
        for name, node in list(graph.nodes.items())
        if node.op in _SHAPES and (name in found or node.op == "Fill")
    ]


def _rewrite(graph, node, operand, sizes, batch):
    source = graph.nodes[node_name(node.input[operand])]
    if source.op == "Const":
        shape = tf.make_ndarray(source.attr["value"].tensor)
        if shape.ndim != 1 or not shape.size or int(shape[0]) not in sizes:
            return False
        # A first size of 1 is seldom the batch: a vector is given that for broadcasting.
        if int(shape[0]) == 1 and node.op not in ("Reshape", "Conv2DBackpropInput"):
            return False
        node.input[operand] = _any_first(graph, node, shape, batch)
        return True
    if source.op == "Pack":
        first = graph.nodes[node_name(source.input[0])]
        if first.op != "Const":
            return False
        size = tf.make_ndarray(first.attr["value"].tensor)
        if size.ndim or int(size) not in sizes or size.dtype != np.int32:
            return False
        # Of its own: somebody may take the same numbers for no shape.
        copy = tf.NodeDef()
        copy.CopyFrom(source)
        copy.name = graph.free_name(source.name)
        copy.input[0] = batch.scalar
        graph.nodes[copy.name] = copy
        node.input[operand] = copy.name
        return True
    return False


def _any_first(graph, node, shape, batch):
    rest = shape[1:]
    # Only one size may be -1; where the program took that, the batch is computed.
    if node.op == "Reshape" and not np.any(rest == -1):
        return graph.constant(
            f"{node.name}/any_batch", np.append(shape[:1] * 0 - 1, rest)
        )
    axis = graph.constant(f"{node.name}/any_batch/axis", np.int32(0))
    tail = graph.constant(f"{node.name}/any_batch/rest", rest.astype(np.int32))
    joined = graph.add(
        "ConcatV2",
        f"{node.name}/any_batch",
        [batch.vector, tail, axis],
        T=tf.int32,
        Tidx=tf.int32,
        N=2,
    )
    for key in ("Tshape", "index_type"):
        if key in node.attr:
            node.attr[key].type = tf.int32.as_datatype_enum
    return joined
