"""Small batches made of a large one, each normalised by itself.

Contract: with B examples and ghost batches of n, example i belongs to ghost batch
i mod (B / n). This is how `tf.layers` groups them: `x` is reshaped to
[n, B / n, ...], and everything but the second axis and the channels is reduced.

What follows the moving averages is the mean of the ghost batches' statistics: one
update a step. (Algorithm 1 of the paper makes one for each ghost batch, one after the
other, which forgets the past B / n times as fast.)

Source: Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017
(arXiv:1705.08741), algorithm 1.
"""

from __future__ import annotations

import tensorflow.compat.v1 as tf


def split_ghost_batches(x: tf.Tensor, size: int, *, layer: str) -> tf.Tensor:
    """`x`, [B, ...], as [size, B / size, ...].

    Raises:
        ValueError: B is known and `size` does not divide it.
        tf.errors.InvalidArgumentError: the same at run time, where B was not known.
    """
    problem = f"`ghost_batch_size` must divide the training batch of layer {layer!r}"
    batch = tf.dimension_value(x.shape[0])
    # A last, smaller batch of an epoch is the usual case: the error names both sizes.
    if batch is None:
        examples = tf.shape(x)[0]
        divides = tf.equal(examples % size, 0)
        message = [problem + "; its size and the batch's:", size, examples]
        with tf.control_dependencies([tf.Assert(divides, message)]):
            x = tf.identity(x)
    elif batch % size:
        raise ValueError(
            f"{problem}, but is {size}, and the batch has {batch} examples: change "
            "either, or use is_training=False"
        )
    # The examples of a ghost batch lie `ghosts` apart, as in `tf.layers`: a model that was
    # trained there sees the same groups.
    rest = tf.shape(x)[1:]
    split = tf.reshape(x, tf.concat([[size, -1], rest], 0))
    ghosts = None if batch is None else batch // size
    split.set_shape(tf.TensorShape([size, ghosts]).concatenate(x.shape[1:]))
    return split


def join_ghost_batches(split: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The inverse of `split_ghost_batches`, for the `x` that it split."""
    joined = tf.reshape(split, tf.shape(like))
    joined.set_shape(like.shape)
    return joined
