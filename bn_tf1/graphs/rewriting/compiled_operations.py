"""Puts TensorFlow's own operations in the place of those of kernel="compiled".

Where they are, a graph can be imported by a program without `bn_tf1`, and on a machine where
nothing is compiled.

Contract: each operation becomes an IdentityN of its own name, whose inputs are its outputs,
computed by the formula. Gradients that are in the graph are replaced, too; what differentiates
the graph anew finds TensorFlow's own gradients.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf

from bn_tf1.compiled.kernel import BACKWARD, FORWARD
from bn_tf1.graphs.rewriting.native_gradients import add_to_contexts
from bn_tf1.statistics.formula import activated

_RESULTS = {
    FORWARD: ("y", "mean", "variance", "kept"),
    BACKWARD: ("dx", "dgamma", "dbeta", "dresidual"),
}


def replace_compiled(meta: tf.MetaGraphDef) -> list[str]:
    """Changes `meta`; returns the names of the nodes that were replaced.

    Raises:
        ValueError: the rank of an operation's input is not known.
    """
    changed, made_beside = replace_in_graph(meta.graph_def)
    add_to_contexts(meta, made_beside)
    known = meta.meta_info_def.stripped_op_list.op
    for operation in [o for o in known if o.name in _RESULTS]:
        known.remove(operation)
    return changed


def replace_in_graph(graph_def: tf.GraphDef) -> tuple[list[str], dict[str, list[str]]]:
    """As `replace_compiled`; returns also what was made, by the name of what it replaces."""
    made_beside: dict[str, list[str]] = {}
    changed = _in_body(graph_def.node, None, made_beside)
    for function in graph_def.library.function:
        names = _in_body(function.node_def, function, {})
        changed += [f"{function.signature.name}:{name}" for name in names]
    return changed, made_beside


def _in_body(nodes, function, made_beside):
    changed, renamed = [], {}
    for node in [n for n in nodes if n.op in _RESULTS]:
        made, outputs = _composed(node, in_function=function is not None)
        nodes.extend(made)
        made_beside[node.name] = [new.name for new in made]
        for position, name in enumerate(_names_of_outputs(node)):
            renamed[f"{node.name}:{name}"] = f"{node.name}:output:{position}"
        controls = [name for name in node.input if name.startswith("^")]
        del node.input[:]
        node.input.extend([name for name, _ in outputs] + controls)
        node.op = "IdentityN"
        node.attr.clear()
        types = [dtype.as_datatype_enum for _, dtype in outputs]
        node.attr["T"].list.type.extend(types)
        changed.append(node.name)
    if function is not None:
        for node in nodes:
            for position, name in enumerate(node.input):
                node.input[position] = renamed.get(name, name)
        for key, name in list(function.ret.items()):
            function.ret[key] = renamed.get(name, name)
    return changed


def _names_of_outputs(node):
    """In a function's body an output has the name of its argument, and its place there."""
    *plain, last = _RESULTS[node.op]
    several = node.op == BACKWARD and node.attr["outputs"].i == 0
    return [f"{name}:0" for name in (plain if several else [*plain, last])]


def _composed(node, in_function):
    """The nodes of the formula, and (name, dtype) of what takes the place of the outputs."""
    taken = [name for name in node.input if not name.startswith("^")]
    shape = tf.TensorShape(None)
    if node.attr["_output_shapes"].list.shape:
        shape = tf.TensorShape(node.attr["_output_shapes"].list.shape[0])
    if shape.ndims is None:
        raise ValueError(
            f"{node.name} ({node.op}) does not say the rank of its output: write the graph "
            "with add_shapes=True, as tf.train.Saver does"
        )
    with tf.Graph().as_default() as scratch:
        places = [tf.placeholder(dtype) for dtype in _types_of_inputs(node)]
        x = places[1 if node.op == BACKWARD else 0]
        x.set_shape([None] * shape.ndims)
        build = _forward if node.op == FORWARD else _backward
        results = build(places, node)
    names = {place.op.name: name for place, name in zip(places, taken)}
    anchor = "^" + taken[0].split(":")[0]

    def name_of(tensor):
        if tensor.op.name in names:
            return names[tensor.op.name]
        name = f"{node.name}/composed/{tensor.op.name}"
        if not in_function:
            return name if tensor.value_index == 0 else f"{name}:{tensor.value_index}"
        output = tensor.op.op_def.output_arg[tensor.value_index].name
        return f"{name}:{output}:0"

    made = []
    for operation in scratch.get_operations():
        if operation.name in names:
            continue
        new = tf.NodeDef()
        new.CopyFrom(operation.node_def)
        new.name, new.device = f"{node.name}/composed/{operation.name}", node.device
        del new.input[:]
        new.input.extend(map(name_of, operation.inputs))
        controls = operation.control_inputs
        new.input.extend(f"^{node.name}/composed/{one.name}" for one in controls)
        # In a loop or a branch, a constant belongs to it by what it waits for; a function's
        # arguments are there before all else.
        is_argument = in_function and ":" not in taken[0]
        if not operation.inputs and not is_argument:
            new.input.append(anchor)
        made.append(new)
    return made, [(name_of(tensor), tensor.dtype) for tensor in results]


