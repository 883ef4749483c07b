"""TFRecord files by their frames, so that any record can be read without those before it.

    length (8 bytes), its checksum (4), data, their checksum (4)

TensorFlow's own reader goes through a file from its beginning, and says of a damaged
record neither the file nor which one it is. Here the frames of a file are listed by their
headers alone, and a record is checked when it is taken out of bytes that were read.

Contract: what does not fit is a `RecordError` that names the file and the record; no
memory is taken for a length that the file has no bytes for.

Source: tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import os
import struct
from typing import Callable, NamedTuple

import numpy as np

from bn_tf1.formats.crc32c import masked_crc32c

HEADER_BYTES = 12
FRAME_BYTES = HEADER_BYTES + 4
_CHUNK_BYTES = 1 << 20


class RecordError(ValueError):
    """A file holds something else than whole, undamaged records."""


class Frames(NamedTuple):
    """Where the records of one file lie.

    Attributes:
        offsets: int64 [n], of the frames, in bytes.
        lengths: int64 [n], of the data of each.
    """

    offsets: np.ndarray
    lengths: np.ndarray


def list_frames(
    path: str, on_progress: Callable[[int], object] = lambda num_bytes: None
) -> Frames:
    """The frames of a file, by their headers.

    Args:
        path: an uncompressed TFRecord file.
        on_progress: called with the number of bytes that were passed over, now and then.

    Raises:
        RecordError: a header is damaged, or the file ends within a record.
    """
    offsets, lengths = [], []
    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        # Headers alone are read, and no buffer of a record with each.
        offset = reported = 0
        while offset < size:
            file.seek(offset)
            header = file.read(HEADER_BYTES)
            length = _length(header, path, len(offsets))
            end = offset + FRAME_BYTES + length
            # The length may be a lie of any size: nothing is read by it.
            if end > size:
                raise RecordError(
                    f"{path}: record {len(offsets)} should end at byte {end}, but the "
                    f"file has {size}: it was cut off; write or copy it again"
                )
            offsets.append(offset)
            lengths.append(length)
            offset = end
            if offset - reported > _CHUNK_BYTES:
                on_progress(offset - reported)
                reported = offset
        on_progress(size - reported)
    return Frames(np.array(offsets, np.int64), np.array(lengths, np.int64))


def unframed(frame: bytes, path: str, number: int) -> bytes:
    """The data of a frame.

    Args:
        frame: all bytes of one frame.
        path, number: the file and which record of it this is, for errors.

    Raises:
        RecordError: header or data do not have the checksum that stands beside them.
    """
    # Again: the file may have changed since its frames were listed.
    length = _length(frame[:HEADER_BYTES], path, number)
    data = frame[HEADER_BYTES : HEADER_BYTES + length]
    if masked_crc32c(data) != int.from_bytes(frame[HEADER_BYTES + length :], "little"):
        raise RecordError(
            f"{path}: the data of record {number} do not have the checksum that stands "
            "beside them: they were damaged; write or copy the file again"
        )
    return data


def framed(data: bytes) -> bytes:
    """`data` as a record."""
    length = struct.pack("<Q", len(data))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + data
        + struct.pack("<I", masked_crc32c(data))
    )


def _length(header, path, number):
    length, checksum = header[:8], header[8:]
    if len(header) == HEADER_BYTES and masked_crc32c(length) == int.from_bytes(
        checksum, "little"
    ):
        return int.from_bytes(length, "little")
    # TensorFlow writes records in gzip, too, under the same name.
    if header[:2] == b"\x1f\x8b" and number == 0:
        raise RecordError(f"{path} is compressed with gzip: unpack it first")
    raise RecordError(
        f"{path}: there is no whole header where record {number} should begin: the file "
        "is damaged, or holds no TFRecords"
    )
