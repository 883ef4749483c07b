"""Checks image files in the IDX (MNIST) and CIFAR binary formats to the last byte.

A job checks its files before the first training step, because TensorFlow's own
readers notice a damaged file late or never: an empty CIFAR file is a clean end of
the data, and a truncated gzip file yields examples until it breaks off.

Contract: a file that passes here holds exactly the examples that its format
promises. Anything else raises `DataFileError`, which names the file, the byte offset
(for a gzip file that of the decompressed stream), what was expected and what was
found. Files are read in chunks and never unpickled; no memory is allocated from a
header's claim, and no gzip file is decompressed beyond its expected size plus one
byte (CIFAR, which states no size: plus one chunk beyond `MAX_FILE_BYTES`), nor beyond
what images shrink to: content of the right format that is all zeros passes every other
check, and two megabytes of it would fill gigabytes in TensorFlow. A file counts as gzip if
it starts with the bytes 1f 8b, whatever its name.

IDX: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension
as a big-endian uint32, then the values in C order. CIFAR: records of one (CIFAR-10) or
two (CIFAR-100: coarse, fine) label bytes and 3 x 32 x 32 pixels, channels first.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database"; A. Krizhevsky,
"The CIFAR-10 and CIFAR-100 datasets", https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from typing import BinaryIO, Iterable, Iterator, NamedTuple

import numpy as np

CIFAR_IMAGE_BYTES = 3 * 32 * 32

# The most that tf.io.decode_compressed returns, hence the largest usable file.
MAX_FILE_BYTES = 2**31 - 1

# What any gzip file may hold, and how many times its own size it may hold beyond that:
# MNIST shrinks to a fifth, zeros to a thousandth.
_FREE_CONTENT_BYTES = 1 << 28
_MAX_EXPANSION = 100

_CHUNK_BYTES = 1 << 18
_CHUNK_RECORDS = 64
_GZIP_MAGIC = b"\x1f\x8b"
_PICKLE_FIRST_BYTE = 0x80
_IDX_UINT8 = 8


class DataFileError(ValueError):
    """A data file is missing, damaged or not what its place requires."""


class CheckedFile(NamedTuple):
    """A file whose whole content has been checked.

    Attributes:
        path: str.
        is_gzip: bool, whether the bytes on disk are a gzip stream.
        header_bytes: int, the offset of the first example, in decompressed bytes.
        num_examples: int, at least 1.
    """

    path: str
    is_gzip: bool
    header_bytes: int
    num_examples: int


def check_idx_pair(
    folder: str,
    prefix: str,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    max_pixel: int = 255,
) -> tuple[CheckedFile, CheckedFile]:
    """Finds and checks an IDX image file and the label file that belongs to it.

    The files are `<prefix>-images-idx3-ubyte` and `<prefix>-labels-idx1-ubyte`, also
    with `.idx` for `-idx`, also with `.gz` appended; a plain file goes before a `.gz`.

    Args:
        folder: str, where the files are.
        prefix: str, "train" or "t10k".
        image_size: (height, width) in pixels that the images must have.
        num_classes: int, labels must lie in [0, num_classes).
        max_pixel: int, pixels must lie in [0, max_pixel].

    Returns:
        A tuple (images, labels) of two `CheckedFile` with the same `num_examples`.

    Raises:
        DataFileError: if a file is missing or anything in it is wrong.
    """
    images = _check_idx_images(
        _find_file([folder], _idx_names(prefix + "-images", 3)), image_size, max_pixel
    )
    labels = _check_idx_labels(
        _find_file([folder], _idx_names(prefix + "-labels", 1)), num_classes, images
    )
    return images, labels


def check_cifar(
    folder: str, name: str, *, subfolder: str, label_limits: tuple[int, ...]
) -> CheckedFile:
    """Finds and checks one file of the binary version of CIFAR-10 or CIFAR-100.

    Args:
        folder: str, where the file is, directly or in `subfolder`.
        name: str, for example "data_batch_1.bin"; `name + ".gz"` is accepted too.
        subfolder: str, the folder that the official archive unpacks to.
        label_limits: a tuple with one int for each label byte of a record, in order;
            that label must be smaller.

    Returns:
        A `CheckedFile`.

    Raises:
        DataFileError: if the file is missing, belongs to the pickled Python version,
            or anything in it is wrong.
    """
    folders = [folder, os.path.join(folder, subfolder)]
    names = [name, name + ".gz"]
    pickled = _first_file(folders, [os.path.splitext(name)[0]])
    if pickled and not _first_file(folders, names):
        raise _pickle_error(pickled, name)
    return _check_cifar_records(_find_file(folders, names), label_limits)


def checksum(files: Iterable[CheckedFile]) -> str:
    """The SHA-256 of all the content, decompressed, in hexadecimal.

    Returns:
        A str, the same whether a file is compressed or not; empty for no files.

    Raises:
        DataFileError: if a file has become unreadable since it was checked.
    """
    digest = hashlib.sha256()
    files = list(files)
    for file in files:
        with _open(file.path) as stream:
            content = stream.read(_CHUNK_BYTES)
            while content:
                digest.update(content)
                content = stream.read(_CHUNK_BYTES)
    return digest.hexdigest() if files else ""


def _find_file(folders: list[str], names: list[str]) -> str:
    """Returns the path of the first of `names` that is a file in one of `folders`."""
    path = _first_file(folders, names)
    if path is None:
        if not os.path.isdir(folders[0]):
            is_file = os.path.exists(folders[0])
            raise DataFileError(
                f"{folders[0]} is {'a file' if is_file else 'not there'}, but must be the "
                f"folder with {names[0]} and the other files of the data set (--data_dir)"
            )
        raise DataFileError(
            f"{os.path.join(folders[0], names[0])}: expected this file, found none; "
            f"looked for {', '.join(names)} in {', '.join(folders)}"
        )
    return path


def _first_file(folders: list[str], names: list[str]) -> str | None:
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    return next(filter(os.path.isfile, paths), None)


def _idx_names(stem: str, rank: int) -> list[str]:
    """The accepted names of an IDX file, the preferred one first."""
    plain = [f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte"]
    return plain + [name + ".gz" for name in plain]


def _check_idx_images(
    path: str, image_size: tuple[int, int], max_pixel: int
) -> CheckedFile:
    with _open(path) as stream:
        count = _read_idx_header(stream, image_size)
        num_values = count * image_size[0] * image_size[1]
        header_bytes = _expect_size(stream, num_values)
        for start, values in _value_chunks(stream, num_values):
            _expect_below(stream, values, max_pixel + 1, "a pixel", start, 1)
        _expect_end(stream)
        return CheckedFile(path, stream.is_gzip, header_bytes, count)


def _check_idx_labels(path: str, num_classes: int, images: CheckedFile) -> CheckedFile:
    with _open(path) as stream:
        count = _read_idx_header(stream, ())
        if count != images.num_examples:
            raise stream.error(
                4,
                f"{images.num_examples} labels, one for each image of {images.path}",
                count,
            )
        header_bytes = _expect_size(stream, count)
        for start, values in _value_chunks(stream, count):
            _expect_below(stream, values, num_classes, "a label", start, 1)
        _expect_end(stream)
        return CheckedFile(path, stream.is_gzip, header_bytes, count)


def _read_idx_header(stream: _Stream, example_shape: tuple[int, ...]) -> int:
    """Reads the IDX header and returns the number of examples, at least 1."""
    expected_magic = bytes([0, 0, _IDX_UINT8, 1 + len(example_shape)])
    magic = _read_exactly(stream, 4, "the IDX magic number")
    if magic != expected_magic:
        raise stream.error(
            0, f"the IDX magic number {expected_magic.hex()}", magic.hex()
        )
    (count,) = struct.unpack(">I", _read_exactly(stream, 4, "the number of examples"))
    if count == 0:
        raise stream.error(4, "at least one example", 0)
    for size in example_shape:
        offset = stream.offset
        (found,) = struct.unpack(">I", _read_exactly(stream, 4, "an image dimension"))
        if found != size:
            raise stream.error(
                offset,
                f"an image dimension of {size}",
                f"{found}: are these the files of another --dataset?",
            )
    return count


def _expect_size(stream: _Stream, num_values: int) -> int:
    """Refuses a claimed size that no reader could take; returns the header's size."""
    if stream.offset + num_values > MAX_FILE_BYTES:
        raise stream.error(
            4,
            f"a file of at most {MAX_FILE_BYTES} bytes",
            f"a count that needs {stream.offset + num_values}",
        )
    return stream.offset


