"""The sorted table of keys and values that the index of a checkpoint is.

    [data block] ... [block of metadata] [index block] [footer, 48 bytes]

A block holds entries (shared length, own length, value length as varints; own part of
the key; value), the positions of restarts, their number, one byte for the compression
and a checksum. The index block leads from a key to the place of a data block. TensorFlow
compresses none.

Contract: whatever the bytes are, memory and time stay in proportion to the limits below,
and only a `ValueError` can come of it. Keys ascend strictly.

Source: LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import os
from typing import Iterator, NamedTuple

from bn_tf1.formats.crc32c import masked_crc32c
from bn_tf1.formats.wire_format import read_varint

_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
# An index of a hundred thousand tensors has some 10 MB. Keys share prefixes: a small
# file can stand for a large table.
MAX_INDEX_BYTES = 1 << 26
_MAX_KEY_BYTES = 1 << 12
_MAX_ALL_KEYS_BYTES = 1 << 26
_MAX_ENTRIES = 200_000


class Place(NamedTuple):
    """Where a block lies in its file, without its trailer."""

    offset: int
    size: int


def is_table(path: str) -> bool:
    """Whether the file at `path` ends as a table does."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < _FOOTER_BYTES:
            return False
        file.seek(-len(_MAGIC), os.SEEK_END)
        return file.read() == _MAGIC


def read_table(path: str) -> dict[bytes, bytes]:
    """The whole table in the file at `path`, in the order of its keys.

    Raises:
        ValueError: it is no table, is damaged, or has more than `MAX_INDEX_BYTES`.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    if size > MAX_INDEX_BYTES:
        raise ValueError(f"{size} bytes are more than the {MAX_INDEX_BYTES} allowed")
    with open(path, "rb") as file:
        table = {}
        left = _MAX_ALL_KEYS_BYTES
        for place in data_blocks(file):
            for key, value in read_block(file, place):
                left -= len(key)
                if left < 0:
                    raise ValueError(f"the keys exceed {_MAX_ALL_KEYS_BYTES} bytes")
                if len(table) == _MAX_ENTRIES:
                    raise ValueError(f"it has more than {_MAX_ENTRIES} entries")
                table[key] = value
    return table


def data_blocks(file) -> Iterator[Place]:
    """The places of the data blocks of an open table, in the order of their keys."""
    size = file.seek(0, os.SEEK_END)
    if size < _FOOTER_BYTES:
        raise ValueError(f"{size} bytes are too few for a table")
    file.seek(size - _FOOTER_BYTES)
    footer = file.read(_FOOTER_BYTES)
    if footer[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("it does not end as a table does: cut off, or another file")
    _, position = _place(footer, 0)
    index, _ = _place(footer, position)
    end = 0
    for _, value in read_block(file, index):
        place, _ = _place(value, 0)
        # Without it, a small file could have its blocks read again and again.
        if place.offset < end:
            raise ValueError("the blocks of the table overlap")
        end = place.offset + place.size
        yield place


def read_block(file, place: Place) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block."""
    block = _checked_block(file, place)
    # Where keys begin anew: for a search by halves, which nobody makes here.
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if len(block) < 4 or end < 0:
        raise ValueError(f"the block at byte {place.offset} has no end")
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position)
        own, position = read_varint(block, position)
        length, position = read_varint(block, position)
        following = position + own + length
        too_long = shared + own > _MAX_KEY_BYTES
        if following > end or shared > len(key) or too_long:
            raise ValueError(f"an entry in the block at byte {place.offset} is damaged")
        new_key = key[:shared] + block[position : position + own]
        # TensorFlow looks for a key by halves, and would miss some of those mixed up.
        if position and key and new_key <= key:
            raise ValueError(f"the keys in the block at byte {place.offset} are mixed")
        key = new_key
        yield key, block[position + own : following]
        position = following


def _place(data, position):
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return Place(offset, size), position


def _checked_block(file, place):
    size = file.seek(0, os.SEEK_END)
    # Before anything of a size is read that the file may only claim.
    if place.offset + place.size + _TRAILER_BYTES > size:
        raise ValueError(f"a block at byte {place.offset} lies beyond the end")
    file.seek(place.offset)
    content = file.read(place.size + 1)
    checksum = int.from_bytes(file.read(4), "little")
    # It covers the kind of the compression, too.
    if masked_crc32c(content) != checksum:
        raise ValueError(f"the block at byte {place.offset} has a wrong checksum")
    if content[-1]:
        raise ValueError(
            f"the block at byte {place.offset} is compressed (kind {content[-1]})"
        )
    return content[:-1]
