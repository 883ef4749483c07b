"""The checksum of TensorFlow's files, CRC-32C, at about a gigabyte a second.

TensorFlow computes it only on the way to a whole tensor in memory. Here it is taken in
pieces, with NumPy: a checksum is the remainder of a polynomial over GF(2) whose
coefficients are the bits. A multiple of the divisor that has four terms only, with
exponents in steps of 64 bits, reduces a piece to its last 42 kilobytes by XORs of whole
slices. These are cut into lanes, which advance together by look-ups in tables; the
remainders of the lanes are folded two by two. Zeros in front change no remainder, and an
earlier remainder is the same as four bytes added to the next ones.

Source: RFC 3720, appendix B.4 (the polynomial); the mask is that of LevelDB's format.
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed
_ALL_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8
# x^5275 + x^4508 + x^2751 + 1 is a multiple of the polynomial, the one of four terms
# with the lowest degree; so is its 64th power, where each x stands for a word of 64 bits.
_DEGREE = 5275
_TAPS = (5275 - 4508, 5275 - 2751, 5275)
_LANES = 1 << 8
# Below this, tables and folding cost more than they save.
_MIN_LANES_BYTES = 1 << 12


class Crc32c:
    """A checksum that grows with the bytes it is given."""

    def __init__(self) -> None:
        self._remainder = _ALL_ONES

    def update(self, data: bytes) -> None:
        """Takes in `data`, best in pieces of some megabytes."""
        head = len(data) % 8 if len(data) >= _MIN_LANES_BYTES else len(data)
        remainder = _of_short(self._remainder, data[:head])
        if head < len(data):
            words = np.frombuffer(data, "<u8", offset=head).copy()
            words[0] ^= np.uint64(remainder)
            remainder = _remainder_of_lanes(_shortened(words).view("<u4"))
        self._remainder = remainder

    def masked(self) -> int:
        """The checksum as TensorFlow stores it."""
        checksum = self._remainder ^ _ALL_ONES
        rotated = (checksum >> 15 | checksum << 17) & _ALL_ONES
        return (rotated + _MASK_DELTA) & _ALL_ONES


def masked_crc32c(data: bytes) -> int:
    """The checksum of `data` as TensorFlow stores it."""
    checksum = Crc32c()
    checksum.update(data)
    return checksum.masked()


def _of_short(remainder, data):
    """The remainder after a few bytes."""
    table = _byte_table()
    for byte in data:
        remainder = table[(remainder ^ byte) & 0xFF] ^ (remainder >> 8)
    return remainder


def _shortened(words):
    """At most the last `_DEGREE` of `words`, with the same remainder."""
    end = len(words) - _DEGREE
    for start in range(0, end, _TAPS[0]):
        stop = min(start + _TAPS[0], end)
        for tap in _TAPS:
            words[start + tap : stop + tap] ^= words[start:stop]
    return words[max(end, 0) :]


def _remainder_of_lanes(words):
    length = -(-len(words) // _LANES)
    padded = np.zeros(_LANES * length, np.uint32)
    padded[-len(words) :] = words
    low, high = _word_tables()
    state = np.zeros(_LANES, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(_LANES, length).T):
        halves = np.bitwise_xor(state, column).view("<u2")
        state = low[halves[0::2]] ^ high[halves[1::2]]
    shift = 4 * length
    while len(state) > 1:
        state = _multiply(_zeros_operator(shift), state[0::2]) ^ state[1::2]
        shift *= 2
    return int(state[0])


@functools.lru_cache(maxsize=None)
def _byte_table() -> list[int]:
    """The remainder of each single byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


@functools.lru_cache(maxsize=None)
def _word_tables():
    """The remainders of four bytes, by their lower and by their upper half."""
    by_byte = np.array(_byte_table(), np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32)
    tables = []
    for word in (halves, halves << np.uint32(16)):
        for _ in range(4):
            word = by_byte[word & np.uint32(0xFF)] ^ (word >> np.uint32(8))
        tables.append(word)
    return tuple(tables)


@functools.lru_cache(maxsize=256)
def _zeros_operator(count):
    """What `count` zero bytes do to a remainder: the images of its 32 bits."""
    if count == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        by_byte = np.array(_byte_table(), np.uint32)
        return by_byte[bits & np.uint32(0xFF)] ^ (bits >> np.uint32(8))
    half = _zeros_operator(count // 2)
    twice = _multiply(half, half)
    return _multiply(_zeros_operator(1), twice) if count % 2 else twice


def _multiply(operator, remainders):
    """The images of `remainders`."""
    bits = np.arange(32, dtype=np.uint32)[:, np.newaxis]
    is_set = remainders >> bits & np.uint32(1)
    return np.bitwise_xor.reduce(is_set * operator[:, np.newaxis], axis=0)
