"""Shards of TFRecords with encoded images, in the layout that ImageNet's are in.

    train-00000-of-01024, validation-00000-of-00128    (or test-...)
    image/encoded        the bytes of a JPEG or PNG
    image/class/label    an integer

Contract: where the records of a shard lie is read once, from their headers, and kept in an
index; it is read again when a shard has another size. Records are taken from one block of
neighbours, of bounded size, after the other, and each is held against its checksum. Not by
`tf.data.TFRecordDataset`, which reads a file from its start: a run that is resumed would read
all that it has seen, and the order of an epoch would be that of the file.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import zipfile
from typing import NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf
from google.protobuf.message import DecodeError
from tqdm import tqdm

from bn_tf1.formats.tfrecords import FRAME_BYTES, Frames, list_frames, unframed
from bn_tf1.jobs import choices
from bn_tf1.jobs.data.idx_and_cifar import DataFileError, unreadable_named
from bn_tf1.jobs.data.streamed import Example, ExampleSource
from bn_tf1.jobs.saving import durable_files

PREFIXES = {"train": ("train",), "test": ("test", "validation")}
INDEX_FILE = "records-{split}.npz"
CLASS_NAMES_FILE = "labels.txt"
# Neighbours that are used one after the other, in any order.
_BLOCK_BYTES = 1 << 25


class Features(NamedTuple):
    """What the features of an example are called, and what is taken from its label.

    Attributes:
        image, label: names of features.
        label_offset: what the label of the first class is; slim's ImageNet begins at 1.
    """

    image: str = choices.RECORD_IMAGE
    label: str = choices.RECORD_LABEL
    label_offset: int = 0


def open_shards(
    folder: str, split: str, *, features: Features, index_folder: str
) -> ExampleSource:
    """The records of one split.

    Args:
        folder: where the shards are.
        split: "train" or "test".
        features: names of features, and the offset of labels.
        index_folder: where an index is kept, if there is none beside the shards.

    Raises:
        DataFileError: there are no shards, or some are missing.
        RecordError: a shard is damaged where a record begins.
    """
    paths = _shards(folder, split)
    sizes = np.array([os.path.getsize(path) for path in paths], np.int64)
    frames = _indexed(folder, split, paths, sizes, index_folder)
    blocks = _blocks(frames)
    ends = np.cumsum([len(offsets) for _, _, offsets, _ in blocks], dtype=np.int64)
    # Of names and sizes: ImageNet's 140 GB would take minutes to read at each start.
    digest = hashlib.sha256()
    for path, size in zip(paths, sizes):
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
    read_block = functools.partial(_read_block, paths, blocks, features)
    return ExampleSource(ends, read_block, digest.hexdigest())


def read_class_names(folder: str) -> tuple[str, ...]:
    """The lines of labels.txt, without the "0:" that slim puts before each; or ()."""
    try:
        with open(os.path.join(folder, CLASS_NAMES_FILE), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return ()
    return tuple(re.sub(r"^\d+:", "", line) for line in lines if line)


def _shards(folder, split):
    for prefix in PREFIXES[split]:
        pattern = os.path.join(glob.escape(folder), f"{prefix}-*")
        paths = sorted(path for path in glob.glob(pattern) if os.path.isfile(path))
        if paths:
            _check_complete(paths)
            return paths
    wanted = " or ".join(f"{prefix}-*" for prefix in PREFIXES[split])
    raise DataFileError(
        f"{folder}: expected shards of TFRecords, {wanted}, found none; python -m bn_tf1 "
        "make_records makes them of a folder of images"
    )


def _check_complete(paths):
    matches = [re.search(r"-(\d{5,})-of-(\d{5,})$", path) for path in paths]
    if not all(matches):
        return  # named in another way
    totals = {int(match.group(2)) for match in matches}
    if len(totals) > 1:
        raise DataFileError(
            f"{os.path.dirname(paths[0])} has shards of sets of {sorted(totals)} files: "
            "keep one of the sets"
        )
    missing = set(range(totals.pop())) - {int(match.group(1)) for match in matches}
    if missing:
        raise DataFileError(
            f"{os.path.dirname(paths[0])} lacks shard {min(missing)} and "
            f"{len(missing) - 1} others of those that the names promise"
        )


def _indexed(folder, split, paths, sizes, index_folder):
    """The frames of each shard: from an index that fits, or read and kept."""
    name = INDEX_FILE.format(split=split)
    # Beside foreign shards nothing is written: their disk may be one that is only readable.
    for place in (folder, index_folder):
        frames = _read_index(os.path.join(place, name), paths, sizes)
        if frames is not None:
            return frames
    what, total = f"counting {split} records", int(sizes.sum())
    with tqdm(total=total, unit="B", unit_scale=True, desc=what) as progress:
        frames = [list_frames(path, progress.update) for path in paths]
    empty = [path for path, found in zip(paths, frames) if not len(found.offsets)]
    if len(empty) == len(paths):
        raise DataFileError(f"{empty[0]} and all other shards hold no record")
    write_index(os.path.join(index_folder, name), paths, sizes, frames)
    return frames


def _read_index(path, shards, sizes):
    names = [os.path.basename(shard) for shard in shards]
    try:
        with np.load(path, allow_pickle=False) as index:
            is_same = np.array_equal(index["sizes"], sizes)
            if not is_same or list(index["names"]) != names:
                return None
            pieces = np.cumsum(index["counts"])[:-1]
            parts = (np.split(index[key], pieces) for key in ("offsets", "lengths"))
            return [Frames(*pair) for pair in zip(*parts)]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # none, or not whole: it is made again


def write_index(path, shards, sizes, frames):
    """Keeps where the records of the shards lie; replaces the file as a whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with durable_files.replacing(path) as file:
        np.savez(
            file,
            names=np.array([os.path.basename(shard) for shard in shards]),
            sizes=sizes,
            counts=np.array([len(found.offsets) for found in frames], np.int64),
            offsets=np.concatenate([found.offsets for found in frames]),
            lengths=np.concatenate([found.lengths for found in frames]),
        )


