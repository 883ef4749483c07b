"""Data sets that do not fit in memory: read, decoded and augmented while they are used.

Contract: every training batch is a function of (seed, step), as in `datasets`. The order
of an epoch is a function of (seed, epoch): blocks of neighbouring examples in permuted
order, shuffled within each. In memory are the encoded examples of three batches; a run
that resumes reads those that it needs, and none before them. A worker reads and decodes
its rows of each batch, and what becomes of an example does not depend on the others.

An example that cannot be used (a damaged record, an image that does not decode, a label
out of range) is an error that names its file, or, up to a limit, is left out: the next
example of the epoch's order takes its place, so that a batch stays a function of its step.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import first_line
from bn_tf1.formats.tfrecords import RecordError
from bn_tf1.jobs.data import encoded_images
from bn_tf1.jobs.data.encoded_images import is_stored_rotated, why_not_decodable
from bn_tf1.jobs.data.idx_and_cifar import DataFileError

# Functions of a data set are graphs already; TensorFlow 1.14 has no name for this.
do_not_convert = getattr(
    tf.autograph.experimental, "do_not_convert", lambda function: function
)
_AUTOTUNE = tf.data.experimental.AUTOTUNE
# Batches that may be under way to a step, and some more: what fails is among them.
_UNDER_WAY = 8
_ENDLESS = np.iinfo(np.int64).max


class Example(NamedTuple):
    """One example as it is stored.

    Attributes:
        encoded: the bytes of a JPEG or PNG.
        label: int, as it is stored.
        place: the file, and the record if it has several.
    """

    encoded: bytes
    label: int
    place: str


def undecodable(example: Example, problem: str) -> DataFileError:
    """The error for an example whose image cannot be decoded."""
    return DataFileError(f"{example.place}: the image cannot be decoded: {problem}")


class ExampleSource(NamedTuple):
    """Where the examples of one split are.

    Attributes:
        block_ends: int64 [blocks], how many examples there are up to the end of each
            block; block b holds those from block_ends[b - 1] on.
        read_block: read_block(b) is a list of functions that read an `Example`, or
            raise a `RecordError` or `DataFileError` for this one alone.
        digest: SHA-256, in hexadecimal, of what tells that the files are the same: their
            names and sizes.
    """

    block_ends: np.ndarray
    read_block: Callable[[int], Sequence[Callable[[], Example]]]
    digest: str


class StreamedDataset(NamedTuple):
    """One split of a data set that is read while it is used.

    Attributes:
        name, split, image_shape, num_classes, mirrors, class_names, max_pixel: as those
            of `datasets.ImageDataset`.
        source: where the examples are.
        augments_photos: whether training takes random crops, and evaluation the centre.
        max_bad_examples: how many examples that cannot be used are left out; one more
            is an error.
        failures: what ended the stream; TensorFlow makes its own error of it.
        recent: functions that read the examples that went into the stream last.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mirrors: bool
    class_names: tuple[str, ...]
    source: ExampleSource
    augments_photos: bool
    max_bad_examples: int
    failures: list[DataFileError]
    recent: collections.deque[Callable[[], Example]]
    max_pixel: int = 255

    @property
    def num_examples(self) -> int:
        """Bad ones included: how many can be used is known at the end of an epoch."""
        return int(self.source.block_ends[-1])

    @contextlib.contextmanager
    def failures_named(self) -> Iterator[None]:
        """Raises what ended the stream in the place of TensorFlow's error for it."""
        # What a function of Python's raises becomes an error of TensorFlow's without a type,
        # and its decoders do not say which image of a batch it was.
        try:
            yield
        except tf.errors.OpError as error:
            failure = self.failures[-1] if self.failures else None
            if failure is None and isinstance(error, tf.errors.InvalidArgumentError):
                failure = _first_undecodable(tuple(self.recent))
            if failure is None:
                raise
            raise failure from error