def _types_of_inputs(node):
    values, statistics = (tf.as_dtype(node.attr[key].type) for key in ("T", "U"))
    if node.op == FORWARD:
        return [values, statistics, statistics] + [values] * node.attr["residuals"].i
    types = [values, values, statistics, statistics, tf.float64]
    types += [values] * node.attr["outputs"].i
    return types + [statistics] * node.attr["moments"].i


def _settings(node, x):
    axis = node.attr["axis"].i
    axes = [a for a in range(x.shape.ndims) if a != axis]
    wide = tf.as_dtype(node.attr["U"].type)
    count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), wide)
    activation = node.attr["activation"].s.decode()

    def along(by_channel):
        return tf.reshape(by_channel, [-1] + [1] * (x.shape.ndims - 1 - axis))

    divisor = tf.maximum(count - 1, 1) if node.attr["unbiased"].b else count
    return axes, along, count, divisor, None if activation == "none" else activation


def _forward(places, node):
    x, gamma, beta, *residuals = places
    axes, along, count, divisor, activation = _settings(node, x)
    values = tf.cast(x, gamma.dtype)
    mean = tf.reduce_mean(values, axes)
    squares = tf.reduce_sum(tf.square(values - along(mean)), axes)
    epsilon = node.attr["epsilon"].f + node.attr["epsilon_rest"].f
    deviation = tf.rsqrt(squares / count + epsilon)
    y = (values - along(mean)) * along(gamma * deviation) + along(beta)
    y = activated(tf.cast(y, x.dtype), residuals[0] if residuals else None, activation)
    kept = tf.cast(tf.stack([mean, deviation]), tf.float64)
    return y, mean, squares / divisor, kept


def _backward(places, node):
    dy, x, gamma, beta, kept, *others = places
    axes, along, count, divisor, activation = _settings(node, x)
    mean, deviation = tf.unstack(tf.cast(kept, gamma.dtype), num=2)
    centred = (tf.cast(x, gamma.dtype) - along(mean)) * along(deviation)
    g = tf.cast(dy, gamma.dtype)
    if activation is not None:
        y = centred * along(gamma) + along(beta)
        if node.attr["outputs"].i:
            y = tf.cast(others.pop(0), gamma.dtype)
        passes = tf.logical_and(y > 0, y < 6) if activation == "relu6" else y > 0
        g *= tf.cast(passes, g.dtype)
    dbeta = tf.reduce_sum(g, axes)
    factor = gamma * deviation
    # An optimizer writes gamma in place as soon as its gradient is there: grappler takes the
    # IdentityN away, which would let it wait for dx.
    with tf.control_dependencies([factor]):
        dgamma = tf.reduce_sum(g * centred, axes)
    through = along(dbeta / count) + along(dgamma / count) * centred
    dx = along(factor) * (g - through)
    if others:
        dmean, dvariance = others
        # centred is in deviations.
        dx += (
            along(dmean / count) + along(2 * dvariance / divisor / deviation) * centred
        )
    results = [tf.cast(dx, x.dtype), dgamma, dbeta]
    return [*results, tf.cast(g, x.dtype)] if node.attr["outputs"].i else results
