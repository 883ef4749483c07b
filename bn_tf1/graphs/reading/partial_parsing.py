"""Graphs in the wire format: parsed node by node, when one is asked for.

The parsed messages of a graph take five to ten times the memory of its file, and a check
needs the attributes of few nodes at a time. Here a graph stays the bytes of its file and
the places of its nodes; one node is parsed when it is asked for, and a few of them are
kept. Everything else of a message is parsed at once: it is small beside the nodes.

Contract: what a message means is left to the library of protocol buffers, repeated and
unknown fields included: a field that occurs twice is joined as that library joins it.
Damaged bytes are a `ValueError` that names the place.

Source: tensorflow/core/framework/graph.proto and function.proto,
tensorflow/core/protobuf/meta_graph.proto and saved_model.proto.
"""

from __future__ import annotations

import array
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import tensorflow.compat.v1 as tf
from google.protobuf import descriptor_pool, message_factory, symbol_database
from google.protobuf.message import DecodeError

from bn_tf1.formats.wire_format import BYTES, Span, spans

MAX_NODES = 4_000_000
MAX_FUNCTIONS = 100_000

# Numbers of fields: of a GraphDef, its library and a FunctionDef.
_NODE, _LIBRARY = 1, 2
_FUNCTION = 1
_NODE_DEF = 3
# The parsed nodes that are kept were up to so many bytes in the file.
_KEPT_BYTES = 1 << 19

_NodeDef = tf.NodeDef  # `tf` looks names up anew, which is slow for millions of nodes


def hidden_message(name: str) -> Any:
    """The class of a message that TensorFlow has and registers, but does not show."""
    name = f"tensorflow.{name}"
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
        return message_factory.GetMessageClass(descriptor)
    # Its GetPrototype would make a class anew, of which no message of TensorFlow's is one.
    return symbol_database.Default().GetSymbol(name)


FunctionDef = hidden_message("FunctionDef")


class GraphTooLargeError(ValueError):
    """A graph has more nodes or functions than are examined."""


class Function(NamedTuple):
    """One function of a graph.

    Attributes:
        definition: the FunctionDef; its nodes may have been left out.
        nodes: its NodeDefs.
    """

    definition: Any
    nodes: Sequence[Any]


class Graph(NamedTuple):
    """A graph, parsed or not.

    Attributes:
        nodes: its NodeDefs.
        functions: the functions of its library.
    """

    nodes: Sequence[Any]
    functions: Sequence[Function]


def parsed_graph(graph_def: tf.GraphDef) -> Graph:
    """The graph of a message that is there already.

    Raises:
        GraphTooLargeError: it has too many nodes or functions.
    """
    functions = graph_def.library.function
    _check_size(
        len(graph_def.node) + sum(len(function.node_def) for function in functions),
        len(functions),
    )
    return Graph(graph_def.node, [Function(f, f.node_def) for f in functions])


def unparsed_graph(data: bytes, parts: Iterable[Span]) -> Graph:
    """The graph whose GraphDef is in the given spans of `data`.

    Args:
        data: the bytes of a file, which are kept.
        parts: the GraphDef; several are joined, as they are of a field that is repeated.

    Raises:
        GraphTooLargeError: it has too many nodes or functions.
        ValueError: it is damaged. A damaged node is an error when it is asked for.
    """
    parser = _NodeParser(data)
    nodes, functions, count = Nodes(parser), [], 0
    for part in parts:
        for field in spans(data, part.content, part.end):
            if field.kind == BYTES and field.number == _NODE:
                nodes.add(field)
                count += 1
            elif field.kind == BYTES and field.number == _LIBRARY:
                for function in fields_in(data, field, _FUNCTION):
                    functions.append(_function(parser, function))
                    count += len(functions[-1].nodes)
                    _check_size(count, len(functions))
            # While it is read, and not after: memory is taken for each.
            _check_size(count, len(functions))
    return Graph(nodes, functions)


def fields_in(data: bytes, message: Span, number: int) -> Iterator[Span]:
    """The fields `number` of the message at a place in `data` that are messages.

    Raises:
        ValueError: it is damaged.
    """
    for field in spans(data, message.content, message.end):
        if field.number == number and field.kind == BYTES:
            yield field


def rest_of(data: bytes, message: Span, number: int) -> bytes:
    """The message at a place in `data` without its fields `number`; see `fields_in`."""
    # A message without some of its fields is a message, too: the others are side by side.
    rest, kept = [], message.content
    for field in fields_in(data, message, number):
        if field.start > kept:
            rest.append(data[kept : field.start])
        kept = field.end
    rest.append(data[kept : message.end])
    return b"".join(rest)


def whole(data: bytes) -> Span:
    """The span of a message that is all of `data`."""
    return Span(0, BYTES, 0, 0, len(data))


def parse(message_class: Any, data: bytes, start: int) -> Any:
    """The message in `data`, which was at byte `start` of a file.

    Raises:
        ValueError: there is none.
    """
    try:
        return message_class.FromString(data)
    # protobuf 3 makes a SystemError of its own warning where that is an error.
    except (DecodeError, RuntimeError, SystemError):
        name = message_class.DESCRIPTOR.name
        raise ValueError(f"the {name} at byte {start} is damaged") from None


class Nodes(Sequence):
    """The NodeDefs at given places, parsed one by one."""

    def __init__(self, parser: _NodeParser):
        self._parser = parser
        # Start and end of each, in one array: objects would be larger than most nodes.
        self._places = array.array("q")

    def add(self, place: Span) -> None:
        """Appends the node at `place`."""
        self._places.append(place.content)
        self._places.append(place.end)

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"node {index} of {len(self)}")
        return self._parser.node(self._places[2 * index], self._places[2 * index + 1])

    def __iter__(self) -> Iterator[Any]:
        places, data = iter(self._places), self._parser.data
        for start, end in zip(places, places):  # two by two
            yield parse(_NodeDef, data[start:end], start)


class _NodeParser:
    """Parses nodes, and keeps those that were asked for last."""

    def __init__(self, data: bytes):
        self.data = data
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0

    def node(self, start: int, end: int) -> Any:
        node = self._kept.get(start)
        if node is None:
            node = parse(_NodeDef, self.data[start:end], start)
            # All at once: checks ask for the attributes of one node in a row, and go on.
            if self._kept_bytes > _KEPT_BYTES:
                self._kept.clear()
                self._kept_bytes = 0
            self._kept[start] = node
            self._kept_bytes += end - start
        return node


def _function(parser, message):
    nodes = Nodes(parser)
    for field in fields_in(parser.data, message, _NODE_DEF):
        nodes.add(field)
    rest = rest_of(parser.data, message, _NODE_DEF)
    return Function(parse(FunctionDef, rest, message.content), nodes)


def _check_size(nodes, functions):
    for count, limit, what in (
        (nodes, MAX_NODES, "nodes"),
        (functions, MAX_FUNCTIONS, "functions"),
    ):
        if count > limit:
            raise GraphTooLargeError(
                f"the graph has more than {limit} {what}, and no more are examined"
            )
