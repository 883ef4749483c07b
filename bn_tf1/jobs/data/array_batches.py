"""Batches of a data set as arrays, for work that is not training: each example once."""

from __future__ import annotations

from typing import Iterator

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
        with tf.Graph().as_default(), tf.Session() as session:
            batches = training_batches(self.dataset, self._size, seed=0, first_step=0)
            iterator = tf.data.make_initializable_iterator(batches)
            batch = iterator.get_next()
            session.run(iterator.initializer)
            for start in range(0, self.count, self._size):
                images, labels = session.run(batch)
                left = self.count - start
                yield images[:left], labels[:left]
