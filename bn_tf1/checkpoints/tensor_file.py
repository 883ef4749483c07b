"""The tensors of somebody's checkpoint, read without trusting a byte of it.

TensorFlow's reader takes a whole tensor into memory, believes the sizes that it reads,
and ends the process on some that are absurd: of hostile bytes and in bounded memory it
cannot be used. Here the index is held against the sizes of the data files before anything
is read, and tensors are read in pieces. Where a checkpoint is the user's own,
`reader_writer` reads it, with TensorFlow's.

Contract: a checkpoint, by name or by object, is opened by its prefix; it is the format
that TensorFlow has written since 0.12 (an index and data files; the first format, V1, is
the matter of `reader_writer` alone). What does not fit
together is a `CheckpointError` that names the file. A wrong checksum shows when the
tensor is read. What is no plain number is not looked into.

Source: tensorflow/core/protobuf/tensor_bundle.proto, types.proto and tensor_slice.proto.
"""

from __future__ import annotations

import functools
import operator
import os
from typing import Iterator, Mapping, NamedTuple

import google_crc32c
import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import Shape
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.formats import sorted_table
from bn_tf1.formats.crc32c import masked
from bn_tf1.formats.wire_format import by_number, bytes_in, number_in, signed

_CHUNK_BYTES = 1 << 23
# That of TensorFlow's shapes.
_MAX_RANK = 254
# Plain numbers, by their numbers in types.proto, with the lowest byte first.
_DTYPES = {
    dtype.as_datatype_enum: np.dtype(dtype.as_numpy_dtype).newbyteorder("<")
    for dtype in (
        *(tf.float16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool),
        *(tf.int8, tf.int16, tf.int32, tf.int64),
        *(tf.uint8, tf.uint16, tf.uint32, tf.uint64),
    )
}
# NumPy has none: its values are read as what they are the upper halves of.
_BFLOAT16 = tf.bfloat16.as_datatype_enum
_DTYPES[_BFLOAT16] = np.dtype("<u2")
# As many as the five digits in their names can count.
_MAX_SHARDS = 100_000


class Part(NamedTuple):
    """Bytes in a data file that are a tensor, or a slice of a partitioned one."""

    path: str
    offset: int
    size: int
    checksum: int


class Tensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        dtype: NumPy's dtype of its values; None for what is no plain number: strings,
            variants, quantized and 8-bit floats.
        is_bfloat16: whether a value is the upper half of a float32.
        shape: its shape.
        parts: where its bytes are. The slices of a partitioned variable are in the
            order of their starts.
    """

    dtype: np.dtype | None
    is_bfloat16: bool
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def elements(self) -> int:
        """The number of its values."""
        return _count(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether a value can be NaN."""
        return self.is_bfloat16 or (self.dtype is not None and self.dtype.kind in "fc")

    def chunks(self) -> Iterator[np.ndarray]:
        """Its values, flat, in pieces of some megabytes.

        Raises:
            CheckpointError: a file cannot be read, or at the end a checksum is wrong.
        """
        for part in self.parts:
            for data in _read_part(part):
                yield _values(data, self)

    def read(self) -> np.ndarray:
        """All its values; a partitioned tensor must be a vector but for sizes of 1."""
        return np.concatenate(list(self.chunks()) or [np.zeros(0)]).reshape(self.shape)


class TensorFile(NamedTuple):
    """An open checkpoint.

    Attributes:
        prefix: its path without ".index".
        tensors: its tensors by name.
    """

    prefix: str
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_tensors(prefix: str) -> TensorFile:
    """Opens the checkpoint `prefix` and checks that its files fit together.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the others.
    """
    path = prefix + ".index"
    try:
        table = sorted_table.read_table(path)
        shards = _shard_count(table.pop(b"", None))
        return TensorFile(prefix, _tensors(prefix, shards, table))
    # It is a ValueError, and says already what is wrong.
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class _Entry(NamedTuple):
    dtype_number: int
    shape: Shape
    part: Part
    slices: int


def _tensors(prefix, shards, table):
    slices: dict[str, list[_Entry]] = {}
    entries = {}
    sizes: dict[str, int] = {}
    for key, value in table.items():
        is_slice = key.startswith(b"\0")
        name = _name_of_slice(key) if is_slice else _text(key)
        entry = _entry(name, value, prefix, shards)
        # A partitioned tensor has no bytes itself; each of its slices has an entry.
        if not entry.slices:
            _check_size(name, entry, sizes)
        if is_slice:
            slices.setdefault(name, []).append(entry)
        else:
            entries[name] = entry
    return {
        name: Tensor(
            _DTYPES.get(entry.dtype_number),
            entry.dtype_number == _BFLOAT16,
            entry.shape,
            _parts(name, entry, slices),
        )
        for name, entry in entries.items()
    }


