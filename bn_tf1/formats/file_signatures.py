"""What a file is that is none of TensorFlow's graphs or checkpoints, in plain words.

People give a path that is beside the right one. What they gave is told by its first bytes,
as file formats mean it; where these say nothing, nothing is said.
"""

from __future__ import annotations

# How a file begins, and what it is then.
_BEGINNINGS = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras saves weights"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"\x7fELF", "a program or library"),
    (b"SQLite format 3", "an SQLite database"),
)
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
_ZIP = b"PK\x03\x04"
# A zip file names its members as they are.
_MEMBERS = (
    (b"data.pkl", "a model of PyTorch"),
    (b".npy", "a NumPy archive (.npz)"),
    (b"model.weights.h5", "a model of Keras 3 (.keras)"),
)
_MOST_BYTES = 4096


def other_format(start: bytes, name: str = "") -> str:
    """What a file is that starts with `start`, such as "a PNG image"; "" if unknown.

    Args:
        start: its first bytes; some thousand are enough.
        name: its name, for formats that only have an ending.
    """
    start = start[:_MOST_BYTES]
    if not start:
        return "an empty file"
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            return what
    if start.startswith(_ZIP):
        found = [what for member, what in _MEMBERS if member in start]
        return found[0] if found else "a zip archive"
    if start.startswith(_PICKLES):
        return "a pickle of Python, as PyTorch and tensorpack write them"
    # The identifier of a flat buffer lies behind the place of its root.
    if start[4:8] == b"TFL3":
        return "a model of TensorFlow Lite"
    if "tfevents" in name:
        return "an event file: give the directory that it is in"
    if name.endswith(".onnx"):
        return "a model of ONNX"
    if name.endswith((".tfrecord", ".tfrecords")):
        return "a file of records"
    return "a text file" if _is_text(start) else ""


def _is_text(start):
    """Whether it is text, but for a character that was cut off at its end."""
    for cut in range(4):
        try:
            text = start[: len(start) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return all(c.isprintable() or c in "\t\r\n\f" for c in text)
    return False