def training_batches(
    dataset: StreamedDataset,
    batch_size: int,
    *,
    seed: int,
    first_step: tf.Tensor,
    augment: bool,
    padding: int,
    rows: tuple[int, int],
) -> tf.data.Dataset:
    """The endless stream of training batches; as `datasets.training_batches`.

    Args:
        padding: the most pixels that images are moved by, where no crops are taken.
        rows: (first, end) of the examples of each batch that are read and decoded.
    """
    reader = _Reader(dataset, functools.partial(_permuted, dataset.source, seed))
    size = dataset.image_shape[0]
    count = rows[1] - rows[0]

    @do_not_convert
    def decode(encoded, label, position):
        if not augment:
            return _decode_as_evaluated(dataset, encoded), label
        # By the example's own place in the stream: not by its batch, which a worker shares.
        pair = tf.stack([tf.constant(seed, tf.int64), position])
        if dataset.augments_photos:
            image = encoded_images.decode_random_crop(encoded, size, pair)
        else:
            image = encoded_images.decode_shifted(encoded, size, pair, padding=padding)
        return image, label

    # Of whole steps and not of examples: a call of Python costs more than a record.
    steps = tf.data.Dataset.range(tf.cast(first_step, tf.int64), _ENDLESS)
    examples = _examples(reader, steps, batch_size, rows).map(decode, _AUTOTUNE)
    return examples.batch(count, drop_remainder=True)