def _value_chunks(stream: _Stream, num_values: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (offset, uint8 array of shape [k]) until `num_values` have been read."""
    end = stream.offset + num_values
    while stream.offset < end:
        start = stream.offset
        content = stream.read(min(_CHUNK_BYTES, end - start))
        if not content:
            raise stream.error(start, f"{end} bytes in all", "the end of the data")
        yield start, np.frombuffer(content, np.uint8)


def _expect_below(
    stream: _Stream, values: np.ndarray, limit: int, what: str, start: int, stride: int
) -> None:
    """Checks uint8 `values` [k], found at the bytes `start` + i * `stride`."""
    wrong = np.flatnonzero(values >= limit)
    if wrong.size:
        raise stream.error(
            start + int(wrong[0]) * stride,
            f"{what} in [0, {limit})",
            int(values[wrong[0]]),
        )


def _expect_end(stream: _Stream) -> None:
    end = stream.offset
    if stream.read(1):
        raise stream.error(end, "the end of the data", "trailing bytes")


def _pickle_error(path: str, binary_name: str) -> DataFileError:
    return DataFileError(
        f"{path}: at byte 0: expected the binary version of CIFAR ({binary_name}), "
        "found the python version (pickle), which is never opened; the binary version "
        "is at https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _check_cifar_records(path: str, label_limits: tuple[int, ...]) -> CheckedFile:
    record_bytes = len(label_limits) + CIFAR_IMAGE_BYTES
    count = 0
    with _open(path) as stream:
        for start, records in _record_chunks(stream, record_bytes):
            if records[0, 0] == _PICKLE_FIRST_BYTE:
                raise _pickle_error(path, os.path.basename(path))
            for column, limit in enumerate(label_limits):
                first = start + column
                labels = records[:, column]
                _expect_below(stream, labels, limit, "a label", first, record_bytes)
            count += len(records)
        if count == 0:
            raise stream.error(0, f"a record of {record_bytes} bytes", "an empty file")
        return CheckedFile(path, stream.is_gzip, 0, count)


def _record_chunks(
    stream: _Stream, record_bytes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (offset, uint8 array of shape [k, record_bytes]) up to the end."""
    while True:
        start = stream.offset
        content = _read_up_to(stream, record_bytes * _CHUNK_RECORDS)
        if stream.offset > MAX_FILE_BYTES:
            limit = f"a file of at most {MAX_FILE_BYTES} bytes"
            raise stream.error(MAX_FILE_BYTES, limit, "more bytes")
        whole, rest = divmod(len(content), record_bytes)
        values = np.frombuffer(content, np.uint8, whole * record_bytes)
        if whole:
            yield start, values.reshape(whole, record_bytes)
        if rest:
            found = f"the end of the data after {rest} bytes of a record"
            expected = f"whole records of {record_bytes} bytes"
            raise stream.error(stream.offset, expected, found)
        if not content:
            return


def _read_exactly(stream: _Stream, size: int, what: str) -> bytes:
    offset = stream.offset
    content = _read_up_to(stream, size)
    if len(content) < size:
        found = f"{len(content)} bytes" if offset + len(content) else "an empty file"
        raise stream.error(offset, f"{what} ({size} bytes)", found)
    return content


def _read_up_to(stream: _Stream, size: int) -> bytes:
    """Reads `size` bytes, fewer only at the end of the data."""
    content = b""
    while len(content) < size:
        piece = stream.read(size - len(content))
        if not piece:
            break
        content += piece
    return content


@contextlib.contextmanager
def _open(path: str) -> Iterator[_Stream]:
    """Opens a file as a `_Stream`; a failing read becomes a `DataFileError`."""
    try:
        with open(path, "rb") as file:
            yield _Stream(path, file)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error}") from error


