"""Writes a folder of images as shards of TFRecords, with their index.

Contract: the shards are whole or not there: they are written to a folder beside the
destination, which takes its name when all is on the disk. Every image is checked before
it is written; the order of the training images is shuffled, so that the neighbours that a
reader takes together are mixed.
"""

from __future__ import annotations

import contextlib
import os
import shutil

import numpy as np
import tensorflow.compat.v1 as tf
from tqdm import tqdm

from bn_tf1.formats.tfrecords import framed, list_frames
from bn_tf1.jobs.data.encoded_images import why_not_decodable
from bn_tf1.jobs.data.image_folders import open_folder
from bn_tf1.jobs.data.record_shards import (
    CLASS_NAMES_FILE,
    INDEX_FILE,
    Features,
    write_index,
)
from bn_tf1.jobs.data.streamed import undecodable
from bn_tf1.jobs.saving import durable_files


def make_records(
    folder: str, destination: str, *, test_share: float, seed: int, shard_bytes: int
) -> dict[str, int]:
    """Writes the images of `folder` to `destination`.

    Args:
        folder: as for `image_folders.open_folder`.
        destination: a folder that does not exist yet.
        test_share, seed: as for `open_folder`.
        shard_bytes: about the size of a shard.

    Returns:
        The number of examples of each split.

    Raises:
        DataFileError: an image cannot be decoded, or `folder` is not such a folder.
        ValueError: `destination` exists.
    """
    # Before a day of reading: and a run may be training on what is there.
    if os.path.exists(destination):
        raise ValueError(
            f"{destination} exists already, and nothing is written over it: choose "
            "another name, or remove it"
        )
    partial = destination.rstrip("/\\") + durable_files.PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        counts = {}
        for split in ("train", "test"):
            opened = open_folder(folder, split, test_share=test_share, seed=seed)
            counts[split] = _write_split(opened.source, partial, split, shard_bytes)
        with open(
            os.path.join(partial, CLASS_NAMES_FILE), "w", encoding="utf-8"
        ) as file:
            file.writelines(f"{name}\n" for name in opened.class_names)
        # Under its name the folder is whole, also after a loss of power.
        for name in os.listdir(partial):
            durable_files.sync(os.path.join(partial, name))
        os.rename(partial, destination)
        durable_files.sync(os.path.dirname(os.path.abspath(destination)))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def _write_split(source, folder, split, shard_bytes):
    num_examples = int(source.block_ends[-1])
    starts = np.concatenate([[0], source.block_ends[:-1]])
    blocks = np.arange(len(starts))
    if split == "train":
        blocks = np.random.RandomState(0).permutation(blocks)
    paths: list[str] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=num_examples, unit=" images", desc=f"writing {split}")
        )
        file = None
        for block in blocks:
            for read in source.read_block(int(block)):
                if file is None or file.tell() >= shard_bytes:
                    if file is not None:
                        file.close()  # not all at the end: there may be thousands
                    path = os.path.join(folder, f"{split}-{len(paths):05d}")
                    paths.append(path)
                    file = stack.enter_context(open(path, "wb"))
                file.write(framed(_serialised(read())))
                progress.update()
    # How many there are is known at the end only, and each name tells it.
    final = [f"{path}-of-{len(paths):05d}" for path in paths]
    for path, name in zip(paths, final):
        os.rename(path, name)
    sizes = np.array([os.path.getsize(path) for path in final], np.int64)
    index = os.path.join(folder, INDEX_FILE.format(split=split))
    write_index(index, final, sizes, [list_frames(path) for path in final])
    return num_examples


def _serialised(example):
    # Here, once, and not in each epoch of each run.
    problem = why_not_decodable(example.encoded)
    if problem is not None:
        raise undecodable(example, problem)
    names, name = Features(), os.path.basename(example.place)
    features = {
        names.image: _bytes(example.encoded),
        names.label: tf.train.Feature(
            int64_list=tf.train.Int64List(value=[example.label])
        ),
        # Nobody here reads it; it is what slim's ImageNet has for people who look.
        "image/filename": _bytes(os.fsencode(name)),
    }
    features = tf.train.Features(feature=features)
    return tf.train.Example(features=features).SerializeToString()


def _bytes(value):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
