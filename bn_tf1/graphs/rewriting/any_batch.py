"""Batch sizes that were written into shapes become any size.

    Reshape to [64, 7, 7, 32]            [-1, 7, 7, 32]
    output_shape of a transposed         the batch of the input, at run time
    convolution, Fill, BroadcastTo

A training graph of a fixed batch also sees [8, 5, 5, 4] as [20, 1, 1, 40] where the kernels
of `bn_tf1` are faster with more channels, and repeats its vectors by channel as often. For
an f of each value and its channel alone, that is undone:

    reshape(f(reshape(x, [20, 1, 1, 40]), tile(v, [10])), [8, 5, 5, 4])
        = reshape(f(reshape(x, [-1, 1, 1, 4]), v), [8, 5, 5, 4])

Contract: only what depends on the data is changed, where the first size is the batch
size of an input or output; whether the result takes any batch is for a run to show.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import is_fused
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


_BY_VALUE = frozenset(
    ["Add", "AddV2", "Sub", "Mul", "RealDiv", "Identity", "Cast", "Relu", "IdentityN"]
    + ["StopGradient", "Maximum", "BiasAdd"]
)
_MAX_REGION = 100


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
    changed = []
    shapes = {name: graph.nodes[name].attr["shape"].shape for name in inputs}
    sources = [name for name, shape in shapes.items() if shape.dim]
    for name in sources:
        first = shapes[name].dim[0]
        if first.size == batch_size:
            first.size = -1
            changed.append(name)
    if not sources:
        return changed
    batch = _run_time_batch(graph, sources[0])
    depending = graph.descendants(inputs)
    for name, node in list(graph.nodes.items()):
        # A Fill takes a shape alone, and no data.
        if node.op in _SHAPES and (name in depending or node.op == "Fill"):
            shape = _any_shape(graph, node, batch_size, batch)
            if shape is not None:
                node.input[_SHAPES[node.op]] = shape
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

    def sliced(name, **mask):
        taken = [shape, *bounds]
        return graph.add("StridedSlice", f"batch/{name}", taken, **mask, **options)

    return _Batch(sliced("vector"), sliced("scalar", shrink_axis_mask=1))


def _any_shape(graph, node, size, batch):
    """The input that gives `node` its shape for any batch; None where it has no `size`."""
    source = node.input[_SHAPES[node.op]]
    shape = _constant(graph, source)
    if shape is not None:
        if shape.ndim != 1 or not shape.size or shape[0] != size:
            return None
        # A first size of 1 is seldom the batch: a vector is given that for broadcasting.
        if size == 1 and node.op not in ("Reshape", "Conv2DBackpropInput"):
            return None
        return _any_first(graph, node, shape, batch)
    pack = graph.nodes[node_name(source)]
    first = _constant(graph, pack.input[0]) if pack.op == "Pack" else None
    if first is None or first.ndim or first != size or first.dtype != np.int32:
        return None
    # Of its own: somebody may take the same numbers for no shape.
    copy = tf.NodeDef()
    copy.CopyFrom(pack)
    copy.name = graph.free_name(pack.name)
    copy.input[0] = batch.scalar
    graph.nodes[copy.name] = copy
    return copy.name


def _any_first(graph, node, shape, batch):
    rest = shape[1:]
    # Only one size may be -1; where the program took that, the batch is computed. A
    # convolution takes none at all.
    if node.op == "Reshape" and not np.any(rest == -1):
        sizes = np.append(np.array([-1], shape.dtype), rest)
        return graph.constant(f"{node.name}/any_batch", sizes)
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


# --------------------------------------------------------------------------- packed views


def unpack_views(graph: EditableGraph) -> list[str]:
    """Undoes the views of `graph`, whose shapes are noted; returns their names."""
    consumers = graph.consumers()
    undone = []
    for name, node in list(graph.nodes.items()):
        if node.op != "Reshape":
            continue
        target = _constant(graph, node.input[1])
        shape = graph.noted_shape(node.input[0])
        if target is None or target.size < 2 or not shape or not shape[-1]:
            continue
        channels, packed = shape[-1], int(target[-1])
        if packed <= channels or packed % channels:
            continue  # it packs no neighbours
        region = _region(graph, consumers, name)
        if not region:
            # Somebody's own change of shape, such as that to what a dense layer takes.
            continue
        sizes = np.ones_like(target)
        sizes[0], sizes[-1] = -1, channels
        node.input[1] = graph.constant(f"{name}/unpacked", sizes)
        for user, number in region:
            taken = graph.nodes[user].input
            taken[number] = graph.nodes[node_name(taken[number])].input[0]
        undone.append(name)
    return undone


def _region(graph, consumers, name):
    """(node, input) of each repeated vector that meets the view; None: it is no view."""
    repeated, seen, pending = [], {name}, [name]
    while pending and len(seen) < _MAX_REGION:
        for user in consumers[pending.pop()]:
            node = graph.nodes[user]
            if user in seen or node.op == "Reshape":
                continue  # what sees it with its own shape again
            if node.op not in _BY_VALUE and not is_fused(node.op):
                return None
            seen.add(user)
            pending.append(user)
    for user in seen - {name}:
        node = graph.nodes[user]
        for number, source in enumerate(node.input):
            if node_name(source) in seen or source.startswith("^"):
                continue
            value = _constant(graph, source)
            if graph.nodes[node_name(source)].op == "Tile":
                repeated.append((user, number))
            # Of a kernel, the statistics that it does not take in training.
            elif not is_fused(node.op) and (value is None or value.size != 1):
                return None
    return repeated


def _constant(graph, source):
    node = graph.nodes[node_name(source)]
    return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None
