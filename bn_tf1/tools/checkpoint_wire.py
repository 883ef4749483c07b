"""Protocol buffers read field by field, without their definitions.

The messages inside of a checkpoint's index have no public class in TensorFlow. They are
few and flat; and whatever bytes are read instead of them, only a `ValueError` can come
of it.

Source: the protocol buffers' documentation, "Encoding".
"""

from __future__ import annotations

from typing import Iterator, Union

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
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


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of `message` as (number, value), in their order.

    A value is an int, or bytes for a string, a message or packed numbers. A fixed value
    is an int too: the bits of a float as they are.

    Raises:
        ValueError: `message` is no protocol buffer.
    """
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = read_varint(message, position)
            yield number, value
            continue
        if kind == BYTES:
            length, position = read_varint(message, position)
        elif kind in _FIXED_BYTES:
            length = _FIXED_BYTES[kind]
        else:
            raise ValueError(f"field {number} has the unknown kind {kind}")
        if position + length > len(message):
            raise ValueError(f"field {number} is cut off")
        content = message[position : position + length]
        position += length
        yield number, content if kind == BYTES else int.from_bytes(content, "little")


def by_number(message: bytes) -> dict[int, list[Value]]:
    """The values of each field of `message`; see `fields`."""
    found: dict[int, list[Value]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    return found


def number_in(found: dict[int, list[Value]], number: int) -> int:
    """The last value of the field `number` that is a number; 0 if there is none."""
    return ([0] + [v for v in found.get(number, []) if isinstance(v, int)])[-1]


def bytes_in(found: dict[int, list[Value]], number: int) -> list[bytes]:
    """The values of the field `number` that are strings, messages or packed numbers."""
    return [v for v in found.get(number, []) if isinstance(v, bytes)]


def signed(value: int) -> int:
    """The int64 that a varint of 64 bits stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value
