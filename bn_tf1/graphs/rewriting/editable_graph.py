"""A graph as nodes by name, to be changed.

An input is a string as in a NodeDef: "node" for output 0, "node:2", "^node" to wait for
it. What reads a graph is `GraphView`; it is made anew (`view`) after a round of changes.
"""

from __future__ import annotations

from typing import Any, Container, Iterable, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.reading.partial_parsing import parsed_graph
from bn_tf1.graphs.view import (
    GraphView,
    functions_named,
    node_of,
    port_of,
    reached,
)

SWITCHES = ("Switch", "RefSwitch")
MERGES = ("Merge", "RefMerge")
ITERATIONS = ("NextIteration", "RefNextIteration")
_FIELDS = ((bool, "b"), (int, "i"), (float, "f"), (bytes, "s"))  # a bool is an int, too


class EditableGraph:
    """A graph that can be changed.

    Attributes:
        nodes: NodeDef by name, in the order of the graph.
        functions: FunctionDef by name.
        versions: the VersionDef of the graph.
        definitions: OpDef by operation, of the TensorFlow that made the graph.
        aliases: what gives now what a tensor gave whose node is gone, such as a call.
    """

    def __init__(self, graph_def: tf.GraphDef):
        copy = tf.GraphDef()
        copy.CopyFrom(graph_def)
        self._owner = copy  # protocol buffers of TensorFlow 1.15 live in their parent
        self.nodes = {node.name: node for node in copy.node}
        self.functions = {f.signature.name: f for f in copy.library.function}
        self.versions = copy.versions
        self.definitions: Mapping[str, Any] = {}
        self.aliases: dict[str, str] = {}

    def graph_def(self) -> tf.GraphDef:
        """The graph, with the functions that it calls."""
        made = tf.GraphDef()
        made.versions.CopyFrom(self.versions)
        made.node.extend(self.nodes.values())
        used = reached(
            called_by(self.nodes.values(), self.functions),
            lambda name: called_by(self.functions[name].node_def, self.functions),
        )
        # Sorted, so that the same graph is the same bytes in every run.
        made.library.function.extend(self.functions[name] for name in sorted(used))
        return made

    def copy(self) -> EditableGraph:
        """A graph of its own."""
        made = EditableGraph(self.graph_def())
        made.definitions = self.definitions
        made.aliases.update(self.aliases)
        return made

    def portable_graph_def(self) -> tf.GraphDef:
        """The graph without attributes that have their default value.

        Another version may not know them: 1.15 has no padding of its own in MaxPool.
        """
        made = self.graph_def()
        for node in made.node:
            definition = self.definitions.get(node.op)
            defaults = {
                attribute.name: attribute.default_value
                for attribute in (definition.attr if definition is not None else ())
                if attribute.HasField("default_value")
            }
            for key in list(node.attr):
                value = node.attr[key]
                # What is asked for in a map of messages is there then, empty.
                is_empty = value.WhichOneof("value") is None
                if is_empty or defaults.get(key) == value:
                    del node.attr[key]
        return made

    def tensor(self, name: str) -> str:
        """The input that takes the tensor `name`, or what gives its value now."""
        name = canonical(name)
        # What takes the place of a call may have been inlined itself.
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def view(self) -> GraphView:
        """The graph as it is now, indexed."""
        return GraphView(parsed_graph(self.graph_def()))

    def has_op(self, source: str, ops: Container[str]) -> bool:
        """Whether an input takes something of a node with one of the operations `ops`."""
        node = self.nodes.get(node_name(source))
        return node is not None and node.op in ops

    def add(
        self, op: str, name: str, inputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Adds a node and returns its name: `name`, or one like it that is free.

        Args:
            op: its operation.
            name: the name that it would like to have.
            inputs: its inputs.
            attributes: tf.DType, NumPy array, shape (tuple), int, float, bool or bytes.
        """
        name = self.free_name(name)
        node = tf.NodeDef(name=name, op=op, input=list(inputs))
        set_attributes(node, **attributes)
        self.nodes[name] = node
        return name

    def constant(self, name: str, value: Any) -> str:
        """Adds a constant."""
        name = self.free_name(name)
        self.make_constant(name, value)
        return name

    def free_name(self, name: str) -> str:
        """`name`, or one like it that no node has."""
        free, number = name, 0
        while free in self.nodes:
            number += 1
            free = f"{name}_{number}"
        return free

    def make_constant(self, name: str, value: Any) -> None:
        """Turns the node `name` into a constant."""
        value = np.asarray(value)
        node = tf.NodeDef(name=name, op="Const")
        set_attributes(node, dtype=tf.as_dtype(value.dtype), value=value)
        self.nodes[name] = node

    def make_identity(self, name: str, source: str) -> None:
        """Turns the node `name` into a copy of `source`; its dtype is kept, as "T"."""
        old = self.nodes[name]
        node = tf.NodeDef(name=name, op="Identity", input=[source])
        for key in ("T", "dtype", "Tparams"):
            if key in old.attr:
                node.attr["T"].CopyFrom(old.attr[key])
                break
        self.replace(node)

    def replace(self, node: tf.NodeDef) -> None:
        """Puts `node`, of one output, in the place of the one of its name, if any.

        The shape that was noted for that is kept: what comes later asks for it.
        """
        old = self.nodes.get(node.name)
        if old is not None and "_output_shapes" in old.attr:
            node.attr["_output_shapes"].CopyFrom(old.attr["_output_shapes"])
            del node.attr["_output_shapes"].list.shape[1:]
        self.nodes[node.name] = node

    def redirect(self, targets: Mapping[str, str], but: Iterable[str] = ()) -> None:
        """Lets every node take targets[x] where it took x, but for the nodes `but`."""
        kept = frozenset(but)
        for name, node in self.nodes.items():
            # Few nodes take one of them, and to write inputs anew is slow.
            if name not in kept and any(i in targets for i in node.input):
                node.input[:] = [targets.get(i, i) for i in node.input]

    def remove(self, names: Iterable[str]) -> None:
        """Takes nodes out; what took something of them is the caller's matter."""
        for name in names:
            self.nodes.pop(name, None)

    def noted_shape(self, source: str) -> list[int | None] | None:
        """The shape that the program noted for an input, None for an unknown size."""
        # Frozen graphs, and what was made here, have no such note.
        node = self.nodes.get(node_name(source))
        if node is None or "_output_shapes" not in node.attr:
            return None
        shapes = node.attr["_output_shapes"].list.shape
        port = port_in(source)
        if port >= len(shapes) or shapes[port].unknown_rank:
            return None
        return [d.size if d.size >= 0 else None for d in shapes[port].dim]

    def consumers(self) -> dict[str, list[str]]:
        """By name of a node, the nodes that take an output of it or wait for it."""
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, node in self.nodes.items():
            # Once, however often it takes it: they are counted.
            for source in dict.fromkeys(node_name(i) for i in node.input):
                if source in found:
                    found[source].append(name)
        return found

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """`names` and the nodes that they need, by inputs and control inputs."""
        return reached(
            names,
            lambda name: [
                source
                for source in map(node_name, self.nodes[name].input)
                if source in self.nodes
            ],
        )

    def descendants(self, names: Iterable[str]) -> set[str]:
        """`names` and the nodes that need them."""
        return reached(names, self.consumers().__getitem__)

    def in_order(self) -> list[str]:
        """The names of the nodes, each after those that it takes or waits for.

        In a loop, where there is no such order, in one of those that come near it.
        """
        ordered: dict[str, None] = {}
        begun = set()
        # By hand: networks are deeper than Python lets functions call each other.
        for name in self.nodes:
            pending = [name]
            while pending:
                node = pending[-1]
                if node in begun:
                    ordered.setdefault(pending.pop())
                    continue
                begun.add(node)
                sources = map(node_name, self.nodes[node].input)
                pending += [i for i in sources if i in self.nodes and i not in begun]
        return list(ordered)


def set_attributes(node: tf.NodeDef, **attributes: Any) -> None:
    """Sets attributes of a node by the kind of their values; see `EditableGraph.add`."""
    for key, value in attributes.items():
        attribute = node.attr[key]
        field = next((name for kind, name in _FIELDS if isinstance(value, kind)), None)
        if isinstance(value, np.ndarray):
            attribute.tensor.CopyFrom(tf.make_tensor_proto(value))
        elif isinstance(value, tf.DType):
            attribute.type = value.as_datatype_enum
        elif field is not None:
            setattr(attribute, field, value)
        else:
            attribute.shape.CopyFrom(tf.TensorShape(value).as_proto())


def data_inputs(node: tf.NodeDef) -> list[str]:
    """The inputs of a node without those that it only waits for."""
    return [source for source in node.input if not source.startswith("^")]


def node_name(source: str) -> str:
    """The node of an input, whatever is taken from it."""
    return source.lstrip("^").partition(":")[0]


def tensor_name(name: str, port: int = 0) -> str:
    """The input that takes output `port` of the node `name`."""
    return f"{name}:{port}" if port else name


def port_in(source: str) -> int:
    """The output that an input takes; -1 of a control input."""
    if source.startswith("^"):
        return -1
    return int(source.partition(":")[2] or 0)


def canonical(tensor: str) -> str:
    """The name of a tensor as inputs have it: "x" for "x:0"."""
    return tensor[:-2] if tensor.endswith(":0") else tensor


def input_for(view: GraphView, reference: int) -> str:
    """The input that takes what `reference` of a view of the graph means."""
    return tensor_name(view.names[node_of(reference)], port_of(reference))


def called_by(nodes: Iterable[Any], functions: Mapping[str, Any]) -> set[str]:
    """Those of `functions` that one of `nodes` names, as operation or attribute."""
    if not functions:  # as in most graphs of 1.x
        return set()
    return {name for node in nodes for name in functions_named(node)} & set(functions)
