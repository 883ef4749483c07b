"""Reading a graph from a file: its protocol buffers are parsed, and nothing else.

Contract: nothing of a file is imported into TensorFlow or run, so that a hostile one can
at worst get an error. What a file is, is told by its content, not by its name. All that
can be wrong with it is a `ValueError` that names the file.

    .meta of tf.train.Saver, tf.train.export_meta_graph      MetaGraphDef
    frozen graph, graph.pbtxt of a training directory        GraphDef
    directory of a SavedModel, saved_model.pb                SavedModel: the meta graph
                                                             tagged "serve", or its first

Each of them is taken in the binary and in the text format. The nodes of a binary one are
parsed when they are asked for (`partial_parsing`).
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf
from google.protobuf import text_format

from bn_tf1.formats.file_signatures import other_format
from bn_tf1.graphs.reading.partial_parsing import (
    Graph,
    GraphTooLargeError,
    fields_in,
    hidden_message,
    parse,
    parsed_graph,
    rest_of,
    unparsed_graph,
    whole,
)
from bn_tf1.graphs.reading.text_graphs import binary_graph

# Protocol buffers are no larger than 2 GiB. What TensorFlow's parser refuses of a text is
# parsed in Python, a few MiB in a second, so that it is bounded by time.
MAX_BYTES = 2**31 - 1
MAX_TEXT_BYTES = 2**27
# Text from which TensorFlow's own parser is worth a session.
_LARGE_TEXT_BYTES = 2**20
# Numbers of fields: of a SavedModel, a MetaGraphDef and a GraphDef.
_META_GRAPHS = 2
_GRAPH_DEF = 2
_VERSIONS = 4
_VersionDef = hidden_message("VersionDef")
_SAVED_MODEL_NAMES = ("saved_model.pb", "saved_model.pbtxt")
_TEXT_START = re.compile(rb"(?:\s|#[^\n]*\n)*([a-z_]+)\s*[:{]")
_TEXT_FIELDS = {
    b"node": "graph",
    b"versions": "graph",
    b"library": "graph",
    b"meta_info_def": "meta",
    b"graph_def": "meta",
    b"saver_def": "meta",
    b"collection_def": "meta",
    b"saved_model_schema_version": "saved_model",
    b"meta_graphs": "saved_model",
}


class GraphFile(NamedTuple):
    """What a file holds.

    Attributes:
        kind: "graph", "meta" or "saved_model".
        graph: the graph.
        meta: the MetaGraphDef around it, whose graph_def may have been left out; None
            for kind "graph".
        producer: the version of graphs of the TensorFlow that made it.
    """

    kind: str
    graph: Graph
    meta: Any
    producer: int


def load_graph_file(path: str) -> GraphFile:
    """Reads the graph at `path`.

    Raises:
        ValueError: `path` cannot be read, is too large, or holds no graph.
    """
    path = _file_at(os.fspath(path))
    data = _content(path)
    start = _TEXT_START.match(
        data[:4096]
    )  # a comment may come first, but no whole page
    try:
        if start and start.group(1) in _TEXT_FIELDS:
            return _from_text(data, _TEXT_FIELDS[start.group(1)], path)
        return _from_binary(data, path)
    except GraphTooLargeError as error:
        raise ValueError(f"{path}: {error}") from error


def _file_at(path):
    if not os.path.isdir(path):
        return path
    for name in _SAVED_MODEL_NAMES:
        file = os.path.join(path, name)
        if os.path.exists(file):
            return file
    raise ValueError(
        f"directory {path} has no {' and no '.join(_SAVED_MODEL_NAMES)}: it is no "
        "SavedModel"
    )


def _content(path):
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise ValueError(
                f"{path} has {size} bytes, but a protocol buffer has at most {MAX_BYTES}"
            )
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _from_text(data, kind, path):
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path} has {len(data)} bytes of text, but at most {MAX_TEXT_BYTES} are "
            "parsed: give the binary file, such as the .meta of a checkpoint"
        )
    if kind == "graph" and len(data) > _LARGE_TEXT_BYTES:
        binary = binary_graph(data)
        if binary is not None:
            return _unparsed(kind, binary)
    message = _MESSAGES[kind]()
    try:
        # Fields of later versions are passed over, as in the binary format.
        text_format.Parse(data.decode("utf-8"), message, allow_unknown_field=True)
    except RecursionError:
        raise ValueError(
            f"{path} nests its messages too deeply to be a graph"
        ) from None
    except (text_format.ParseError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path} is damaged: {reason}") from error
    meta = {"meta": message, "graph": None}.get(kind)
    if kind == "saved_model":
        if not message.meta_graphs:
            raise _no_graph(path, data, "it has no meta_graphs")
        meta = next(filter(_is_served, message.meta_graphs), message.meta_graphs[0])
    graph_def = message if meta is None else meta.graph_def
    graph = parsed_graph(graph_def)
    if not _is_graph(graph):
        raise _no_graph(path, data, "it has no node with a name and an operation")
    return GraphFile(kind, graph, meta, graph_def.versions.producer)


def _from_binary(data, path):
    # The first byte of a SavedModel is its version; other graphs have no number there.
    # A MetaGraphDef first: as a GraphDef it would be one without nodes.
    kinds = ("saved_model",) if data[:1] == b"\x08" else ("meta", "graph")
    reasons = []
    for kind in kinds:
        try:
            return _unparsed(kind, data)
        except GraphTooLargeError:
            raise  # it is one, and as another kind it would be damaged
        except ValueError as error:
            reasons.append(f"as a {_MESSAGES[kind].DESCRIPTOR.name}, {error}")
    raise _no_graph(path, data, "; ".join(reasons))


def _no_graph(path, data, reason):
    """The error on a file without a graph: what it is instead, or where it is damaged."""
    other = other_format(data[:4096], path)
    if other:
        told = f"{path} is {other}, and no MetaGraphDef, GraphDef or SavedModel"
    else:
        places = [int(place) for place in re.findall(r"at byte (\d+)", reason)]
        near = f" near byte {max(places)}" if places else ""
        told = (
            f"{path} is no MetaGraphDef, GraphDef or SavedModel with a graph, or it is "
            f"damaged{near} of {len(data)}"
        )
    return ValueError(
        f"{told}: give a checkpoint's prefix, a .meta file, a frozen graph or the "
        "directory of a SavedModel"
    )


def _unparsed(kind, data):
    message, parts, meta = whole(data), [whole(data)], None
    if kind == "saved_model":
        message = _served(data)
    if kind != "graph":
        parts = fields_in(data, message, _GRAPH_DEF)
    graph = unparsed_graph(data, parts)
    # What is read by chance has nodes without an operation, or none: almost any bytes are
    # some message.
    if not _is_graph(graph):
        raise ValueError("it has no node with a name and an operation")
    if kind != "graph":
        meta = _without_graph(data, message)
        parts = fields_in(data, message, _GRAPH_DEF)
    return GraphFile(kind, graph, meta, _producer(data, parts))


def _producer(data, parts):
    places = (place for part in parts for place in fields_in(data, part, _VERSIONS))
    for place in places:
        content = data[place.content : place.end]
        return parse(_VersionDef, content, place.content).producer
    return 0


def _is_graph(graph):
    nodes = graph.nodes[:100]  # a million would be parsed for this
    return bool(nodes) and all(node.op and node.name for node in nodes)


def _served(data):
    """The place of the MetaGraphDef that is served, in a SavedModel."""
    first = None
    for place in fields_in(data, whole(data), _META_GRAPHS):
        if _is_served(_without_graph(data, place)):
            return place
        first = first or place
    if first is None:
        raise ValueError("it has no meta_graphs")
    return first


def _is_served(meta):
    return "serve" in meta.meta_info_def.tags


def _without_graph(data, place):
    return parse(tf.MetaGraphDef, rest_of(data, place, _GRAPH_DEF), place.content)


_MESSAGES = {
    "graph": tf.GraphDef,
    "meta": tf.MetaGraphDef,
    "saved_model": hidden_message("SavedModel"),
}
