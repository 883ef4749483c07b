"""Protocol buffers read field by field, without their definitions.

The messages inside of a checkpoint's index have no public class in TensorFlow; those of
a graph are too many to be all parsed at once. Whatever bytes are read instead of them,
only a `ValueError` can come of it.

Source: the protocol buffers' documentation, "Encoding".
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Union

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
# Seven bits in each byte: what goes on longer is no number of 64 bits.
_MAX_VARINT_BYTES = 10

Value = Union[int, bytes]


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position` of `data`, and the position behind it."""
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        if position + i >= len(data):
            break
        byte = data[position + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, position + i + 1
    raise ValueError("a number has no end")


class Span(NamedTuple):
    """Where one field of a message lies in its bytes.

    Attributes:
        number: the number of the field.
        kind: `VARINT`, `FIXED64`, `BYTES` or `FIXED32`.
        start: position of the first byte of the field.
        content: position of the first byte of its value.
        end: position behind its last byte.
    """

    number: int
    kind: int
    start: int
    content: int
    end: int


def spans(data: bytes, position: int, end: int) -> Iterator[Span]:
    """The fields of the message in `data[position:end]`, in their order.

    Raises:
        ValueError: there is no protocol buffer; positions are those in `data`.
    """
    while position < end:
        start = position
        key, position = read_varint(data, position)
        number, kind = key >> 3, key & 7
        content = position
        if kind == VARINT:
            _, position = read_varint(data, position)
        elif kind == BYTES:
            length, content = read_varint(data, position)
            position = content + length
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        # Groups, 3 and 4, are of the first version; TensorFlow never wrote any.
        else:
            raise ValueError(
                f"field {number} has the unknown kind {kind} at byte {start}"
            )
        if position > end:
            raise ValueError(f"field {number} is cut off at byte {start}")
        yield Span(number, kind, start, content, position)


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of `message` as (number, value), in their order.

    A value is an int, or bytes for a string, a message or packed numbers. A fixed value
    is an int too: the bits of a float as they are.

    Raises:
        ValueError: `message` is no protocol buffer.
    """
    for number, kind, _, content, end in spans(message, 0, len(message)):
        if kind == VARINT:
            yield number, read_varint(message, content)[0]
        elif kind == BYTES:
            yield number, message[content:end]
        else:
            yield number, int.from_bytes(message[content:end], "little")


def by_number(message: bytes) -> dict[int, list[Value]]:
    """The values of each field of `message`; see `fields`."""
    found: dict[int, list[Value]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    return found


def number_in(found: dict[int, list[Value]], number: int) -> int:
    """The last value of the field `number` that is a number; 0 if there is none."""
    # The last one counts: so a message is changed by appending to it.
    return ([0] + [v for v in found.get(number, []) if isinstance(v, int)])[-1]


def bytes_in(found: dict[int, list[Value]], number: int) -> list[bytes]:
    """The values of the field `number` that are strings, messages or packed numbers."""
    return [v for v in found.get(number, []) if isinstance(v, bytes)]


def signed(value: int) -> int:
    """The int64 that a varint of 64 bits stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value