def _entry(name, value, prefix, shards):
    # BundleEntryProto: dtype, shape, shard_id, offset, size, crc32c, slices, from 1 on.
    found = by_number(value)
    shard = number_in(found, 3)
    if shard >= shards:
        raise ValueError(
            f"tensor {name!r} is said to be in data file {shard} of {shards}"
        )
    part = Part(
        f"{prefix}.data-{shard:05d}-of-{shards:05d}",
        signed(number_in(found, 4)),
        signed(number_in(found, 5)),
        number_in(found, 6),
    )
    shape, slices = _shape(name, bytes_in(found, 2)), len(bytes_in(found, 7))
    return _Entry(number_in(found, 1), shape, part, slices)


def _check_size(name, entry, sizes):
    """Holds an entry against the size of its file, which is added to `sizes`."""
    part = entry.part
    if part.offset < 0 or part.size < 0:
        raise ValueError(
            f"tensor {name!r} is said to have {part.size} bytes from {part.offset}"
        )
    dtype = _DTYPES.get(entry.dtype_number)
    # A string's size is not told by its shape.
    if dtype is not None and part.size != _count(entry.shape) * dtype.itemsize:
        raise ValueError(
            f"tensor {name!r} of shape {list(entry.shape)} has {part.size} bytes, "
            f"but needs {_count(entry.shape)} times {dtype.itemsize}"
        )
    # A checkpoint of many tensors has few files.
    if part.path not in sizes:
        sizes[part.path] = os.path.getsize(part.path)
    if part.offset + part.size > sizes[part.path]:
        raise CheckpointError(
            f"{part.path} has {sizes[part.path]} bytes, but tensor {name!r} "
            f"ends at byte {part.offset + part.size}: the file is cut off, or not "
            "that of its index"
        )


def _shard_count(header):
    if header is None:
        raise ValueError("it has no header")
    found = by_number(header)
    # BundleHeaderProto: num_shards, endianness.
    shards = number_in(found, 1)
    if not 1 <= shards <= _MAX_SHARDS:
        raise ValueError(f"it is said to have {shards} data files")
    if number_in(found, 2):
        raise ValueError("it was written on a machine with the highest byte first")
    return shards


def _parts(name, entry, slices):
    if not entry.slices:
        return (entry.part,)
    found = slices.get(name, [])
    elements = sum(_count(piece.shape) for piece in found)
    fits = len(found) == entry.slices and elements == _count(entry.shape)
    if not fits or {piece.dtype_number for piece in found} != {entry.dtype_number}:
        raise ValueError(
            f"tensor {name!r} of shape {list(entry.shape)} has {entry.slices} slices, "
            f"but {len(found)} of them, with {elements} elements, are there"
        )
    return tuple(piece.part for piece in found)


def _text(key):
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the name {key!r} is no text") from error


def _name_of_slice(key):
    """The name at the beginning of the key of a slice: 0x00, name, 0x00 0x01, ...

    In the name 0x00 is written as 0x00 0xff, and 0xff as 0xff 0x00.
    """
    name, end, _ = key[1:].partition(b"\0\1")
    if not end:
        raise ValueError(f"the key {key[:80]!r} belongs to no slice of a tensor")
    return _text(name.replace(b"\0\xff", b"\0").replace(b"\xff\0", b"\xff"))


def _shape(name, messages):
    # TensorShapeProto: its dimensions, each with its size. A scalar has none.
    dimensions = bytes_in(by_number(messages[-1]), 2) if messages else []
    if len(dimensions) > _MAX_RANK:
        raise ValueError(f"tensor {name!r} has rank {len(dimensions)}")
    shape = tuple(signed(number_in(by_number(size), 1)) for size in dimensions)
    if any(size < 0 for size in shape):
        raise ValueError(f"tensor {name!r} has shape {list(shape)}")
    return shape


def _count(shape):
    # Of any size: NumPy's integers would overflow.
    return functools.reduce(operator.mul, shape, 1)


def _read_part(part):
    checksum = 0
    left = part.size
    try:
        with open(part.path, "rb") as file:
            file.seek(part.offset)
            while left:
                data = file.read(min(left, _CHUNK_BYTES))
                # A job may write on while it is read.
                if not data:
                    raise CheckpointError(f"{part.path} became shorter meanwhile")
                left -= len(data)
                checksum = google_crc32c.extend(checksum, data)
                yield data
    except OSError as error:
        raise CheckpointError(
            f"{part.path} cannot be read: {error.strerror}"
        ) from error
    # Not before: TensorFlow keeps one checksum of all bytes of a part.
    if masked(checksum) != part.checksum:
        raise CheckpointError(
            f"{part.path}: the bytes {part.offset} to {part.offset + part.size} have a "
            "wrong checksum"
        )


def _values(data, tensor):
    values = np.frombuffer(data, "u1" if tensor.dtype is None else tensor.dtype)
    return (values.astype("<u4") << 16).view("<f4") if tensor.is_bfloat16 else values
