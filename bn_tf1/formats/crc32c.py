"""The checksum of TensorFlow's files: CRC-32C, stored masked.

TensorFlow offers it in no public function. `google_crc32c` takes bytes in pieces, at
sixteen gigabytes a second where it was built with its C library, as its wheels are.

Source: RFC 3720, appendix B.4 (the polynomial); the mask is that of LevelDB's format.
"""

from __future__ import annotations

import google_crc32c

_ALL_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8


def masked_crc32c(data: bytes) -> int:
    """The checksum of `data` as TensorFlow stores it."""
    return masked(google_crc32c.value(data))


def masked(checksum: int) -> int:
    """A checksum of `google_crc32c` as TensorFlow stores it.

    A file's checksum is itself a part of files, and the plain CRC of bytes that end with
    their own CRC is a constant.
    """
    rotated = (checksum >> 15 | checksum << 17) & _ALL_ONES
    return (rotated + _MASK_DELTA) & _ALL_ONES
