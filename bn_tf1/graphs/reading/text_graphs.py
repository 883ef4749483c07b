"""The text of a large graph, made binary by TensorFlow's own parser.

A training directory has its graph as text, graph.pbtxt. The Python library of protocol
buffers takes 8 to 13 seconds for the 28 MB of an Inception-ResNet, TensorFlow's parser
half a second: `tf.io.decode_proto` gives the nodes as bytes.

Contract: nothing of the graph is imported or run; the one operation that runs takes the
text as data. The parser is C++ without a limit of its depth, so that text that nests deeper
than graphs do is not given to it; neither does it take fields that it does not know. For
either the answer is None, and the slow way remains.
"""

from __future__ import annotations

import re

import tensorflow.compat.v1 as tf

# A graph with functions is some ten deep; each level is an attribute in an attribute.
_MAX_DEPTH = 64
_TOKENS = re.compile(
    rb"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|#[^\n]*|[{}<>]", re.DOTALL
)
# The fields of a GraphDef, and their numbers.
_FIELDS = {"node": 1, "library": 2, "versions": 4}


def binary_graph(text: bytes) -> bytes | None:
    """The GraphDef that `text` describes, in the wire format; None where it is refused."""
    if _depth(text) > _MAX_DEPTH:
        return None
    # A session takes the memory of all GPUs unless it is told that there is none.
    config = tf.ConfigProto(device_count={"GPU": 0})
    with tf.Graph().as_default(), tf.Session(config=config) as session:
        given = tf.placeholder(tf.string, [])
        _, values = tf.io.decode_proto(
            given,
            message_type="tensorflow.GraphDef",
            field_names=list(_FIELDS),
            output_types=[tf.string] * len(_FIELDS),
            message_format="text",
            descriptor_source="local://",
        )
        try:
            fields = session.run(values, {given: text})
        except tf.errors.OpError:
            return None  # a field that it does not know, or damage, which the slow way names
    return b"".join(
        _field(number, message)
        for number, messages in zip(_FIELDS.values(), fields)
        for message in messages
    )


def _depth(text):
    """How deeply messages are nested; too large rather than too small."""
    depth = deepest = 0
    for token in _TOKENS.finditer(text):
        mark = token.group()
        if mark in (b"{", b"<"):
            depth += 1
            deepest = max(deepest, depth)
        elif mark in (b"}", b">"):
            depth -= 1
    return deepest


def _field(number, message):
    length, encoded = len(message), bytearray([number << 3 | 2])
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + message
