"""What TensorFlow's own functions compose, as nodes in the place of one node.

A formula is built in a scratch graph, from placeholders for what the node takes; its nodes
are then added to the body that the node is in: that of the graph, or of a function, where
inputs are called otherwise.

Contract: a node keeps its name and its outputs, so that whoever takes them is left alone; it
becomes an IdentityN. What is made is called by it, NODE/composed/... .
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Mapping, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.reading.partial_parsing import hidden_message
from bn_tf1.graphs.rewriting.editable_graph import data_inputs

_BESIDE = "/composed/"
# The collections of what control flow v1 made, and their messages.
_CONTEXTS = {
    "while_context": "WhileContextDef",
    "cond_context": "CondContextDef",
}


def replace_in_bodies(
    graph_def: tf.GraphDef, replaced: Callable[..., tuple | None]
) -> tuple[list[str], list[str]]:
    """Replaces nodes of a graph and of its functions.

    Args:
        graph_def: is changed.
        replaced: called with a node, the nodes of its body by name, and `in_function`. It
            changes the node and returns (what was made for it, the names that its outputs
            have in a function by those that they had), or None where it stays.

    Returns:
        (the names of the nodes that were replaced, those of a function as function:node;
        of all that was made in the graph itself).
    """
    changed, made, _ = _in_body(graph_def.node, partial(replaced, in_function=False))
    for function in graph_def.library.function:
        nodes = function.node_def
        names, _, renamed = _in_body(nodes, partial(replaced, in_function=True))
        changed += [f"{function.signature.name}:{name}" for name in names]
        if names:
            for node in nodes:
                node.input[:] = [renamed.get(name, name) for name in node.input]
            for key, name in list(function.ret.items()):
                function.ret[key] = renamed.get(name, name)
    return changed, made


def _in_body(nodes, replaced):
    by_name = {node.name: node for node in nodes}
    changed, made, renamed = [], [], {}
    for node in list(nodes):  # what is made is not to be looked at
        replacement = replaced(node, by_name)
        if replacement is not None:
            nodes.extend(replacement[0])
            changed.append(node.name)
            made += [new.name for new in replacement[0]]
            renamed.update(replacement[1])
    return changed, made, renamed


def compose(
    node: tf.NodeDef,
    dtypes: Sequence[Any],
    build: Callable[..., Sequence[tf.Tensor]],
    in_function: bool,
) -> list[tf.NodeDef]:
    """Lets `node` be copies of what `build` makes of its inputs; returns what is new.

    Args:
        node: is changed.
        dtypes: the dtypes of its inputs.
        build: gives its outputs from placeholders for its inputs.
        in_function: whether it is in the body of a function.
    """
    taken = data_inputs(node)
    with tf.Graph().as_default() as scratch:
        places = [tf.placeholder(dtype) for dtype in dtypes]
        results = build(*places)
    names = {place.op.name: name for place, name in zip(places, taken)}
    scope = node.name + _BESIDE

    def name_of(tensor):
        if tensor.op.name in names:  # a placeholder: what the node took
            return names[tensor.op.name]
        if not in_function:
            suffix = f":{tensor.value_index}" if tensor.value_index else ""
            return scope + tensor.op.name + suffix
        output = tensor.op.op_def.output_arg[tensor.value_index].name
        return f"{scope}{tensor.op.name}:{output}:0"

    # In a loop or a branch, a constant belongs to it by what it waits for; a function's
    # arguments are there before all else.
    is_argument = in_function and ":" not in taken[0]
    anchor = [] if is_argument else ["^" + taken[0].split(":")[0]]
    made = []
    for operation in scratch.get_operations():
        if operation.name not in names:
            new = tf.NodeDef()
            new.CopyFrom(operation.node_def)
            new.name, new.device = scope + operation.name, node.device
            new.input[:] = [*map(name_of, operation.inputs)] or anchor
            controls = operation.control_inputs
            new.input.extend(f"^{scope}{one.name}" for one in controls)
            made.append(new)
    controls = node.input[len(taken) :]
    # Whatever it waited for, its copies still do: updates may depend on that.
    node.op = "IdentityN"
    node.input[:] = [*map(name_of, results), *controls]
    node.attr.clear()
    types = [tensor.dtype.as_datatype_enum for tensor in results]
    node.attr["T"].list.type.extend(types)
    return made


def add_to_contexts(meta: tf.MetaGraphDef, made: Sequence[str]) -> None:
    """Tells the loops and conditions of control flow v1 which nodes were made in them.

    Args:
        meta: the graph, whose collections list the tensors of each.
        made: the names of nodes that `replace_in_bodies` made.
    """
    made_beside: dict[str, list[str]] = {}
    for name in made:
        made_beside.setdefault(name.rpartition(_BESIDE)[0], []).append(name)
    for key, message in _CONTEXTS.items():
        if made_beside and key in meta.collection_def:
            contexts = meta.collection_def[key].bytes_list.value
            for position, content in enumerate(contexts):
                context = hidden_message(message).FromString(content)
                _add_to_context(context, made_beside)
                contexts[position] = context.SerializeToString()


def _add_to_context(context: Any, made_beside: Mapping[str, Sequence[str]]) -> None:
    values = context.values_def.values
    for name in [value.split(":")[0] for value in values]:
        values.extend(f"{new}:0" for new in made_beside.get(name, ()))
    for nested in context.nested_contexts:
        _add_to_context(getattr(nested, nested.WhichOneof("ctxt")), made_beside)
