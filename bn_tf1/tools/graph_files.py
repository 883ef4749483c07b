"""Reading a graph from a file: the protocol buffers, parsed and nothing else.

Contract: nothing of a file is imported into TensorFlow or run, so that a hostile one can
at worst get an error. What a file is, is told by its content, not by its name. All that
can be wrong with it is a `ValueError` that names the file.

    .meta of tf.train.Saver, tf.train.export_meta_graph      MetaGraphDef
    frozen graph, graph.pbtxt of a training directory        GraphDef
    directory of a SavedModel, saved_model.pb                SavedModel: the meta graph
                                                             tagged "serve", or its first

Each of them is taken in the binary and in the text format.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf
from google.protobuf import (
    descriptor_pool,
    message_factory,
    symbol_database,
    text_format,
)
from google.protobuf.message import DecodeError

# Protocol buffers are no larger than 2 GiB. Their text is parsed in Python, about 1 MiB
# in a second, so that it is bounded by time.
MAX_BYTES = 2**31 - 1
MAX_TEXT_BYTES = 2**27
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
        graph_def: the GraphDef.
        meta: the MetaGraphDef around it; None for kind "graph".
    """

    kind: str
    graph_def: Any
    meta: Any


def load_graph_file(path: str) -> GraphFile:
    """Reads the graph at `path`.

    Raises:
        ValueError: `path` cannot be read, is too large, or holds no graph.
    """
    path = _file_at(os.fspath(path))
    data = _content(path)
    start = _TEXT_START.match(data[:4096])
    if start and start.group(1) in _TEXT_FIELDS:
        loaded = _from_text(data, _TEXT_FIELDS[start.group(1)], path)
    else:
        loaded = _from_binary(data)
    if loaded is None:
        raise ValueError(
            f"{path} is no MetaGraphDef, GraphDef or SavedModel with a graph, or it is "
            f"damaged ({len(data)} bytes): give a .meta file, a frozen graph or the "
            "directory of a SavedModel"
        )
    return loaded


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
            return file.read(MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _from_text(data, kind, path):
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path} has {len(data)} bytes of text, but at most {MAX_TEXT_BYTES} are "
            "parsed: give the binary file, such as the .meta of a checkpoint"
        )
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
    return _graph_file(kind, message)


def _from_binary(data):
    # The first byte of a SavedModel is its version; other graphs have no number there.
    kinds = ("saved_model",) if data[:1] == b"\x08" else ("meta", "graph")
    for kind in kinds:
        try:
            message = _MESSAGES[kind].FromString(data)
        except (DecodeError, RuntimeError):
            continue
        loaded = _graph_file(kind, message)
        if loaded is not None:
            return loaded
    return None


def _graph_file(kind, message):
    """The `GraphFile`, or None where the message is no graph after all."""
    meta = None
    graph_def = message
    if kind == "saved_model":
        meta = _served(message.meta_graphs)
    elif kind == "meta":
        meta = message
    if kind != "graph":
        if meta is None:
            return None
        graph_def = meta.graph_def
    # What parses by chance has nodes without an operation, or none.
    nodes = graph_def.node
    if not nodes or not all(node.op and node.name for node in nodes[:100]):
        return None
    return GraphFile(kind, graph_def, meta)


def _served(meta_graphs):
    for meta in meta_graphs:
        if "serve" in meta.meta_info_def.tags:
            return meta
    return meta_graphs[0] if meta_graphs else None


def _saved_model_message():
    """The class of SavedModel, which has no public name.

    TensorFlow registers the message when it is imported, so that the pool has it.
    """
    name = "tensorflow.SavedModel"
    descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        return message_factory.GetMessageClass(descriptor)
    return symbol_database.Default().GetPrototype(descriptor)


_MESSAGES = {
    "graph": tf.GraphDef,
    "meta": tf.MetaGraphDef,
    "saved_model": _saved_model_message(),
}
