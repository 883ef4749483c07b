"""One layer by itself: forward, forward and backward, inference, by shape and layout.

And with what follows it in a network: a ReLU, or a residual and a ReLU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from tests.benchmarks import peers, timing

SHAPES = {
    "NHWC 128x32x32x64": ((128, 32, 32, 64), -1),
    "NHWC 256x8x8x512": ((256, 8, 8, 512), -1),
    "NHWC 32x56x56x256": ((32, 56, 56, 256), -1),
    "NC 1024x512": ((1024, 512), -1),
    "NC 128x100": ((128, 100), -1),
    "NHWC 64x56x56x3": ((64, 56, 56, 3), -1),
    "NWC 64x128x256": ((64, 128, 256), -1),
    "NDHWC 16x8x16x16x64": ((16, 8, 16, 16, 64), -1),
    "NCHW 128x64x32x32": ((128, 64, 32, 32), 1),
    "NCHW 256x512x8x8": ((256, 512, 8, 8), 1),
    "NCW 64x256x128": ((64, 256, 128), 1),
}
QUICK = ("NHWC 128x32x32x64", "NC 1024x512", "NC 128x100", "NCHW 128x64x32x32")
TINY = {"NHWC 4x4x4x3": ((4, 4, 4, 3), -1), "NCW 4x3x5": ((4, 3, 5), 1)}
MODES = ("forward", "forward+backward", "inference")


class Follower(NamedTuple):
    """What follows a layer: activation(y + residual).

    Attributes:
        activation: as for `batch_norm`.
        has_residual: whether there is a residual, of the size of the input.
    """

    activation: str | None = None
    has_residual: bool = False


NOTHING = Follower()
FOLLOWERS = {"ReLU": Follower("relu"), "residual and ReLU": Follower("relu", True)}


def measure(
    shapes, rounds: int, modes: Sequence[str] = MODES, follower: Follower = NOTHING
) -> list[timing.Row]:
    """The rows of `modes` on `shapes`, a mapping from a name to (shape, axis)."""
    found = []
    what = {own: f" with {name}" for name, own in FOLLOWERS.items()}.get(follower, "")
    for name, (shape, axis) in shapes.items():
        for mode in modes:
            with tf.Graph().as_default(), tf.Session() as session:
                contenders = peers.layers_for(shape, axis)
                if follower != NOTHING:
                    del contenders["copy"]
                calls = _calls(contenders, session, shape, axis, mode, follower)
                if importlib.util.find_spec("torch"):
                    calls["PyTorch"] = _torch(shape, axis, mode, follower)
                timings = _in_turns(calls, rounds)
            found += timing.rows(f"layer{what} {mode}, {name}", timings)
    return found


def measure_masked(shapes, rounds: int) -> list[timing.Row]:
    """As `measure`, in training, with a mask over the values."""
    return _measure_rich(
        "masked", peers.ours_masked, peers.recipe_masked, shapes, rounds
    )


def measure_ghost_batches(shapes, rounds: int) -> list[timing.Row]:
    """As `measure`, in training, in ghost batches."""
    ours, recipe = peers.ours_in_ghost_batches, peers.recipe_in_ghost_batches
    return _measure_rich("ghost-batch", ours, recipe, shapes, rounds)


def _measure_rich(what, ours, recipe, shapes, rounds):
    contenders = {peers.OURS: ours, "recipe": recipe}
    found = []
    for name, (shape, axis) in shapes.items():
        with tf.Graph().as_default(), tf.Session() as session:
            calls = _calls(contenders, session, shape, axis, "forward+backward")
            timings = _in_turns(calls, rounds)
        found += timing.rows(f"{what} layer forward+backward, {name}", timings)
    return found


def _in_turns(calls, rounds):
    # A small layer takes a millisecond, in which anything may come in between.
    return timing.in_turns(calls, rounds, calls=2, seconds=rounds / 10)


def _calls(contenders, session, shape, axis, mode, follower=NOTHING):
    x, dy, residual = (
        tf.get_variable(name, initializer=_values(shape, seed))
        for seed, name in enumerate(("x", "dy", "residual"))
    )
    residuals = [residual] if follower.has_residual else []
    fetches = {}
    for name, layer in contenders.items():
        before = len(tf.trainable_variables())
        updates_before = len(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
        y = _followed(layer, tf.identity(x), mode, axis, follower, residuals)
        fetched = [y.op]
        if mode != "inference":
            # All but the limits have two updates, of a few numbers each.
            fetched += tf.get_collection(tf.GraphKeys.UPDATE_OPS)[updates_before:]
        if mode == "forward+backward" and layer is not peers.copy:
            inputs = [x, *residuals, *tf.trainable_variables()[before:]]
            fetched += [slope.op for slope in tf.gradients(y, inputs, dy)]
        fetches[name] = fetched
    session.run(tf.global_variables_initializer())
    # The operations are fetched, not their values: nothing is copied to NumPy, and
    # nothing can be optimised away.
    return {
        name: lambda fetched=fetched: session.run(fetched)
        for name, fetched in fetches.items()
    }


def _followed(layer, x, mode, axis, follower, residuals):
    """The output of a contender, which takes what follows it where it can."""
    after = {"activation": follower.activation, "residual": None}
    if residuals:
        after["residual"] = tf.identity(residuals[0])
    if layer in peers.WITH_FOLLOWERS:
        return layer(x, mode != "inference", axis, **after)
    return statistics.activated(layer(x, mode != "inference", axis), **after)


def _values(shape, seed):
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def _torch(shape, axis, mode, follower=NOTHING):
    import torch

    torch.set_num_threads(os.cpu_count())
    channels = shape[axis]
    kinds = {4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    layer = kinds.get(len(shape), torch.nn.BatchNorm1d)(channels, eps=peers.EPSILON)
    layer.train(mode != "inference")
    tensors = [torch.from_numpy(_values(shape, seed)) for seed in range(3)]
    if axis == -1 and len(shape) > 2:
        # The same bytes, seen with the channels first: PyTorch's channels_last.
        tensors = [tensor.movedim(-1, 1) for tensor in tensors]
    x, dy, residual = tensors
    for tensor in (x, residual):
        tensor.requires_grad_(mode == "forward+backward")

    def followed():
        y = layer(x)
        y = y + residual if follower.has_residual else y
        return y if follower.activation is None else torch.relu(y)

    def call():
        if mode == "forward+backward":
            x.grad = residual.grad = None
            followed().backward(dy)
        else:
            with torch.no_grad():
                followed()

    return call
