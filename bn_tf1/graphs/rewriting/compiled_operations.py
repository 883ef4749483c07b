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
from bn_tf1.graphs.rewriting.formulas import (
    add_to_contexts,
    compose,
    replace_in_bodies,
)
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
    changed, made = replace_in_graph(meta.graph_def)
    add_to_contexts(meta, made)
    # The list says which operations a graph needs: these no longer.
    known = meta.meta_info_def.stripped_op_list.op
    for operation in [o for o in known if o.name in _RESULTS]:
        known.remove(operation)
    return changed


def replace_in_graph(graph_def: tf.GraphDef) -> tuple[list[str], list[str]]:
    """As `replace_compiled`; returns also the names of what was made in the graph."""
    return replace_in_bodies(graph_def, _composed)


def _composed(node, by_name, in_function):
    if node.op not in _RESULTS:
        return None
    shape = tf.TensorShape(None)
    if node.attr["_output_shapes"].list.shape:
        shape = tf.TensorShape(node.attr["_output_shapes"].list.shape[0])
    if shape.ndims is None:
        raise ValueError(
            f"{node.name} ({node.op}) does not say the rank of its output: write the graph "
            "with add_shapes=True, as tf.train.Saver does"
        )
    # In a function's body an output has the name of its argument, and its place there.
    *plain, last = _RESULTS[node.op]
    several = node.op == BACKWARD and node.attr["outputs"].i == 0
    outputs = plain if several else [*plain, last]
    formula = _forward if node.op == FORWARD else _backward

    def build(*places):
        places[1 if node.op == BACKWARD else 0].set_shape([None] * shape.ndims)
        return formula(places, node)

    made = compose(node, _types_of_inputs(node), build, in_function)
    name = node.name
    return made, {f"{name}:{o}:0": f"{name}:output:{i}" for i, o in enumerate(outputs)}


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
