"""Image data sets as tf.data pipelines that resume at any step.

Training: every batch is a pure function of (seed, step). The iterator is initialised
after the global step was restored, and a job that was stopped goes on with exactly the
batches that it would have seen; nothing needs to be saved for it. The numbers
are the same on TensorFlow 1.15 and 2.21. An epoch holds every example once, and a
batch may span two epochs, so that each is full.

Evaluation: every example once, in file order; the last batch may be smaller.

The files are checked completely (see `idx_and_cifar`) before a graph is built. The
graph then reads them itself when the iterator is initialised, so no pixel ends up in
the GraphDef.

Source: the pad-crop-flip augmentation is that of He et al., "Deep Residual Learning
for Image Recognition", 2015 (arXiv:1512.03385), section 4.2.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import pathlib
from typing import Iterator, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs.choices import DATASETS, STREAMED
from bn_tf1.jobs.data import idx_and_cifar, image_folders, record_shards, streamed
from bn_tf1.jobs.data.encoded_images import random_integers
from bn_tf1.jobs.data.streamed import StreamedDataset, do_not_convert

SPLITS = ("train", "test")

_IDX_PREFIXES = {"train": "train", "test": "t10k"}
# Where the random numbers of "synthetic" begin, far from those of epochs and steps.
_SYNTHETIC_STREAM = 2**62
_ENDLESS = np.iinfo(np.int64).max


class SyntheticImages(NamedTuple):
    """What the data set "synthetic" consists of.

    Each class is a coarse random pattern, equal to its mirror image; an example is the
    pattern of its class plus as much uniform noise. Both splits share the patterns.

    Attributes:
        image_size: height and width in pixels.
        channels: a count.
        num_classes: a count; example i belongs to class i % num_classes.
        num_examples: in each split.
        seed: determines patterns and noise.
    """

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    num_examples: int = 1024
    seed: int = 0


class ImageDataset(NamedTuple):
    """One split of a data set whose files have been checked.

    Attributes:
        name: one of `DATASETS`.
        split: "train" or "test".
        image_shape: (height, width, channels).
        num_classes, num_examples: counts.
        max_pixel: the stored value that becomes 1.0.
        mirrors: whether a mirrored image keeps its class.
        files: what was checked; empty for "synthetic".
        synthetic: for "synthetic", else None.
        class_names: of each class, or () where nobody knows them.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_examples: int
    max_pixel: int
    mirrors: bool
    files: tuple[idx_and_cifar.CheckedFile, ...]
    synthetic: SyntheticImages | None = None
    class_names: tuple[str, ...] = ()

    @contextlib.contextmanager
    def failures_named(self) -> Iterator[None]:
        """What is in memory was checked: it cannot fail as `StreamedDataset` can."""
        yield


class _IdxFormat(NamedTuple):
    """A data set of ten classes in the format and with the file names of MNIST."""

    image_size: int
    max_pixel: int
    mirrors: bool

    def open(self, name, split, folder):
        size, max_pixel = self.image_size, self.max_pixel
        files = idx_and_cifar.check_idx_pair(
            folder,
            _IDX_PREFIXES[split],
            image_size=(size, size),
            num_classes=10,
            max_pixel=max_pixel,
        )
        shape, count = (size, size, 1), files[0].num_examples
        return ImageDataset(
            name, split, shape, 10, count, max_pixel, mirrors=self.mirrors, files=files
        )

    def load(self, dataset):
        pixels, labels = [_file_bytes(file) for file in dataset.files]
        shape = (dataset.num_examples,) + dataset.image_shape
        return tf.reshape(pixels, shape), tf.reshape(labels, shape[:1])

    def expected_files(self, split):
        prefix = _IDX_PREFIXES[split]
        return f"{prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte"


