"""Batches of a data set as arrays, for work that is not training: each example once."""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs.data.datasets import ImageDataset, training_batches


class ArrayBatches:
    """(images, labels) of the first epoch, unaugmented, as often as one iterates.

    Attributes:
        dataset: the data set.
        count: the number of examples.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, num_examples: int | None = None
    ):
        """`num_examples` is all of them by default; the last batch may be smaller."""
        self.dataset = dataset
        self.count = min(dataset.num_examples, num_examples or dataset.num_examples)
        self._size = min(batch_size, self.count)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batches = arrays_of(
            lambda: training_batches(self.dataset, self._size, seed=0, first_step=0)
        )
        with contextlib.closing(batches):
            for start in range(0, self.count, self._size):
                images, labels = next(batches)
                # The stream has no end: its batches go on into the next epoch.
                left = self.count - start
                yield images[:left], labels[:left]


def arrays_of(
    make_batches: Callable[[], tf.data.Dataset],
) -> Iterator[tuple[np.ndarray, ...]]:
    """The elements of a data set that `make_batches` makes in a graph of its own."""
    with tf.Graph().as_default() as graph:
        iterator = tf.data.make_initializable_iterator(make_batches())
        batch = iterator.get_next()
    # Between two elements the default graph and session are the caller's.
    with contextlib.closing(tf.Session(graph=graph)) as session:
        session.run(iterator.initializer)
        with contextlib.suppress(tf.errors.OutOfRangeError):
            while True:
                yield tuple(session.run(batch))
