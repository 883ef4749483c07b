"""Variables become constants, whatever kind they are and whatever lies between.

A resource reaches its reads through conditions and loops (`Switch`, `Enter`); these then
carry the value. References of the first kind of variables lose their mark.
"""

from __future__ import annotations

from typing import Callable

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import VARIABLES
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    data_inputs,
    node_name,
    set_attributes,
)

_RESOURCE = tf.resource.as_datatype_enum
_PASSING = ("Identity", "Switch", "Merge", "Enter", "Exit", "NextIteration")
# Constants are no references: the plain operation does the same with a value.
_REFERENCES = {f"Ref{op}": op for op in _PASSING}
_GATHERS = {"ResourceGather": "GatherV2", "ResourceGatherNd": "GatherNd"}


def variables_in(graph: EditableGraph) -> list[str]:
    """The names of the variables of a graph."""
    return [name for name, node in graph.nodes.items() if node.op in VARIABLES]


def freeze(graph: EditableGraph, value_of: Callable[[str], np.ndarray]) -> None:
    """Puts constants in the place of the variables of `graph`.

    Args:
        graph: is changed.
        value_of: gives the value of a variable by its name.

    Raises:
        ValueError: a value does not fit its variable, or an operation takes a variable
            as such, and not its value.
    """
    dtypes = {}
    for name in variables_in(graph):
        node = graph.nodes[name]
        dtype = tf.as_dtype(node.attr["dtype"].type)
        if node.op == "VarHandleOp":  # whoever passes it on says that it is a resource
            dtypes[name] = dtype
        graph.make_constant(name, _fitting(node, dtype, value_of(name)))
    for node in graph.nodes.values():
        node.op = _REFERENCES.get(node.op, node.op)
    # Before the reads become copies: those are where a resource ends.
    _pass_values(graph, dtypes)
    for name, node in list(graph.nodes.items()):
        if node.op == "ReadVariableOp":
            _make_read(node)
        elif node.op in _GATHERS:
            _make_gather(graph, name, node)


def _fitting(node, dtype, value):
    # TensorFlow would broadcast some wrong shapes without a word.
    shape = tf.TensorShape(node.attr["shape"].shape)
    if not shape.is_compatible_with(value.shape) or value.dtype != dtype.as_numpy_dtype:
        raise ValueError(
            f"the variable {node.name!r} is {dtype.name} {shape}, but its value in the "
            f"checkpoint {value.dtype} {value.shape}: give the checkpoint of this graph "
            "with `--checkpoint`"
        )
    return value


def _pass_values(graph, dtypes):
    """What carries a resource carries its value, of the dtype of the variable."""
    consumers = graph.consumers()
    pending = list(dtypes)
    while pending:
        name = pending.pop()
        for consumer in consumers[name]:
            node = graph.nodes[consumer]
            if consumer in dtypes or name not in map(node_name, data_inputs(node)):
                continue
            if node.op in _PASSING:
                dtypes[consumer] = dtypes[name]
                set_attributes(node, T=dtypes[name])
                pending.append(consumer)
            # A function, a queue or an optimizer: what it does with it is not known here.
            elif node.op not in ("ReadVariableOp", *_GATHERS, "VariableShape"):
                raise ValueError(
                    f"the node {consumer!r} ({node.op}) takes the variable {name!r} as "
                    "such: name outputs that need no such operation"
                )
            elif node.op == "VariableShape":  # of a handle; of a value it is this
                node.op = "Shape"
                set_attributes(node, T=dtypes[name])


def _make_read(node):
    node.op = "Identity"
    dtype = node.attr["dtype"].type
    del node.attr["dtype"]
    node.attr["T"].type = dtype


def _make_gather(graph, name, node):
    node.op = _GATHERS[node.op]
    dtype = node.attr["dtype"].type
    batch_dims = node.attr["batch_dims"].i
    for key in ("dtype", "validate_indices", "batch_dims"):
        if key in node.attr:
            del node.attr[key]
    node.attr["Tparams"].type = dtype
    # GatherNd has no axis, GatherV2 has it as an input.
    if node.op == "GatherV2":
        axis = graph.constant(f"{name}/axis", np.int32(batch_dims))
        node.input.insert(len(data_inputs(node)), axis)  # control inputs come last
        set_attributes(node, Taxis=tf.int32, batch_dims=batch_dims)
