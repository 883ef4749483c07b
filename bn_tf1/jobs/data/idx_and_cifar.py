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
from typing import Iterable, Iterator, NamedTuple

import numpy as np

CIFAR_IMAGE_BYTES = 3 * 32 * 32

# The most that tf.io.decode_compressed returns, hence the largest usable file.
MAX_FILE_BYTES = 2**31 - 1

# What any gzip file may hold, and how many times its own size it may hold beyond that:
# MNIST shrinks to a fifth, zeros to a thousandth.
_FREE_CONTENT_BYTES = 1 << 28
_MAX_EXPANSION = 100

# So much is in memory at once, whatever the size of the file.
_CHUNK_BYTES = 1 << 18
_CHUNK_RECORDS = 64
_GZIP_MAGIC = b"\x1f\x8b"
# No label of CIFAR-10 is as large, and no coarse one of CIFAR-100.
_PICKLE_FIRST_BYTE = 0x80
_IDX_UINT8 = 8


class DataFileError(ValueError):
    """A data file is missing, damaged or not what its place requires."""


@contextlib.contextmanager
def unreadable_named(path: str) -> Iterator[None]:
    """Turns what the system says of a file into a `DataFileError` that names it."""
    try:
        yield
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from error


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
        folder: where the files are.
        prefix: "train" or "t10k".
        image_size: (height, width) in pixels that the images must have.
        num_classes: labels must lie in [0, num_classes).
        max_pixel: pixels must lie in [0, max_pixel].

    Returns:
        (images, labels), with the same `num_examples`.

    Raises:
        DataFileError: a file is missing or anything in it is wrong.
    """
    path = _find_file([folder], _idx_names(prefix + "-images", 3))
    images = _check_idx(path, image_size, max_pixel + 1, "a pixel")
    path = _find_file([folder], _idx_names(prefix + "-labels", 1))
    return images, _check_idx(path, (), num_classes, "a label", images)


def check_cifar(
    folder: str, name: str, *, subfolder: str, label_limits: tuple[int, ...]
) -> CheckedFile:
    """Finds and checks one file of the binary version of CIFAR-10 or CIFAR-100.

    Args:
        folder: where the file is, directly or in `subfolder`.
        name: for example "data_batch_1.bin"; `name + ".gz"` is accepted too.
        subfolder: the folder that the official archive unpacks to.
        label_limits: for each label byte of a record, in order, what it must be less
            than.

    Raises:
        DataFileError: the file is missing, belongs to the pickled Python version, or
            anything in it is wrong.
    """
    # Where the official archive was unpacked, and what it unpacks to.
    folders = [folder, os.path.join(folder, subfolder)]
    names = [name, name + ".gz"]
    pickled = _first_file(folders, [os.path.splitext(name)[0]])
    if pickled and not _first_file(folders, names):
        raise _pickle_error(pickled, name)
    return _check_cifar_records(_find_file(folders, names), label_limits)


def checksum(files: Iterable[CheckedFile]) -> str:
    """The SHA-256 of all the content, decompressed, in hexadecimal; "" for no files.

    Raises:
        DataFileError: a file has become unreadable since it was checked.
    """
    digest = hashlib.sha256()
    files = list(files)
    for file in files:
        with _open(file.path) as stream:
            # Of what is decompressed: who unpacks a file may go on with the run.
            for content in iter(lambda: stream.read(_CHUNK_BYTES), b""):
                digest.update(content)
    return digest.hexdigest() if files else ""


def _find_file(folders, names):
    """The path of the first of `names` that is a file in one of `folders`."""
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


def _first_file(folders, names):
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    return next(filter(os.path.isfile, paths), None)


def _idx_names(stem, rank):
    """The accepted names of an IDX file, the preferred one first."""
    # Some archives of MNIST, and programs that unpack them, put a dot before "idx".
    plain = [f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte"]
    return plain + [name + ".gz" for name in plain]


def _check_idx(path, example_shape, limit, what, images=None):
    """Checks a file of examples of one shape, whose values must be less than `limit`."""
    with _open(path) as stream:
        count = _read_idx_header(stream, example_shape)
        if images is not None and count != images.num_examples:
            expected = (
                f"{images.num_examples} labels, one for each image of {images.path}"
            )
            raise stream.error(4, expected, count)
        header_bytes = stream.offset
        # Integers of Python's, which no header can make overflow.
        end = header_bytes + count * int(np.prod(example_shape, dtype=np.int64))
        if end > MAX_FILE_BYTES:
            expected = f"a file of at most {MAX_FILE_BYTES} bytes"
            raise stream.error(4, expected, f"a count that needs {end}")
        while stream.offset < end:
            start = stream.offset
            content = stream.read(min(_CHUNK_BYTES, end - start))
            if not content:
                raise stream.error(start, f"{end} bytes in all", "the end of the data")
            _expect_below(stream, np.frombuffer(content, np.uint8), limit, what, start)
        # TensorFlow would reshape what it reads, and fail in the first step.
        if stream.read(1):
            raise stream.error(end, "the end of the data", "trailing bytes")
        return CheckedFile(path, stream.is_gzip, header_bytes, count)


def _read_idx_header(stream, example_shape):
    """Reads the header and returns the number of examples, at least 1."""
    expected_magic = bytes([0, 0, _IDX_UINT8, 1 + len(example_shape)])
    # Of the type, too: an IDX file of floats has the same rank, and four times the bytes.
    magic = _read_four(stream, "the IDX magic number")
    if magic != expected_magic:
        expected = f"the IDX magic number {expected_magic.hex()}"
        raise stream.error(0, expected, magic.hex())
    (count,) = struct.unpack(">I", _read_four(stream, "the number of examples"))
    if count == 0:
        raise stream.error(4, "at least one example", 0)
    for size in example_shape:
        offset = stream.offset
        (found,) = struct.unpack(">I", _read_four(stream, "an image dimension"))
        if found != size:
            told = f"{found}: are these the files of another --dataset?"
            raise stream.error(offset, f"an image dimension of {size}", told)
    return count


def _read_four(stream, what):
    content = stream.read(4)
    if len(content) < 4:
        found = f"{len(content)} bytes" if stream.offset else "an empty file"
        start = stream.offset - len(content)
        raise stream.error(start, f"{what} (4 bytes)", found)
    return content


def _expect_below(stream, values, limit, what, start, stride=1):
    """Checks uint8 `values` [k], found at the bytes `start` + i * `stride`."""
    wrong = np.flatnonzero(values >= limit)
    if wrong.size:
        offset = start + int(wrong[0]) * stride
        raise stream.error(offset, f"{what} in [0, {limit})", int(values[wrong[0]]))


def _pickle_error(path, binary_name):
    # To open a pickle is to run what it says.
    return DataFileError(
        f"{path}: at byte 0: expected the binary version of CIFAR ({binary_name}), "
        "found the python version (pickle), which is never opened; the binary version "
        "is at https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _check_cifar_records(path, label_limits):
    record_bytes = len(label_limits) + CIFAR_IMAGE_BYTES
    with _open(path) as stream:
        start = 0
        # The format has neither a header nor a count: the size is all that it promises.
        for content in iter(lambda: stream.read(record_bytes * _CHUNK_RECORDS), b""):
            if stream.offset > MAX_FILE_BYTES:
                expected = f"a file of at most {MAX_FILE_BYTES} bytes"
                raise stream.error(MAX_FILE_BYTES, expected, "more bytes")
            count, rest = divmod(len(content), record_bytes)
            values = np.frombuffer(content, np.uint8, count * record_bytes)
            records = values.reshape(count, record_bytes)
            if count and content[0] == _PICKLE_FIRST_BYTE:
                raise _pickle_error(path, os.path.basename(path))
            for column, limit in enumerate(label_limits):
                labels, first = records[:, column], start + column
                _expect_below(stream, labels, limit, "a label", first, record_bytes)
            if rest:
                found = f"the end of the data after {rest} bytes of a record"
                expected = f"whole records of {record_bytes} bytes"
                raise stream.error(stream.offset, expected, found)
            start = stream.offset
        if not start:
            raise stream.error(0, f"a record of {record_bytes} bytes", "an empty file")
        return CheckedFile(path, stream.is_gzip, 0, start // record_bytes)


@contextlib.contextmanager
def _open(path):
    """Opens a file as a `_Stream`; a failing read becomes a `DataFileError`."""
    try:
        with open(path, "rb") as file:
            yield _Stream(path, file)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error}") from error


class _Stream:
    """The content of a file, decompressed if it is gzip, in pieces of bounded size.

    The gzip stream must be one member, which is what tf.io.decode_compressed reads; Python's
    gzip module would go on into a second one.
    """

    def __init__(self, path, file):
        self._path = path
        self._file = file
        self.is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        self._input = b""  # of the decoder: what it has not taken yet
        self._gzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        size = os.fstat(file.fileno()).st_size
        self._max_content = max(_FREE_CONTENT_BYTES, _MAX_EXPANSION * size)
        self.offset = 0

    def read(self, size):
        """Returns `size` bytes, fewer only at the end of the data.

        Raises:
            DataFileError: the gzip stream is damaged, truncated, followed by more bytes,
                or holds far more than images would.
        """
        content = b""
        while len(content) < size:
            left = size - len(content)
            piece = self._decompress(left) if self.is_gzip else self._file.read(left)
            if not piece:
                break
            content += piece
            self.offset += len(piece)
            if self.is_gzip and self.offset > self._max_content:
                raise self.error(
                    self._max_content,
                    f"at most {self._max_content} bytes in a gzip file of this size",
                    "more, as in a gzip bomb; if they are wanted, decompress the file",
                )
        return content

    def error(self, offset, expected, found):
        """The `DataFileError` for what was found at a byte offset."""
        place = " of the decompressed stream" if self.is_gzip else ""
        return DataFileError(
            f"{self._path}: at byte {offset}{place}: expected {expected}, found {found}"
        )

    def _decompress(self, size):
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
                expected = "the end of the gzip stream"
                raise self.error(self.offset, expected, "the end of the file")
        if self._gzip.eof and (self._gzip.unused_data or self._file.read(1)):
            found = "more bytes in the file after its end"
            raise self.error(self.offset + len(content), "one gzip stream", found)
        return content
