"""Views that see several neighbours as one, which `bn_tf1` takes for speed, undone.

A training graph of a fixed batch sees [8, 5, 5, 4] as [20, 1, 1, 40] where its kernels
are faster with more channels, and repeats its vectors by channel as often. Such a view
holds for batches of that size alone:

    reshape(f(reshape(x, [20, 1, 1, 40]), tile(v, [10])), [8, 5, 5, 4])
        = reshape(f(reshape(x, [-1, 1, 1, 4]), v), [8, 5, 5, 4])

for an f of each value and its channel alone.
"""

from __future__ import annotations

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import is_fused
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, node_name

_BY_VALUE = frozenset(
    ["Add", "AddV2", "Sub", "Mul", "RealDiv", "Identity", "Cast", "Relu", "IdentityN"]
    + ["StopGradient", "Maximum", "BiasAdd"]
)
_MAX_REGION = 100


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
            continue
        region = _region(graph, consumers, name)
        if not region:
            # Somebody's own change of shape, such as that to what a dense layer takes.
            continue
        sizes = np.ones_like(target)
        sizes[0], sizes[-1] = -1, channels
        node.input[1] = graph.constant(f"{name}/unpacked", sizes)
        for user, number in region:
            _untile(graph, graph.nodes[user], number)
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
            tile = graph.nodes[node_name(source)]
            if tile.op == "Tile":
                repeated.append((user, number))
            elif not is_fused(node.op) and not _is_scalar(graph, source):
                return None
    return repeated


def _untile(graph, node, number):
    tile = graph.nodes[node_name(node.input[number])]
    node.input[number] = tile.input[0]


def _constant(graph, source):
    node = graph.nodes[node_name(source)]
    return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None


def _is_scalar(graph, source):
    value = _constant(graph, source)
    return value is not None and value.size == 1
