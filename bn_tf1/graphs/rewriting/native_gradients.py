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

from typing import Mapping, Sequence

import tensorflow.compat.v1 as tf
from google.protobuf import descriptor_pool, message_factory, symbol_database

from bn_tf1.statistics.registered_gradients import (
    FUSED_BATCH,
    NORMALIZE_BATCH,
    SUM_OF_SQUARES,
)

_ATTRIBUTE = "_gradient_op_type"
_NATIVE = (FUSED_BATCH, NORMALIZE_BATCH, SUM_OF_SQUARES)
# The collections of what control flow v1 made, and their messages.
_CONTEXTS = {
    "while_context": "tensorflow.WhileContextDef",
    "cond_context": "tensorflow.CondContextDef",
}
_KERNELS = ("FusedBatchNormV2", "FusedBatchNormV3")
_SAME_VALUES = ("Identity", "Reshape", "Cast", "Sum", "Squeeze")
# What the first output is called in a function's body.
_OUTPUTS = {"Const": "output", "Rsqrt": "y"}


def give_native_gradients(meta: tf.MetaGraphDef) -> list[str]:
    """Changes `meta`; returns the names of the nodes that lost a gradient by hand."""
    made_beside = {}
    changed = _in_body(meta.graph_def.node, None, made_beside)
    for function in meta.graph_def.library.function:
        names = _in_body(function.node_def, function, {})
        changed += [f"{function.signature.name}:{name}" for name in names]
    add_to_contexts(meta, made_beside)
    return changed


def add_to_contexts(
    meta: tf.MetaGraphDef, made_beside: Mapping[str, Sequence[str]]
) -> None:
    """Tells the loops and conditions of control flow v1 which nodes were made in them.

    Args:
        meta: the graph, whose collections know them.
        made_beside: the names of new nodes, by that of the node whose place they share.
    """
    for key, message in _CONTEXTS.items():
        if made_beside and key in meta.collection_def:
            contexts = meta.collection_def[key].bytes_list.value
            for position, content in enumerate(contexts):
                context = _message(message).FromString(content)
                _add_to_context(context, made_beside)
                contexts[position] = context.SerializeToString()


def _message(name):
    """A class of messages that TensorFlow has, but does not show."""
    symbols = symbol_database.Default()
    if hasattr(symbols, "GetSymbol"):  # protobuf 3, which would make a class anew
        return symbols.GetSymbol(name)
    descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    return message_factory.GetMessageClass(descriptor)


def _add_to_context(context, made_beside):
    """A loop or condition of control flow v1 lists the tensors that are made in it."""
    values = context.values_def.values
    for name in [value.split(":")[0] for value in values]:
        values.extend(f"{new}:0" for new in made_beside.get(name, ()))
    for nested in context.nested_contexts:
        _add_to_context(getattr(nested, nested.WhichOneof("ctxt")), made_beside)


def _in_body(nodes, function, made_beside):
    by_name = {node.name: node for node in nodes}
    changed = []
    for node in list(nodes):
        if _ATTRIBUTE not in node.attr:
            continue
        # Graphs of 0.1.0 have settings behind the name. To go with 1.0.
        name = node.attr[_ATTRIBUTE].s.decode("utf-8", "replace").partition("(")[0]
        if name not in _NATIVE:
            continue
        made = []
        if name == NORMALIZE_BATCH:
            kernel = _behind(by_name, node.input[0], *_KERNELS)
            if kernel is not None and not kernel.attr["is_training"].b:
                made = _without_kernel(kernel, function)
        elif name == SUM_OF_SQUARES:
            square = _behind(by_name, node.input[0], "Square")
            if square is not None:
                norm = _behind(by_name, square.input[0], "EuclideanNorm")
                made = _without_norm(square, norm, function)
        for new in made:
            nodes.add().CopyFrom(new)
            made_beside.setdefault(new.name.rpartition("/")[0], []).append(new.name)
        if function is not None:
            _rename_references(nodes, function)
        del node.attr[_ATTRIBUTE]
        changed.append(node.name)
    return changed


def _behind(by_name, reference, *types):
    """The node of one of the `types` whose numbers `reference` has, or None."""
    for _ in range(len(by_name)):
        node = by_name.get(reference.split(":")[0])
        if node is None or node.op in types:
            return node
        if node.op not in _SAME_VALUES:
            return None
        reference = node.input[0]
    return None


def _without_kernel(kernel, function):
    """Makes of it the last operation of (x - mean) * factor + offset; returns the others."""
    x, scale, offset, mean, variance = kernel.input[:5]
    controls = list(kernel.input[5:])
    made = []

    def add(name, op, inputs, **attributes):
        node = tf.NodeDef(name=f"{kernel.name}/{name}", op=op, device=kernel.device)
        node.input.extend(inputs)
        for key, value in attributes.items():
            node.attr[key].CopyFrom(value)
        if op != "Const":
            node.attr["T"].CopyFrom(kernel.attr["T"])
        made.append(node)
        suffix = f":{_OUTPUTS.get(op, 'z')}:0" if function is not None else ""
        return node.name + suffix

    number = tf.make_tensor_proto(kernel.attr["epsilon"].f, tf.float32)
    # Where the variance is, also in a loop or a branch.
    place = "^" + variance.split(":")[0]
    epsilon = add(
        "epsilon",
        "Const",
        [place],
        value=tf.AttrValue(tensor=number),
        dtype=tf.AttrValue(type=tf.float32.as_datatype_enum),
    )
    if function is not None and variance.split(":")[0] in {
        argument.name for argument in function.signature.input_arg
    }:
        del made[-1].input[:]  # an argument is there before all else
    padded = add("padded", "AddV2", [variance, epsilon])
    factor = add("factor", "Mul", [add("deviation", "Rsqrt", [padded]), scale])
    scaled = add("scaled", "Mul", [add("centred", "Sub", [x, mean]), factor])
    dtype = tf.AttrValue.FromString(kernel.attr["T"].SerializeToString())
    kernel.op = "AddV2"
    del kernel.input[:]
    kernel.input.extend([scaled, offset, *controls])
    kernel.attr.clear()
    kernel.attr["T"].CopyFrom(dtype)
    return made


def _without_norm(square, norm, function):
    """Makes a sum of squares of a squared norm; returns what is new."""
    squares = tf.NodeDef(name=f"{norm.name}/squares", op="Mul", device=norm.device)
    squares.input.extend([norm.input[0], norm.input[0]])
    squares.attr["T"].CopyFrom(norm.attr["T"])
    norm.op = "Sum"
    norm.input[0] = squares.name + (":z:0" if function is not None else "")
    square.op = "Identity"
    return [squares]


def _rename_references(nodes: Sequence[tf.NodeDef], function) -> None:
    """A function's body refers to outputs by name: those of the new operations differ."""
    by_name = {node.name: node for node in nodes}

    def renamed(reference):
        name, _, output = reference.partition(":")
        op = by_name[name].op if name in by_name else None
        if (op, output) == ("AddV2", "y:0"):
            return f"{name}:z:0"
        if (op, output) == ("Identity", "y:0"):
            return f"{name}:output:0"
        return reference

    for node in nodes:
        for position, reference in enumerate(node.input):
            node.input[position] = renamed(reference)
    for key, reference in list(function.ret.items()):
        function.ret[key] = renamed(reference)
