"""What the outputs need, and nothing else.

Control inputs make a training step do more than compute: they wait for updates,
assertions and summaries. They go, but for those that say in which branch or loop a node
is, without which TensorFlow refuses a graph ("has inputs from different frames"); what
these wait for is kept free of assignments.
"""

from __future__ import annotations

from typing import Iterable, Sequence

from bn_tf1.graphs.node_values import ASSIGNMENTS
from bn_tf1.graphs.rewriting.dead_branches import MERGES, SWITCHES
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    canonical,
    node_name,
    port_in,
)
from bn_tf1.graphs.rewriting.graph_interface import Candidate

_LIMITED = SWITCHES + ("Enter", "RefEnter")


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
        if port == 0 and _has_one_output(graph, name):
            graph.remove([name])
        else:
            name = graph.free_name(f"{name}_{port}")
        graph.add("Placeholder", name, dtype=candidate.dtype, shape=candidate.shape)
        names.append(name)
        if name != tensor:
            graph.redirect({tensor: name})
    return names


def _has_one_output(graph, name):
    return not any(
        source.startswith(f"{name}:")
        for node in graph.nodes.values()
        for source in node.input
    )


def drop_controls(graph: EditableGraph) -> None:
    """Takes out the control inputs, but for those that place a node in a branch or loop."""
    limited = _limited(graph)
    writing = _writing(graph, limited)
    known: dict[str, list[str]] = {}

    def places(name):
        """What stands for a control input from `name`, without its assignments."""
        if name not in known:
            known[name] = []
            if name in limited and name not in writing:
                known[name] = [f"^{name}"]
            elif name in limited:
                known[name] = _distinct(
                    place
                    for source in graph.nodes[name].input
                    for place in places(node_name(source))
                )
        return known[name]

    for node in graph.nodes.values():
        if any(source.startswith("^") for source in node.input):
            data = [source for source in node.input if not source.startswith("^")]
            controls = [i[1:] for i in node.input if i.startswith("^")]
            kept = _distinct(p for name in controls for p in places(name))
            node.input[:] = data + kept


def _distinct(values):
    return list(dict.fromkeys(values))


def _limited(graph):
    """The nodes that are in a branch or a loop."""
    consumers = graph.consumers()
    found = set()
    pending = [n for n, node in graph.nodes.items() if node.op in _LIMITED]
    while pending:
        for name in consumers[pending.pop()]:
            # A Merge of a condition ends it; one of a loop begins its frame.
            if name not in found:
                found.add(name)
                pending.append(name)
    return found


def _writing(graph, names):
    """Those of `names` that assign something, or take or wait for what does."""
    consumers = graph.consumers()
    found = {name for name in names if _assigns(graph.nodes[name].op)}
    pending = list(found)
    while pending:
        for name in consumers[pending.pop()]:
            is_loop = graph.nodes[name].op in MERGES
            if name in names and name not in found and not is_loop:
                found.add(name)
                pending.append(name)
    return found


def _assigns(op):
    return op in ASSIGNMENTS or op.startswith(("Scatter", "ResourceScatter", "Assert"))


def extract(graph: EditableGraph, outputs: Sequence[str]) -> int:
    """Leaves what the nodes `outputs` need; returns how many nodes went.

    Shapes that were noted and places on devices go, too: they were those of training.
    """
    needed = graph.ancestors(outputs)
    gone = [name for name in graph.nodes if name not in needed]
    graph.remove(gone)
    return len(gone)


def clean_attributes(graph: EditableGraph) -> None:
    """Takes out devices and notes, which are those of the training program."""
    for node in graph.nodes.values():
        node.device = ""
        for key in [key for key in node.attr if key.startswith("_")]:
            del node.attr[key]
        if node.op == "PlaceholderV2":
            node.op = "Placeholder"
