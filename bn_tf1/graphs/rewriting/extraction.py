"""What the outputs need, and nothing else.

Control inputs make a training step do more than compute: they wait for updates,
assertions and summaries. They go, but for those that say in which branch or loop a
constant is, without which TensorFlow refuses a graph ("has inputs from different frames").
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Iterable, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.editable_graph import (
    ITERATIONS,
    MERGES,
    SWITCHES,
    EditableGraph,
    canonical,
    data_inputs,
    node_name,
    port_in,
)
from bn_tf1.graphs.rewriting.graph_interface import Candidate
from bn_tf1.graphs.view import reached

_ENTRIES = ("Enter", "RefEnter")
_EXITS = ("Exit", "RefExit")


def cut_at(graph: EditableGraph, inputs: Iterable[Candidate]) -> list[str]:
    """Puts a placeholder in the place of each input; returns their names.

    A first output gives its placeholder the name of its node, "a:1" becomes "a_1".

    Raises:
        ValueError: the dtype of an input is not known.
    """
    names = []
    for candidate in inputs:
        if candidate.dtype is None:
            raise ValueError(f"the dtype of the input {candidate.tensor} is not known")
        tensor = canonical(candidate.tensor)
        name, port = node_name(tensor), port_in(tensor)
        # The other outputs, such as labels, stay with the node, and so does its name.
        if port == 0 and _has_one_output(graph, name):
            graph.remove([name])
        else:
            name = graph.free_name(f"{name}_{port}")
        graph.add("Placeholder", name, dtype=candidate.dtype, shape=candidate.shape)
        names.append(name)
        # Where it has the name of what was there, everybody takes it already.
        if name != tensor:
            graph.redirect({tensor: name})
    return names


def _has_one_output(graph, name):
    return not any(
        source.startswith(f"{name}:")
        for node in graph.nodes.values()
        for source in node.input
    )


def drop_controls(graph: EditableGraph, outputs: Iterable[str]) -> None:
    """Takes out the control inputs, but for those that place a node in a branch or loop.

    Data tells where a node is that takes any; of a constant only a control input does.

    Args:
        graph: is changed.
        outputs: the names of nodes; what these do not need loses all control inputs.
    """
    kept: dict[str, str] = {}
    # Thousands of constants wait for the same pivot.
    place = functools.lru_cache(maxsize=None)(functools.partial(_place, graph))

    def needed(name):
        sources = data_inputs(graph.nodes[name])
        if not sources:
            control = next(filter(None, map(place, graph.nodes[name].input)), None)
            if control is not None:
                kept[name], sources = control, [control]
        return [source for source in map(node_name, sources) if source in graph.nodes]

    reached([name for name in outputs if name in graph.nodes], needed)
    for name, node in graph.nodes.items():
        data = data_inputs(node)
        if len(data) < len(node.input):
            node.input[:] = data + ([kept[name]] if name in kept else [])


def _place(graph: EditableGraph, control: str) -> str | None:
    """A control input that puts a node where `control` put it, and does nothing else.

    What was waited for may be an update, which must not be needed any more; all that it
    takes is in the same branch and frame, up to where that begins. What went through
    another condition or loop on the way is left where it was entered.
    """
    # The nearest first: further back there may be the entry of an outer loop.
    seen, pending = set(), deque([(control, 0)])
    while pending:
        source, inside = pending.popleft()
        name = node_name(source)
        if (name, inside) in seen or name not in graph.nodes:
            continue
        seen.add((name, inside))
        node = graph.nodes[name]
        sources = list(node.input)
        if node.op in SWITCHES and port_in(source) >= 0:
            if not inside:
                return f"^{_copy_of(graph, source)}"
            # That of a loop belongs to what the loop's Merge begins.
            inside -= not graph.has_op(node.input[1], ("LoopCond",))
        elif node.op in _ENTRIES:
            if not inside:
                return f"^{name}"
            inside -= 1
        elif node.op in MERGES and any(graph.has_op(i, ITERATIONS) for i in sources):
            if not inside:
                return f"^{name}"
            sources = sources[:1]  # the second is of the iteration before
        elif node.op in MERGES or node.op in _EXITS:
            inside += 1
        pending.extend((i, inside) for i in sources)
    return None


def _copy_of(graph, source):
    """An Identity of an output of a `Switch`: who waits for the `Switch` itself always
    runs."""
    for name, node in graph.nodes.items():
        if node.op == "Identity" and list(node.input) == [source]:
            return name
    switch = graph.nodes[node_name(source)]
    dtype = tf.as_dtype(switch.attr["T"].type)
    return graph.add("Identity", f"{switch.name}/place", [source], T=dtype)


def extract(graph: EditableGraph, outputs: Sequence[str]) -> None:
    """Leaves what the nodes `outputs` need."""
    graph.remove(graph.nodes.keys() - graph.ancestors(outputs))


def clean_attributes(graph: EditableGraph) -> None:
    """Takes out devices and notes, which are those of the training program."""
    for node in graph.nodes.values():
        node.device = ""
        # _class ties nodes to the device of others, which may be gone.
        for key in [key for key in node.attr if key.startswith("_")]:
            del node.attr[key]
        if node.op == "PlaceholderV2":  # deprecated: the first does the same now
            node.op = "Placeholder"