def evaluation_batches(dataset: StreamedDataset, batch_size: int) -> tf.data.Dataset:
    """The finite stream of all examples in the order of the source."""
    # In the order of the source, in which files are read from front to back.
    reader = _Reader(dataset, lambda epoch: np.arange(dataset.num_examples))

    @do_not_convert
    def decode(encoded, label, position):
        return _decode_as_evaluated(dataset, encoded), label

    steps = tf.data.Dataset.range(-(-dataset.num_examples // batch_size))
    rows = (0, batch_size)
    return (
        _examples(reader, steps, batch_size, rows, once=True)
        .map(decode, _AUTOTUNE)
        .batch(batch_size)
    )


@do_not_convert
def _decode_as_evaluated(dataset, encoded):
    """What `eval.py` sees, and so what statistics and accuracies are of."""
    decode_image = encoded_images.decode_resized
    if dataset.augments_photos:
        decode_image = encoded_images.decode_centre
    return decode_image(encoded, dataset.image_shape[0])


def _examples(reader, steps, batch_size, rows, once=False):
    """A data set of (encoded, label, position), one for each example."""

    @do_not_convert
    def read(step):
        encoded, labels, positions = tf.numpy_function(
            functools.partial(
                reader.batch, batch_size=batch_size, rows=rows, once=once
            ),
            [step],
            (tf.string, tf.int32, tf.int64),
        )
        for values in (encoded, labels, positions):
            values.set_shape([None])  # which a function of Python's does not tell
        return tf.data.Dataset.from_tensor_slices((encoded, labels, positions))

    return steps.flat_map(read).prefetch(2 * (rows[1] - rows[0]))


def _permuted(source, seed, epoch):
    """The examples of an epoch, in its order: int64 [num_examples]."""
    # The legacy generator's numbers are the same in every version of NumPy.
    random = np.random.RandomState([seed % 2**32, seed >> 32, epoch % 2**32])
    ends = source.block_ends
    starts = np.concatenate([[0], ends[:-1]])
    # Blocks, and examples within each: an order of all would seek for every record.
    order = random.permutation(len(ends))
    return np.concatenate(
        [starts[b] + random.permutation(ends[b] - starts[b]) for b in order]
    )


class _TrialDecoder:
    """Tells of one image after the other what keeps TensorFlow from decoding it."""

    def __init__(self):
        with tf.Graph().as_default() as graph:
            self._encoded = tf.placeholder(tf.string, [])
            self._image = tf.image.decode_png(self._encoded, channels=3).op
        self._session = tf.Session(graph=graph)

    def why_not_decodable(self, encoded):
        try:
            self._session.run(self._image, {self._encoded: encoded})
        except tf.errors.InvalidArgumentError as error:
            return f"TensorFlow says: {first_line(error)}"
        return None


def _first_undecodable(readers):
    """An error that names the first example that TensorFlow cannot decode, or None."""
    trial = _TrialDecoder()
    for read in readers:
        example = read()
        problem = trial.why_not_decodable(example.encoded)
        if problem is not None:
            advice = "replace or remove it, or leave it out by --max_bad_examples"
            return undecodable(example, f"{problem}; {advice}")
    return None


class _Reader:
    """Reads the examples of a step; keeps open the blocks that the last one needed."""

    def __init__(self, dataset, order_of):
        self._dataset = dataset
        # Of two: a batch may span two epochs.
        self._order_of = functools.lru_cache(maxsize=2)(order_of)
        self._blocks: dict[int, Any] = {}
        self._left_out: set[int] = set()
        # Costs as much as decoding: for those who have such images.
        self._trial = _TrialDecoder() if dataset.max_bad_examples else None
        self._has_told_of_rotation = False
        # TensorFlow calls it from whichever of its threads is free.
        self._lock = threading.Lock()

    def batch(self, step, *, batch_size, rows, once):
        """(encoded, labels, positions) of the given rows of one step."""
        with self._lock:
            first, last = (int(step) * batch_size + row for row in rows)
            if once:
                last = min(last, self._dataset.num_examples)
            needed: dict[int, Any] = {}
            found = [
                self._at(position, needed, once) for position in range(first, last)
            ]
            self._blocks = needed
            # Readers and no bytes: it is all that a failure needs, and costs nothing.
            recent = self._dataset.recent
            while len(recent) > _UNDER_WAY * (last - first):
                recent.popleft()
        found = [example for example in found if example is not None]
        return (
            np.array([example.encoded for example in found], object),
            np.array([example.label for example in found], np.int32),
            np.arange(first, last)[: len(found)],
        )

    def _at(self, position, needed, once):
        """The example at a place of the endless order, or the next that can be used."""
        num_examples = self._dataset.num_examples
        while True:
            epoch, rank = divmod(position, num_examples)
            number = int(self._order_of(epoch)[rank])
            example = self._usable(number, needed)
            if example is not None or once:
                return example
            position += 1  # which is taken again at its own place

    def _usable(self, number, needed):
        ends = self._dataset.source.block_ends
        block = int(np.searchsorted(ends, number, side="right"))
        if block not in needed:
            kept = self._blocks.get(block)
            needed[block] = kept or self._dataset.source.read_block(block)
        start = int(ends[block - 1]) if block else 0
        read = needed[block][number - start]
        try:
            example = read()
            self._tell_of_rotation(example)
            self._check(example)
        except (RecordError, DataFileError) as error:
            self._leave_out(number, error)
            return None
        self._dataset.recent.append(read)
        return example

    def _check(self, example):
        problem = why_not_decodable(example.encoded)
        if problem is None and self._trial is not None:
            problem = self._trial.why_not_decodable(example.encoded)
        if problem is not None:
            raise undecodable(example, problem)
        num_classes = self._dataset.num_classes
        if not 0 <= example.label < num_classes:
            raise DataFileError(
                f"{example.place}: the label is {example.label}, but must lie in "
                f"[0, {num_classes})"
            )

    def _tell_of_rotation(self, example):
        if self._has_told_of_rotation or not is_stored_rotated(example.encoded):
            return
        self._has_told_of_rotation = True
        print(
            f"note: {example.place} is stored rotated (EXIF orientation), and used as it "
            "is stored; there may be others",
            file=sys.stderr,
        )

    def _leave_out(self, number, error):
        is_known = number in self._left_out
        self._left_out.add(number)
        limit, count = self._dataset.max_bad_examples, len(self._left_out)
        why = None
        if count > limit:
            why = f"{count} examples that cannot be used are more than "
            why += f"--max_bad_examples={limit}"
        elif count == self._dataset.num_examples:
            # The search for one in its place would never end.
            why = f"none of all {count} examples can be used"
        if why is not None:
            failure = DataFileError(f"{error}; {why}")
            self._dataset.failures.append(failure)
            raise failure from error
        if not is_known:
            print(f"left out: {error}", file=sys.stderr)
