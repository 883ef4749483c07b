"""The wire format of protocol buffers, against the library that defines it."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.formats.wire_format import BYTES, FIXED32, VARINT, fields, spans


def attribute(**values):
    return tf.AttrValue(**values).SerializeToString()


@pytest.mark.parametrize(
    "message, expected",
    [
        (attribute(i=300), [(3, 300)]),
        (attribute(i=-1), [(3, 2**64 - 1)]),
        (attribute(f=1.0), [(4, 0x3F800000)]),
        (attribute(s=b"text"), [(2, b"text")]),
        (b"\x09" + b"\x01" + bytes(7), [(1, 1)]),
        (b"", []),
    ],
)
def test_fields_of_each_kind(message, expected):
    assert list(fields(message)) == expected


def test_spans_lie_without_gaps_in_the_bytes_around_them():
    node = tf.NodeDef(name="n" * 200, op="Add", input=["a", "b"]).SerializeToString()
    data = b"\xff" + node + b"\xff"
    found = list(spans(data, 1, len(data) - 1))
    assert [(span.number, span.kind) for span in found] == [
        (1, BYTES),
        (2, BYTES),
        (3, BYTES),
        (3, BYTES),
    ]
    assert [data[span.content : span.end] for span in found] == [
        b"n" * 200,
        b"Add",
        b"a",
        b"b",
    ]
    starts = [span.start for span in found] + [len(data) - 1]
    assert starts == [1] + [span.end for span in found]


def test_spans_of_numbers_hold_their_bytes():
    found = list(spans(attribute(i=300) + attribute(f=1.0), 0, 8))
    assert [(s.kind, s.end - s.content) for s in found] == [(VARINT, 2), (FIXED32, 4)]


@pytest.mark.parametrize(
    "data, end, message",
    [
        (b"\x0a\x05abc", 5, "field 1 is cut off at byte 0"),
        (b"\x0a\x01a\x0a\x02bb", 6, "field 1 is cut off at byte 3"),
        (b"\x0a\x01a\x18\x80\x01", 5, "field 3 is cut off at byte 3"),
        (b"\x25\x00\x00", 3, "field 4 is cut off at byte 0"),
        (b"\x0b", 1, "field 1 has the unknown kind 3 at byte 0"),
        (b"\x08\x80", 2, "a number has no end"),
        (b"\x0a" + b"\xff" * 11, 12, "a number has no end"),
    ],
)
def test_damaged_messages_name_the_place(data, end, message):
    with pytest.raises(ValueError, match=message):
        list(spans(data, 0, end))