class _CifarFormat(NamedTuple):
    """A data set in the binary format of CIFAR; its last label byte is the class."""

    subfolder: str
    train_names: tuple[str, ...]
    test_names: tuple[str, ...]
    label_limits: tuple[int, ...]

    def open(self, name, split, folder):
        check = functools.partial(
            idx_and_cifar.check_cifar,
            subfolder=self.subfolder,
            label_limits=self.label_limits,
        )
        files = tuple(check(folder, file_name) for file_name in self._names(split))
        shape, count = (32, 32, 3), sum(file.num_examples for file in files)
        num_classes = self.label_limits[-1]
        return ImageDataset(
            name, split, shape, num_classes, count, 255, mirrors=True, files=files
        )

    def load(self, dataset):
        num_labels = len(self.label_limits)
        record_bytes = num_labels + idx_and_cifar.CIFAR_IMAGE_BYTES
        content = tf.concat([_file_bytes(file) for file in dataset.files], axis=0)
        records = tf.reshape(content, [dataset.num_examples, record_bytes])
        planes = tf.reshape(records[:, num_labels:], [-1, 3, 32, 32])
        return tf.transpose(planes, [0, 2, 3, 1]), records[:, num_labels - 1]

    def expected_files(self, split):
        return f"{', '.join(self._names(split))} (also in {self.subfolder}/)"

    def _names(self, split):
        return self.train_names if split == "train" else self.test_names


# A digit in a mirror is no digit, a shoe is a shoe. Those of 8x8 have 17 levels of grey.
_FORMATS = {
    "digits": _IdxFormat(image_size=8, max_pixel=16, mirrors=False),
    "mnist": _IdxFormat(image_size=28, max_pixel=255, mirrors=False),
    "fashion_mnist": _IdxFormat(image_size=28, max_pixel=255, mirrors=True),
    "cifar10": _CifarFormat(
        subfolder="cifar-10-batches-bin",
        train_names=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test_names=("test_batch.bin",),
        label_limits=(10,),
    ),
    "cifar100": _CifarFormat(
        subfolder="cifar-100-binary",
        train_names=("train.bin",),
        test_names=("test.bin",),
        label_limits=(20, 100),
    ),
}


class Streaming(NamedTuple):
    """How the data sets that do not fit in memory are read; see `streamed`.

    Attributes:
        image_size: height and width that images get, in pixels.
        augments_photos: whether training takes crops of random area and aspect, and
            evaluation the centre.
        max_bad_examples: how many examples that cannot be used are left out.
        test_share: of an image folder without a folder for tests.
        seed: which images that share is.
        features: of records.
        num_classes: of records; None where a labels.txt beside them tells.
        index_folder: where the places of records are kept.
    """

    image_size: int = 224
    augments_photos: bool = False
    max_bad_examples: int = 0
    test_share: float = 0.1
    seed: int = 0
    features: record_shards.Features = record_shards.Features()
    num_classes: int | None = None
    index_folder: str = "."


