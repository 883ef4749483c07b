"""Folders of images: train/<class>/*.jpg and test/<class>/*.jpg, or one folder to split.

Contract: the names tell everything; no image is opened before it is used, so that a start
takes as long as listing the folders. Classes are numbered in the order of their names, the
same in both splits. Files that are no images (.txt, Thumbs.db, what begins with a dot) are
passed over. Without train/ and test/ each image belongs to the test split by a hash of the
seed and its name, so that new images move no old one.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import numpy as np

from bn_tf1.jobs.data.encoded_images import EXTENSIONS
from bn_tf1.jobs.data.idx_and_cifar import DataFileError, unreadable_named
from bn_tf1.jobs.data.streamed import Example, ExampleSource

TEST_FOLDERS = ("test", "validation", "val")
# Files that are read one after the other; so many are in memory.
_BLOCK_EXAMPLES = 64


class ImageFolder(NamedTuple):
    """One split of a folder of images.

    Attributes:
        class_names: the names of the folders, in their order.
        source: its images.
    """

    class_names: tuple[str, ...]
    source: ExampleSource


def open_folder(
    folder: str, split: str, *, test_share: float, seed: int
) -> ImageFolder:
    """Lists the images of one split.

    Args:
        folder: with train/ and test/ (or validation/, val/), or with the classes.
        split: "train" or "test".
        test_share: the share of the images that are the test split where there is no
            folder of it.
        seed: which ones those are.

    Raises:
        DataFileError: a folder or all images of a class are missing, or the classes of
            the two splits differ.
    """
    train = os.path.join(folder, "train")
    tests = [os.path.join(folder, name) for name in TEST_FOLDERS]
    tests = [path for path in tests if os.path.isdir(path)]
    if not os.path.isdir(train):
        if tests:
            raise DataFileError(
                f"{folder} has {os.path.basename(tests[0])}/, but no train/ beside it"
            )
        images = [
            image
            for image in _listed(folder)
            if _is_test(image, test_share, seed) == (split == "test")
        ]
        return _opened(folder, images, _class_names(folder), split)
    names = _class_names(train)
    if not tests:
        raise DataFileError(
            f"{folder} has train/, but none of {', '.join(f'{n}/' for n in TEST_FOLDERS)} "
            f"beside it; for a split by chance give --data_dir={train}"
        )
    # The other way round is nothing to refuse: of a rare class none may be for tests.
    unknown = sorted(set(_class_names(tests[0])) - set(names))
    if unknown:
        raise DataFileError(
            f"{tests[0]} has the class {unknown[0]!r}, which {train} has not"
        )
    place = train if split == "train" else tests[0]
    return _opened(place, _listed(place), names, split)


def _class_names(folder):
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataFileError(
            f"{folder}: expected a folder with one folder of images for each class: "
            f"{error.strerror}"
        ) from error
    # No .ipynb_checkpoints or .thumbnails, which programs leave beside the classes.
    names = tuple(
        entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."
    )
    if len(names) < 2:
        raise DataFileError(
            f"{folder} has {len(names)} folders, but must have one for each class, two "
            "or more, with the images in it"
        )
    return names


def _listed(folder):
    """(class name, file name) of all images, sorted."""
    images = []
    for name in _class_names(folder):
        entries = os.scandir(os.path.join(folder, name))
        found = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS)
            and not entry.name.startswith(".")
            and not entry.is_dir()  # a link to nothing is an error when it is used
        )
        if not found:
            raise DataFileError(
                f"{os.path.join(folder, name)} has no image: expected files that end in "
                f"{', '.join(EXTENSIONS)}"
            )
        images += [(name, image) for image in found]
    return images


def _is_test(image, share, seed):
    # By its name and not by its number: an image that is added moves no other one.
    digest = hashlib.sha256(
        f"{seed}/{'/'.join(image)}".encode("utf-8", "surrogateescape")
    )
    return int.from_bytes(digest.digest()[:8], "big") < share * 2.0**64


def _opened(folder, images, names, split):
    if not images:
        raise DataFileError(f"{folder} has no image for the {split} split")
    # Of the names: to read a folder of photographs would take minutes at each start.
    digest = hashlib.sha256()
    for image in images:
        digest.update("/".join(image).encode("utf-8", "surrogateescape") + b"\n")
    # Neighbours in the folder are of one class; a fixed order mixes them, so that the
    # blocks, whose members stay together, are mixtures, too.
    order = np.random.RandomState(0).permutation(len(images))
    if split == "test":
        order = np.arange(len(images))
    labels = {name: label for label, name in enumerate(names)}

    def read_block(block):
        numbers = order[block * _BLOCK_EXAMPLES : (block + 1) * _BLOCK_EXAMPLES]
        return [_Image(folder, images[n], labels[images[n][0]]) for n in numbers]

    ends = np.arange(_BLOCK_EXAMPLES, len(images) + _BLOCK_EXAMPLES, _BLOCK_EXAMPLES)
    ends = np.minimum(ends, len(images)).astype(np.int64)
    return ImageFolder(names, ExampleSource(ends, read_block, digest.hexdigest()))


class _Image(NamedTuple):
    """A function that reads an image."""

    folder: str
    names: tuple[str, str]
    label: int

    def __call__(self):
        path = os.path.join(self.folder, *self.names)
        with unreadable_named(path), open(path, "rb") as file:
            return Example(file.read(), self.label, path)
