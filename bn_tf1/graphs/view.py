"""A graph and its functions as one indexed list of nodes.

Checks of somebody's graph ask two things: what feeds this input, and what runs with that
node. Conditions, loops and calls of functions (`If`, `While`, `PartitionedCall`, ...)
stand in the way. Here the body of every function is appended once to the nodes of the
graph, and joined to its calls: an argument of a body (a node with the operation `_Arg`)
has the inputs of all calls as its own, and a call leads to the returned values (`_Ret`)
of its bodies. Nothing is copied for each call, so that the view is linear in the file
whatever calls what, itself included.

Contract: nodes are numbered from 0; output `port` of a node is one integer, a reference
(`reference_to`, `node_of`, `port_of`). Inputs that name no node are left out. Nothing
is imported into TensorFlow, nothing is run, and no depth of nesting matters.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence, TypeVar

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.reading.graph_files import load_graph_file
from bn_tf1.graphs.reading.partial_parsing import (
    Function,
    FunctionDef,
    Graph,
    GraphTooLargeError,
    hidden_message,
    parse,
    parsed_graph,
)

_Item = TypeVar("_Item")

# A few functions that many nodes call have edges as the product of both.
MAX_CALL_EDGES = 4_000_000

_MANY_CONTROLS = 16
# One integer for a node and a port: a tuple would be an object for each edge.
_PORT_BITS = 16
_MAX_PORT = (1 << _PORT_BITS) - 1
# Outputs that are no first ones and have names, as functions refer to them.
_PORTS = {
    "batch_mean": 1,
    "batch_variance": 2,
    "output_true": 1,
    "value_index": 1,
}
BRANCHES = ("If", "StatelessIf", "_If", "Case", "StatelessCase")
LOOPS = ("While", "StatelessWhile", "_While")
_PLAIN_CALLS = ["PartitionedCall", "StatefulPartitionedCall", "TPUPartitionedCall"]
# Where the arguments of the called function begin among the inputs of a call: first come
# a predicate, the index of a `Case` or the device of a `RemoteCall`.
_CALLS = {
    **dict.fromkeys((*_PLAIN_CALLS, "XlaLaunch", *LOOPS), 0),
    **dict.fromkeys((*BRANCHES, "RemoteCall"), 1),
}

# How many inputs the checks count on. A node of a damaged graph that has fewer is no
# such operation: it keeps its place under another name.
_ARITY = {
    **dict.fromkeys(
        ["Identity", "Cast", "Rsqrt", "Sqrt", "Neg", "L2Loss", "Exit", "RefExit"], 1
    ),
    **dict.fromkeys(
        ["Add", "AddV2", "Sub", "Mul", "RealDiv", "Div", "Pow", "BiasAdd", "Maximum"]
        + ["Minimum", "Reshape", "Mean", "Sum", "Switch", "RefSwitch"]
        + ["Assign", "AssignAdd", "AssignSub", "AssignVariableOp"]
        + ["AssignAddVariableOp", "AssignSubVariableOp"],
        2,
    ),
    **dict.fromkeys(["Range", "Select", "SelectV2"], 3),
    **dict.fromkeys(BRANCHES, 1),
}
_DAMAGED = "_Damaged"


class Body(NamedTuple):
    """The nodes of the graph itself (name "") or of one function.

    Attributes:
        name: name of the function.
        first, end: its nodes are range(first, end).
        arguments: the `_Arg` nodes, in order.
        returns: the `_Ret` nodes, in order.
        controls: nodes that run with every call, whatever is taken from it.
    """

    name: str
    first: int
    end: int
    arguments: tuple[int, ...]
    returns: tuple[int, ...]
    controls: tuple[int, ...]


class GraphView:
    """An indexed graph.

    Attributes:
        names: name of each node; those of a function are "function:node".
        ops: operation of each node.
        inputs: references to what each node takes.
        controls: the nodes that each node waits for.
        bodies: the graph itself, then its functions.
        called: by node that calls functions, the indices of their bodies.
        callers: by index of a body, the nodes that call it.
        collections: names of nodes and tensors by collection.
        saver: the SaverDef of the graph, or None.
        signatures: by signature, the names of the output tensors; of a SavedModel.
        path: "PATH: " of the file that was read, for errors; "" of a graph in memory.
        constant_sizes: the sizes of constants that were asked for, most of them often.
        unanswered: values that a function returns and no node gives, described.
    """

    def __init__(self, graph: Graph, meta: Any = None):
        """Indexes `graph`.

        Raises:
            GraphTooLargeError: its functions are called too often.
            ValueError: a node of it is damaged.
        """
        self.path = ""
        self.names: list[str] = []
        self.ops: list[str] = []
        self.inputs: list[tuple[int, ...]] = []
        self.controls: list[tuple[int, ...]] = []
        self.bodies: list[Body] = []
        self.called: dict[int, tuple[int, ...]] = {}
        self.callers: dict[int, list[int]] = {}
        self.collections = _collections(meta)
        self.saver = None
        self.signatures: dict[str, list[str]] = {}
        if meta is not None:
            self.saver = meta.saver_def if meta.HasField("saver_def") else None
            self.signatures = {
                key: [info.name for info in signature.outputs.values()]
                for key, signature in meta.signature_def.items()
            }
        # Of each body: its first node that has a NodeDef, and the NodeDefs, which are not
        # kept one by one: parsed, they would be most of all memory.
        self._sources: list[tuple[int, Sequence[Any]]] = []
        self.constant_sizes: dict[int, int | None] = {}
        # Made when somebody asks: the way back, which most questions take, needs neither.
        self._consumers: Any = None
        self._followers: Any = None
        self.unanswered: list[str] = []
        self._add_bodies(graph)
        self._join_calls()

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """The node of the graph itself that is called `name`, or None."""
        name = name.lstrip("^").split(":")[0]
        # A search for each of a few names is cheaper than an index of a million.
        try:
            return self.names.index(name, 0, self.bodies[0].end)
        except ValueError:
            return None

    def needed(self, names: Iterable[str]) -> bytearray | None:
        """1 for each node that the tensors `names` need; None if it has none of them."""
        nodes = [node for node in map(self.find, names) if node is not None]
        return ancestors(self, nodes) if nodes else None

    def called_from(self, bodies: Iterable[int]) -> set[int]:
        """The indices of `bodies` and of those that they call, by others or not."""
        calls: dict[int, set[int]] = {}
        for node, called in self.called.items():
            calls.setdefault(self.body_of(node), set()).update(called)
        return reached(bodies, lambda body: calls.get(body, ()))

    def body_of(self, node: int) -> int:
        """The index of the body that `node` is in."""
        # Found by halves: a number for each node would be as long as all else.
        return int(np.searchsorted(self._firsts, node, side="right")) - 1

    def attribute(self, node: int, name: str) -> Any:
        """The AttrValue `name` of `node`, or None."""
        first, definitions = self._sources[self.body_of(node)]
        # `_Arg`, `_Ret` and `_Controls` (many control inputs) have no NodeDef.
        if first <= node < first + len(definitions):
            attributes = definitions[node - first].attr
            if name in attributes:  # a map of messages makes what is asked for
                return attributes[name]
        return None

    def consumers(self, node: int, most: int | None = None) -> Sequence[int]:
        """The nodes, the first `most` of them, that take an output of `node`."""
        if self._consumers is None:
            self._consumers = _reversed_edges(
                len(self), lambda n: [r >> _PORT_BITS for r in self.inputs[n]]
            )
        starts, targets = self._consumers
        return targets[starts[node] : starts[node + 1]][:most].tolist()

    def runs_after(self, node: int) -> Sequence[int]:
        """The nodes one edge further that run only when `node` has run."""
        if self._followers is None:
            self._followers = _reversed_edges(len(self), self.runs_before)
        starts, targets = self._followers
        return targets[starts[node] : starts[node + 1]].tolist()

    def runs_before(self, node: int) -> Iterable[int]:
        """The nodes that a run of `node` runs first, one edge away."""
        for reference in self.inputs[node]:
            yield reference >> _PORT_BITS
        yield from self.controls[node]
        for body in self.called.get(node, ()):
            yield from self.bodies[body].returns
            yield from self.bodies[body].controls

    def _add_bodies(self, graph):
        bodies = [Function(FunctionDef(), graph.nodes), *graph.functions]
        names = [function.definition.signature.name for function in bodies]
        known = {name: index for index, name in enumerate(names) if name}
        for function in bodies:
            self._add_body(function.definition, function.nodes, known)
        self._firsts = np.array([body.first for body in self.bodies])

    def _add_body(self, definition, nodes, known):
        name, first = definition.signature.name, len(self.names)
        prefix = name + ":" if name else ""
        ids = {}
        for argument in definition.signature.input_arg:
            ids[argument.name] = self._add(prefix + argument.name, "_Arg")
        arguments = tuple(ids[a.name] for a in definition.signature.input_arg)
        self._add_nodes(nodes, prefix, ids, known)
        returned = []
        # By name: a damaged signature may have one twice.
        for key in dict.fromkeys(a.name for a in definition.signature.output_arg):
            source = definition.ret.get(key, "")
            node = self._add(prefix + key, "_Ret")
            self.inputs[node] = _references([source], ids)
            if source and not self._is_given(source, self.inputs[node]):
                self.unanswered.append(f"{name}: {key} = {source}")
            returned.append(node)
        awaited = definition.control_ret.values()
        controls = tuple(ids[node] for node in awaited if node in ids)
        end = len(self.names)
        self.bodies.append(Body(name, first, end, arguments, tuple(returned), controls))

    def _add_nodes(self, definitions, prefix, ids, known):
        start = len(self.names)
        self._sources.append((start, definitions))
        # What refers to a later node, or to many, is joined when all nodes have a number.
        later = []
        for definition in definitions:
            own = definition.name
            # Interned: some hundred texts for a million nodes.
            node = self._add(prefix + own, sys.intern(definition.op))
            ids.setdefault(own, node)
            if known:  # as in few graphs of 1.x
                called = [known[f] for f in functions_named(definition) if f in known]
                if called:
                    self.called[node] = tuple(dict.fromkeys(called))
            inputs, awaited = _split(definition.input)
            references = _references(inputs, ids)
            controls = tuple(ids[n[1:]] for n in awaited if n[1:] in ids)
            if (len(references), len(controls)) != (len(inputs), len(awaited)) or len(
                controls
            ) > _MANY_CONTROLS:
                later.append(node)
            else:
                self._connect(node, references, controls)
        shared: dict[tuple[str, ...], tuple[int, ...]] = {}
        for node in later:
            inputs, awaited = _split(definitions[node - start].input)
            if awaited not in shared:
                shared[awaited] = self._shared_controls(awaited, ids, prefix)
            self._connect(node, _references(inputs, ids), shared[awaited])

    def _is_given(self, source, references):
        """Whether a node gives what a function calls `source`, such as "read:value:0"."""
        output = source.partition(":")[2]
        if not references or not output:
            return bool(references)
        # Of all outputs only that of what replaces the read of a variable is known.
        is_copy = self.ops[node_of(references[0])] == "Identity"
        return not is_copy or output.startswith("output")

    def _connect(self, node, references, controls):
        self.inputs[node] = references
        self.controls[node] = controls
        if len(references) < _ARITY.get(self.ops[node], 0):
            self.ops[node] = _DAMAGED

    def _shared_controls(self, names, ids, prefix):
        """The nodes that `names` stand for, or one node that waits for them all.

        Under tf.control_dependencies of a thousand updates every gradient waits for
        each of them: a number of edges that is the square of the number of layers.
        """
        controls = tuple(ids[name[1:]] for name in names if name[1:] in ids)
        if len(controls) <= _MANY_CONTROLS:
            return controls
        node = self._add(f"{prefix}{len(controls)} control inputs", "_Controls")
        self.controls[node] = controls
        return (node,)

    def _add(self, name, op):
        self.names.append(name)
        self.ops.append(op)
        self.inputs.append(())
        self.controls.append(())
        return len(self.names) - 1

    def _join_calls(self):
        joined: dict[int, list[int]] = {}
        # A function is also called by an operation of its own name.
        functions = {body.name for body in self.bodies[1:]}
        edges = 0
        for node, called in self.called.items():
            op = self.ops[node]
            start = 0 if op in functions else _CALLS.get(op)
            given = self.inputs[node][start:] if start is not None else ()
            # What one iteration gives, the next one takes.
            again = _returned(self, called) if op in LOOPS else ()
            for index in called:
                body = self.bodies[index]
                edges += 1 + len(body.arguments + body.returns + body.controls)
                if edges > MAX_CALL_EDGES:
                    raise GraphTooLargeError(
                        "the calls of functions take and give more than "
                        f"{MAX_CALL_EDGES} values, and no more are examined"
                    )
                self.callers.setdefault(index, []).append(node)
                for references in (given, again):
                    for argument, reference in zip(body.arguments, references):
                        joined.setdefault(argument, []).append(reference)
        # When all calls are known: each of them gives an argument its values.
        for argument, references in joined.items():
            self.inputs[argument] = tuple(dict.fromkeys(references))


def read_graph(path: str) -> GraphView:
    """The graph in the file or SavedModel directory `path`.

    Raises:
        ValueError: `path` cannot be read or holds no graph, or too large a one.
    """
    with warnings.catch_warnings():
        # protobuf 3, which 1.15 needs, warns of this damage and takes what is before it.
        warnings.filterwarnings("error", "Unexpected end-group tag", RuntimeWarning)
        loaded = load_graph_file(path)
        try:
            view = GraphView(loaded.graph, loaded.meta)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    view.path = f"{path}: "
    return view


def view_of(graph: Any) -> GraphView:
    """The view of a tf.Graph, GraphDef or MetaGraphDef.

    Raises:
        TypeError: `graph` is none of them.
        ValueError: it has too many nodes.
    """
    if isinstance(graph, tf.Graph):
        # With the shapes, as .meta files have them: axes are told by them.
        view = GraphView(parsed_graph(graph.as_graph_def(add_shapes=True)))
        view.collections = {
            key: [
                item.name
                for item in graph.get_collection(key)
                if isinstance(getattr(item, "name", None), str)
            ]
            for key in graph.get_all_collection_keys()
            if isinstance(key, str)
        }
        return view
    if isinstance(graph, tf.MetaGraphDef):
        return GraphView(parsed_graph(graph.graph_def), graph)
    if isinstance(graph, tf.GraphDef):
        return GraphView(parsed_graph(graph))
    raise TypeError(
        f"`graph` is a {type(graph).__name__}, but must be a tf.Graph, a GraphDef, a "
        "MetaGraphDef or the path of a file"
    )


def reference_to(node: int, port: int = 0) -> int:
    """The reference to output `port` of `node`."""
    return node << _PORT_BITS | port


def node_of(reference: int) -> int:
    """The node of a reference."""
    return reference >> _PORT_BITS


def port_of(reference: int) -> int:
    """The number of the output of a reference."""
    return reference & _MAX_PORT


def ancestors(view: GraphView, nodes: Iterable[int]) -> bytearray:
    """1 for each of `nodes` and for all that runs before them, 0 for other nodes."""
    return _closure(len(view), nodes, view.runs_before)


def descendants(view: GraphView, nodes: Iterable[int]) -> bytearray:
    """1 for each of `nodes` and for all that runs only after one of them."""
    return _closure(len(view), nodes, view.runs_after)


def _closure(size, nodes, next_to):
    found = bytearray(size)  # a set of most nodes would be much larger
    pending = list(nodes)
    for node in pending:
        found[node] = 1
    while pending:
        for node in next_to(pending.pop()):
            if not found[node]:
                found[node] = 1
                pending.append(node)
    return found


def reached(
    starts: Iterable[_Item],
    further: Callable[[_Item], Iterable[_Item]],
    most: int | None = None,
) -> set[_Item]:
    """`starts` and all that is come to from them by way of `further`.

    Args:
        starts: nodes, references or names.
        further: gives what is one step from one of them.
        most: how many of them to ask how it goes on; None for all.
    """
    found = set(starts)
    pending = list(found)
    asked = 0
    while pending and asked != most:
        asked += 1
        for item in further(pending.pop()):
            if item not in found:
                found.add(item)
                pending.append(item)
    return found


def _described_variables(descriptions):
    variable_def = hidden_message("VariableDef")
    try:
        return [parse(variable_def, d, 0).variable_name for d in descriptions]
    except ValueError:
        return []  # of somebody's own, or damaged; a UnicodeDecodeError is one


def _collections(meta):
    if meta is None:
        return {}
    found = {
        key: list(values.node_list.value)
        for key, values in meta.collection_def.items()
        if values.WhichOneof("kind") == "node_list"
    }
    key = tf.GraphKeys.TRAINABLE_VARIABLES
    if key in meta.collection_def:
        found[key] = _described_variables(meta.collection_def[key].bytes_list.value)
    return found


def _split(names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The inputs and the control inputs, which come after them."""
    names = list(names)
    # Most nodes wait for nothing: the last name tells.
    if not names or names[-1][:1] != "^":
        return names, ()
    for i, name in enumerate(names):
        if name[:1] == "^":
            return names[:i], tuple(names[i:])
    return names, ()