def _blocks(frames):
    """(shard, number of the first record, offsets, lengths) of neighbouring records."""
    blocks = []
    for shard, (offsets, lengths) in enumerate(frames):
        if not len(offsets):
            continue
        # By where a record begins: a block is as large as that, and its last record more.
        parts = offsets // _BLOCK_BYTES
        firsts = np.flatnonzero(np.diff(parts, prepend=-1))
        for first, end in zip(firsts, [*firsts[1:], len(offsets)]):
            blocks.append((shard, first, offsets[first:end], lengths[first:end]))
    return blocks


def _read_block(paths, blocks, features, number):
    shard, first, offsets, lengths = blocks[number]
    file = _Shard(paths[shard])
    file.will_be_read(int(offsets[0]), int(offsets[-1] + lengths[-1]) + FRAME_BYTES)
    return [
        functools.partial(
            _example, file, offset, length + FRAME_BYTES, record, features
        )
        for record, (offset, length) in enumerate(
            zip(offsets.tolist(), lengths.tolist()), first
        )
    ]


class _Shard:
    """A shard that is open for as long as somebody has records of it.

    Each record is read by itself: to map fresh memory for a block of them costs five
    times what reading it costs.
    """

    def __init__(self, path):
        self.path = path
        with unreadable_named(path):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def will_be_read(self, first, end):
        """Lets the system read ahead; the order of the records would not tell it."""
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(
                self._file.fileno(), first, end - first, os.POSIX_FADV_WILLNEED
            )

    def read(self, offset, length):
        with unreadable_named(self.path):
            self._file.seek(offset)
            return self._file.read(length)


def _example(file, offset, length, number, features):
    # Parsed here and not by tf.io.parse_example, whose error ends the stream and names nobody.
    path = file.path
    data = unframed(file.read(offset, length), path, number)
    place = f"{path}: record {number}"
    try:
        found = tf.train.Example.FromString(data).features.feature
    except DecodeError as error:
        raise DataFileError(f"{place} holds no tf.train.Example") from error
    encoded = found[features.image].bytes_list.value if features.image in found else ()
    label = found[features.label].int64_list.value if features.label in found else ()
    for name, values, flag in (
        (features.image, encoded, "record_image"),
        (features.label, label, "record_label"),
    ):
        if len(values) != 1:
            raise DataFileError(
                f"{place} has {len(values)} values of the feature {name!r}, but must have "
                f"one; its features are {', '.join(sorted(found))} (--{flag})"
            )
    return Example(encoded[0], label[0] - features.label_offset, place)
