"""What constant predicates decide: branches that are taken become plain nodes.

As TensorFlow's executor does it: an output of a `Switch` that is not chosen is dead, so
is what takes it or waits for it, and a `Merge` gives the input that is alive.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.constant_values import constant_scalar
from bn_tf1.graphs.rewriting.editable_graph import (
    ITERATIONS,
    MERGES,
    SWITCHES,
    EditableGraph,
    data_inputs,
    node_name,
    port_in,
)
from bn_tf1.graphs.rewriting.function_inlining import inline_functions

_SELECTIONS = ("Select", "SelectV2")


def resolve(
    graph: EditableGraph,
    values: Mapping[str, Any],
    definitions: Mapping[str, Any],
    kept: Iterable[str] = (),
) -> None:
    """Gives nodes constant values, and takes out what can then not be taken any more.

    Args:
        graph: is changed. Its functions are inlined.
        values: value by name of a placeholder or constant.
        definitions: see `inline_functions`.
        kept: names of nodes that stay though nobody takes them any more.

    Raises:
        bn_tf1.graphs.rewriting.function_inlining.InliningError: a function is damaged.
    """
    # First the values: with them an `If` or a `Case` is inlined as one branch.
    for name, value in values.items():
        graph.make_constant(name, np.asarray(value, dtype_of(graph, name)))
    inline_functions(graph, definitions, lambda source: constant_scalar(graph, source))
    known = {
        name: constant_scalar(graph, node.input[1])
        for name, node in graph.nodes.items()
        if node.op in SWITCHES
    }
    flags = {name: bool(flag) for name, flag in known.items() if flag is not None}
    dead = _dead_nodes(graph, flags)
    # Known before they go: some of these were for the dead branches alone.
    fed = {node_name(i) for name in (*dead, *flags) for i in graph.nodes[name].input}
    merged = _resolve_merges(graph, dead, flags)
    graph.remove(dead)
    for name in flags:
        if name in graph.nodes:
            graph.make_identity(name, graph.nodes[name].input[0])
    graph.redirect(dict({f"{name}:1": name for name in flags}, **merged))
    for node in graph.nodes.values():
        if any(node_name(source) in dead for source in node.input):
            # What is waited for, and is dead without making the node dead: a Merge's.
            node.input[:] = [i for i in node.input if node_name(i) not in dead]
    _resolve_selections(graph)
    _remove_untaken(graph, (fed | set(flags)) - set(kept))


def _remove_untaken(graph, names):
    """Takes out those of `names` that only dead branches took, and what only they took."""
    takers = {name: len(users) for name, users in graph.consumers().items()}
    pending = [name for name in names if takers.get(name) == 0]
    while pending:
        node = graph.nodes[pending.pop()]
        if node.op.startswith("Placeholder"):
            continue  # who feeds it gets no error, though nobody takes it now
        graph.remove([node.name])
        for source in {node_name(i) for i in node.input}:
            if source in takers:
                takers[source] -= 1
                if takers[source] == 0:
                    pending.append(source)


def dtype_of(graph: EditableGraph, name: str) -> Any:
    """NumPy's dtype of a placeholder or constant."""
    return tf.as_dtype(graph.nodes[name].attr["dtype"].type).as_numpy_dtype


def _dead_nodes(graph, flags):
    """The nodes of which no output is ever there."""
    dead: set[str] = set()

    def dies(node):
        inputs = node.input
        if node.op in MERGES:
            # It lives as long as one of its inputs does; but a loop that is not entered has
            # no iteration either, though that seems to be alive.
            data = [i for i in data_inputs(node) if not graph.has_op(i, ITERATIONS)]
            if data and all(_is_dead(i, dead, flags) for i in data):
                return True
            inputs = node.input[len(data_inputs(node)) :]
        return any(_is_dead(i, dead, flags) for i in inputs)

    consumers = graph.consumers()
    pending = [user for name in flags for user in consumers[name]]
    while pending:
        name = pending.pop()
        if name not in dead and dies(graph.nodes[name]):
            dead.add(name)
            pending += consumers[name]
    return dead


def _is_dead(source, dead, flags):
    name = node_name(source)
    # Of a `Switch` only the output of the other side is, and nobody who waits for it.
    return name in dead or name in flags and port_in(source) == (not flags[name])


def _resolve_merges(graph, dead, flags):
    """Takes dead inputs out of each Merge; what takes the place of its second output."""
    targets = {}
    for name, node in list(graph.nodes.items()):
        if node.op not in MERGES or name in dead:
            continue
        inputs = data_inputs(node)
        alive = [i for i, s in enumerate(inputs) if not _is_dead(s, dead, flags)]
        if len(alive) == len(inputs):
            continue
        if len(alive) > 1:  # some other condition chooses among them
            node.input[:] = [inputs[i] for i in alive]
            node.attr["N"].i = len(alive)
            continue
        # Its second output says which input came; gradients of a condition take that.
        index = graph.constant(f"{name}/value_index", np.int32(alive[0]))
        targets[f"{name}:1"] = index
        graph.make_identity(name, inputs[alive[0]])
    return targets


def _resolve_selections(graph):
    for name, node in list(graph.nodes.items()):
        if node.op == "GatherV2":
            _resolve_choice(graph, name, node)
        if node.op not in _SELECTIONS:
            continue
        flag = constant_scalar(graph, node.input[0])
        if flag is not None and _are_alike(graph, name, node):
            graph.make_identity(name, node.input[1 if flag else 2])


def _resolve_choice(graph, name, node):
    """Of what is stacked and gathered again, as a layer chooses one of its banks."""
    stack, index = graph.nodes.get(node_name(node.input[0])), None
    if stack is not None and stack.op == "Pack" and not stack.attr["axis"].i:
        index = constant_scalar(graph, node.input[1])
    if index is not None and 0 <= index < stack.attr["N"].i:
        graph.make_identity(name, stack.input[int(index)])


def _are_alike(graph, name, node):
    """Whether a selection is no broadcast: its operands have the shape of its output."""
    if node.op == "Select":  # it does not broadcast values, SelectV2 does
        return True
    shape, *others = [graph.noted_shape(source) for source in [name, *node.input[1:3]]]
    return shape is not None and all(other == shape for other in others)