class _Stream:
    """The content of a file, decompressed if it is gzip, in pieces of bounded size.

    The gzip stream must be one member, which is what tf.io.decode_compressed reads.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._input = file.read(len(_GZIP_MAGIC))
        self.is_gzip = self._input == _GZIP_MAGIC
        self._gzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        size = os.fstat(file.fileno()).st_size
        self._max_content = max(_FREE_CONTENT_BYTES, _MAX_EXPANSION * size)
        self.offset = 0

    def read(self, size: int) -> bytes:
        """Returns 1 to `size` bytes, or none at the end of the data.

        Raises:
            DataFileError: if the gzip stream is damaged, truncated, followed by more
                bytes, or holds far more than images would.
        """
        content = self._decompress(size) if self.is_gzip else self._read_plain(size)
        self.offset += len(content)
        if self.is_gzip and self.offset > self._max_content:
            raise self.error(
                self._max_content,
                f"at most {self._max_content} bytes in a gzip file of this size",
                "more, as in a gzip bomb; if they are wanted, decompress the file",
            )
        return content

    def error(self, offset: int, expected: str, found: object) -> DataFileError:
        """Returns the `DataFileError` for what was found at a byte offset."""
        place = " of the decompressed stream" if self.is_gzip else ""
        return DataFileError(
            f"{self._path}: at byte {offset}{place}: expected {expected}, found {found}"
        )

    def _read_plain(self, size: int) -> bytes:
        content = self._input[:size]
        self._input = self._input[size:]
        return content + self._file.read(size - len(content))

    def _decompress(self, size: int) -> bytes:
        content = b""
        while not content and not self._gzip.eof:
            # The decoder can hold back output while it wants no more input.
            source = self._input or self._file.read(_CHUNK_BYTES)
            try:
                content = self._gzip.decompress(source, size)
            except zlib.error as error:
                raise self.error(self.offset, "valid gzip data", error) from error
            self._input = self._gzip.unconsumed_tail
            if not source and not content and not self._gzip.eof:
                raise self.error(
                    self.offset, "the end of the gzip stream", "the end of the file"
                )
        if self._gzip.eof and (self._gzip.unused_data or self._file.read(1)):
            raise self.error(
                self.offset + len(content),
                "one gzip stream",
                "more bytes in the file after its end",
            )
        return content