def open_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    synthetic: SyntheticImages | None = None,
    streaming: Streaming | None = None,
) -> ImageDataset | StreamedDataset:
    """Checks the files of one split and describes it.

    What fits in memory is checked completely; what is streamed, when it is used.

    Args:
        name: one of `DATASETS`.
        split: "train" or "test".
        data_dir: the folder of the files. "digits" has its own and needs none;
            "synthetic" has no files and ignores it.
        synthetic: for "synthetic" only; None is its defaults.
        streaming: for those of `STREAMED` only; None is its defaults.

    Returns:
        An `ImageDataset`, or a `StreamedDataset` for those of `STREAMED`.

    Raises:
        ValueError: `name`, `split` or `synthetic` is not valid, or `data_dir` is needed
            and not given.
        idx_and_cifar.DataFileError: a ValueError; a file is missing or damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"`name` is {name!r}, but must be one of {DATASETS}")
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {SPLITS}")
    if name == "synthetic":
        return _describe_synthetic(split, synthetic or SyntheticImages())
    # A copy may lie elsewhere, where the package was installed without its checkout.
    if name == "digits" and data_dir is None:
        data_dir = _embedded_digits()
    if not data_dir:
        raise ValueError(
            f"--data_dir is missing, but the data set {name!r} has files: give "
            f"--data_dir=FOLDER with {_expected_files(name, split)}"
        )
    folder = os.fspath(data_dir)
    if name in STREAMED:
        return _open_streamed(name, split, folder, streaming or Streaming())
    return _FORMATS[name].open(name, split, folder)


def _expected_files(name, split):
    if name == "images":
        return "train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg"
    if name == "tfrecord":
        return " or ".join(f"{prefix}-*" for prefix in record_shards.PREFIXES[split])
    return _FORMATS[name].expected_files(split)


def _open_streamed(name, split, folder, options):
    if name == "images":
        class_names, source = image_folders.open_folder(
            folder, split, test_share=options.test_share, seed=options.seed
        )
        num_classes = len(class_names)
    else:
        features, index_folder = options.features, options.index_folder
        source = record_shards.open_shards(
            folder, split, features=features, index_folder=index_folder
        )
        class_names = record_shards.read_class_names(folder)
        num_classes = options.num_classes or len(class_names)
        if not num_classes:
            raise ValueError(
                f"{folder} has no {record_shards.CLASS_NAMES_FILE}, so that "
                "--record_classes must say how many classes there are"
            )
    return StreamedDataset(
        name=name,
        split=split,
        image_shape=(options.image_size, options.image_size, 3),
        num_classes=num_classes,
        mirrors=True,
        class_names=class_names,
        source=source,
        augments_photos=options.augments_photos,
        max_bad_examples=options.max_bad_examples,
        failures=[],
        recent=collections.deque(),
    )


def checksum(*splits: ImageDataset | StreamedDataset) -> str:
    """What tells that the data of a run are the same when it is resumed.

    A SHA-256 in hexadecimal, of all content, or of the names and sizes of what is
    streamed; "" where there are no files. Raises DataFileError for a file that has become
    unreadable since it was checked.
    """
    # Names and sizes take no time; to read 140 GB would take minutes at each start.
    if any(isinstance(split, StreamedDataset) for split in splits):
        digests = "".join(split.source.digest for split in splits)
        return hashlib.sha256(digests.encode()).hexdigest()
    return idx_and_cifar.checksum(file for split in splits for file in split.files)


def training_batches(
    dataset: ImageDataset | StreamedDataset,
    batch_size: int,
    *,
    seed: int,
    first_step: int | tf.Tensor | tf.Variable,
    augment: bool = False,
    augment_padding: int | None = None,
    rows: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Builds the endless stream of training batches, beginning with one step's.

    The examples come in the order of one permutation after the other, each a function
    of (seed, epoch). Step s takes those at [s * batch_size, (s + 1) * batch_size).

    Args:
        dataset: the data set.
        batch_size: at least 1; may exceed the number of examples.
        seed: an integer of 64 bits.
        first_step: an integer or a scalar, normally the global step; evaluated when the
            iterator is initialised, hence after it was restored.
        augment: whether to pad, crop at random, and mirror at random where
            `dataset.mirrors`.
        augment_padding: pixels of zeros on each side before the crop; None is an eighth
            of the height (4 for 32x32, 1 for 8x8).
        rows: (first, end) of the examples of each batch that are wanted, for one of
            several workers; the same as they are in the whole batch.

    Returns:
        A tf.data.Dataset of (images, labels): float32 [batch_size, height, width,
        channels] in [0, 1] and int32 [batch_size]. Shapes are static.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_at_least("batch_size", batch_size, 1)
    if augment_padding is None:
        augment_padding = dataset.image_shape[0] // 8
    _check_at_least("augment_padding", augment_padding, 0)
    if isinstance(first_step, (int, np.integer)):
        _check_at_least("first_step", first_step, 0)
    first_step = tf.cast(first_step, tf.int64)
    # Rows of the whole batch, so that all workers together see what one would.
    own = slice(*(rows or (0, batch_size)))

    if isinstance(dataset, StreamedDataset):
        batches = streamed.training_batches(
            dataset,
            batch_size,
            seed=seed,
            first_step=first_step,
            augment=augment,
            padding=augment_padding,
            rows=(own.start, own.stop),
        )
        return _ready_ahead(batches)
    pixels, labels = _load(dataset)

    @do_not_convert
    def make_batch(step, indices):
        indices = indices[own]
        # A batch at once: for small images the calls of operations cost more than the work.
        images = tf.gather(pixels, indices)
        if augment:
            images = _pad_crop_flip(
                images,
                batch_size,
                own,
                # The epochs use (seed, 0, 1, ...): the steps count down from -1.
                seed=_seed_pair(seed, -1 - step),
                padding=augment_padding,
                mirrors=dataset.mirrors,
            )
        return _scale(images, dataset.max_pixel), tf.gather(labels, indices)

    steps = tf.data.Dataset.range(first_step, _ENDLESS)
    indices = _training_indices(dataset.num_examples, batch_size, seed, first_step)
    batches = tf.data.Dataset.zip((steps, indices))
    return _ready_ahead(batches.map(make_batch, num_parallel_calls=2))


def evaluation_batches(
    dataset: ImageDataset | StreamedDataset, batch_size: int
) -> tf.data.Dataset:
    """Builds the finite stream of all examples in file order.

    Args:
        dataset: the data set.
        batch_size: at least 1, else a ValueError; the last batch holds what is left.

    Returns:
        A tf.data.Dataset of (images, labels): float32 [<= batch_size, height, width,
        channels] in [0, 1] and int32 [<= batch_size]. The first size is not static.
    """
    _check_at_least("batch_size", batch_size, 1)
    if isinstance(dataset, StreamedDataset):
        return _ready_ahead(streamed.evaluation_batches(dataset, batch_size))
    pixels, labels = _load(dataset)

    @do_not_convert
    def make_batch(start):
        images = pixels[start : start + batch_size]
        return _scale(images, dataset.max_pixel), labels[start : start + batch_size]

    starts = tf.data.Dataset.range(0, dataset.num_examples, batch_size)
    return _ready_ahead(starts.map(make_batch, num_parallel_calls=2))


def _embedded_digits():
    """The folder data/digits of the checkout that this module is part of."""
    module = os.path.abspath(__file__)  # bn_tf1/jobs/data/datasets.py
    folder = str(pathlib.Path(module).parents[3] / "data" / "digits")
    if not os.path.isdir(folder):
        raise idx_and_cifar.DataFileError(
            f"{folder}: expected the data set 'digits' of a checkout of bn_tf1, found "
            "no such folder; give --data_dir=FOLDER with a copy of it"
        )
    return folder


def _describe_synthetic(split, synthetic):
    for field in ("image_size", "channels", "num_classes", "num_examples"):
        _check_at_least("synthetic." + field, getattr(synthetic, field), 1)
    size, channels, num_classes, count, _ = synthetic
    num_values = count * size**2 * channels
    # The tensor of all pixels, which a data set of files would have, too.
    if num_values > idx_and_cifar.MAX_FILE_BYTES:
        raise ValueError(
            f"--synthetic_examples={count} images of --synthetic_size={size} with "
            f"--synthetic_channels={channels} are {num_values} bytes of pixels, "
            f"but may be at most {idx_and_cifar.MAX_FILE_BYTES}: take fewer or smaller ones"
        )
    return ImageDataset(
        name="synthetic",
        split=split,
        image_shape=(size, size, channels),
        num_classes=num_classes,
        num_examples=count,
        max_pixel=255,
        mirrors=True,
        files=(),
        synthetic=synthetic,
    )


def _check_at_least(name, value, minimum):
    if value < minimum:
        raise ValueError(f"`{name}` is {value}, but must be at least {minimum}")


def _load(dataset):
    """All pixels, uint8 [n, height, width, channels], and labels, int32 [n]."""
    # Accelerators have no use for the raw data: it stays on the host of the iterator.
    with tf.device("/cpu:0"), tf.name_scope(f"load_{dataset.name}"):
        if dataset.synthetic is not None:
            pixels, labels = _make_synthetic(dataset)
        else:
            pixels, labels = _FORMATS[dataset.name].load(dataset)
        return pixels, tf.cast(labels, tf.int32)


def _file_bytes(file):
    """The examples of a `CheckedFile`, without its header, as uint8 [k]."""
    content = tf.io.read_file(file.path)
    if file.is_gzip:
        content = tf.io.decode_compressed(content, compression_type="GZIP")
    return tf.io.decode_raw(content, tf.uint8)[file.header_bytes :]


def _make_synthetic(dataset):
    """The examples of a `SyntheticImages`: uint8 pixels and int64 labels."""
    size, channels = dataset.image_shape[1:]
    spec = dataset.synthetic
    labels = tf.range(spec.num_examples, dtype=tf.int64) % spec.num_classes
    # 4x4 cells, of which the right half mirrors the left one.
    cells = np.arange(size) * 4 // size
    mirrored_cells = np.minimum(cells, cells[::-1])
    levels = _random_levels(
        [spec.num_classes, 4, 4, channels], spec.seed, stream=_SYNTHETIC_STREAM
    )
    patterns = tf.gather(tf.gather(levels, cells, axis=1), mirrored_cells, axis=2)
    noise = _random_levels(
        [spec.num_examples, size, size, channels],
        spec.seed,
        stream=_SYNTHETIC_STREAM + 1 + SPLITS.index(dataset.split),
    )
    return tf.gather(patterns, labels) + noise, labels


def _random_levels(shape, seed, *, stream):
    """Uniform uint8 values in [0, 128), so that two of them can be added."""
    levels = tf.random.stateless_uniform(
        shape, seed=_seed_pair(seed, stream), minval=0, maxval=128, dtype=tf.int32
    )
    return tf.cast(levels, tf.uint8)


def _seed_pair(seed, counter):
    """The int64 [2] seed of one draw of the stateless random operations."""
    return tf.stack([tf.constant(seed, tf.int64), tf.cast(counter, tf.int64)])


def _training_indices(num_examples, batch_size, seed, first_step):
    """The endless data set of int32 [batch_size] example indices from a step on."""
    first_position = first_step * batch_size

    @do_not_convert
    def positions_of_epoch(epoch):
        # tf.random.shuffle keeps a state: its order cannot be made again from an epoch.
        ranks = random_integers([num_examples], _seed_pair(seed, epoch))
        # Slicing instead of Dataset.skip: TensorFlow removes a skip of nothing from
        # the graph, and the saved state of an iterator then fits no longer.
        used = tf.maximum(first_position - epoch * num_examples, 0)
        return tf.data.Dataset.from_tensor_slices(tf.argsort(ranks)[used:])

    epochs = tf.data.Dataset.range(first_position // num_examples, _ENDLESS)
    return epochs.flat_map(positions_of_epoch).batch(batch_size, drop_remainder=True)


def _ready_ahead(batches):
    """Computes batches in the background, two ahead, from the graph as it is built."""
    # Of the rewrites that this turns off none applies here; TensorFlow 1.15 would copy
    # all pixels for them, and warn where the global step is a reference variable.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    return batches.prefetch(2).with_options(options)


def _pad_crop_flip(images, count, part, *, seed, padding, mirrors):
    """Cuts every image at a random place out of its zero-padded self; half are mirrored.

    `images`, of a static shape, are the `part` of a batch of `count`: each image is treated
    as it is in the whole batch.
    """
    batch, height, width, channels = images.shape.as_list()
    draws = random_integers([3, count, 1, 1], seed)[:, part]
    columns = tf.range(width)
    if mirrors:
        columns += draws[2] % 2 * (width - 1 - 2 * columns)
    columns += draws[1] % (2 * padding + 1) - padding
    rows = tf.range(height)[:, tf.newaxis]
    rows += draws[0] % (2 * padding + 1) - padding
    inside = tf.logical_and(_in_range(rows, height), _in_range(columns, width))
    numbers = tf.range(batch)[:, tf.newaxis, tf.newaxis]
    places = (numbers * height + rows) * width + columns
    # One black pixel behind all others stands for the padding, and the operations are
    # those without broadcasting: tf.pad and a scalar in tf.where_v2 are slow on 1.15.
    black = batch * height * width
    places = tf.where_v2(inside, places, tf.fill([batch, height, width], black))
    pixels = tf.reshape(images, [black, channels])
    pixels = tf.concat([pixels, tf.zeros([1, channels], pixels.dtype)], axis=0)
    return tf.gather(pixels, places)


def _in_range(values, limit):
    return tf.logical_and(values >= 0, values < limit)


def _scale(pixels, max_pixel):
    """float32 values in [0, 1]."""
    # A product: a graph optimizer may turn a quotient into it, and round otherwise.
    return tf.cast(pixels, tf.float32) * np.float32(1 / max_pixel)