def _references(names: Sequence[str], ids: Mapping[str, int]) -> tuple[int, ...]:
    found = []
    for name in names:
        if name in ids:  # a first output, as most inputs are: nothing to be split
            found.append(ids[name] << _PORT_BITS)
            continue
        name, *output = name.split(":")
        if name in ids:
            found.append(reference_to(ids[name], _port(output)))
    return tuple(found)


def _port(output):
    """The port of ["3"] in a graph, of ["batch_mean", "0"] in a function."""
    index = output[-1] if output else "0"
    # Of somebody's million digits Python would take minutes to make a number.
    port = int(index) if index.isdecimal() and len(index) < 6 else 0
    if len(output) == 2:
        port += _PORTS.get(output[0], 0)
    return min(port, _MAX_PORT)


def functions_named(definition: Any) -> Iterable[str]:
    """What may be the name of a function in a NodeDef: its operation and attributes."""
    yield definition.op
    for key in sorted(definition.attr):  # a map, in any order
        value = definition.attr[key]
        kind = value.WhichOneof("value")
        if kind == "func":
            yield value.func.name
        elif kind == "list":
            yield from (function.name for function in value.list.func)


def _returned(view, called):
    """What the body of a loop gives to its next iteration; its condition gives one."""
    longest = max(called, key=lambda body: len(view.bodies[body].returns))
    return [reference_to(node) for node in view.bodies[longest].returns]


def _reversed_edges(size, earlier):
    """(starts, targets): what follows node n is targets[starts[n]:starts[n + 1]]."""
    # In arrays: a list for each node would be objects by the million.
    edges = np.fromiter(
        (number for node in range(size) for e in earlier(node) for number in (e, node)),
        np.int32,
    )
    sources, targets = edges[::2], edges[1::2]
    order = np.argsort(sources, kind="stable").astype(np.int32)
    starts = np.searchsorted(sources[order], np.arange(size + 1))
    return starts, targets[order]
