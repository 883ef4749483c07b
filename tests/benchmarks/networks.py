"""Networks: a train step of ResNet-20 and its memory; inference of all the models.

The same network each time, with another layer in the place of `bn_tf1.batch_norm`, or
with none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import statistics
from bn_tf1.jobs import memory_allocator, models
from tests.benchmarks import peers, timing

NONE = "no batch norm"
EACH_STEP = "bn_tf1, folded in each step"
BIAS = "bias_add in its place"
LAYERS = {
    peers.OURS: None,
    NONE: None,
    "recipe": peers.recipe,
    "raw kernel": peers.raw_kernel,
}
if peers.ON_TENSORFLOW_1:
    LAYERS["tf.layers"] = peers.tf_layers
if peers.is_built():
    LAYERS[peers.COMPILED] = None
PRECISIONS = ("float32", "bfloat16")
_IN_EACH_PRECISION = (peers.OURS, peers.COMPILED, NONE, "raw kernel")


def measure_steps(
    rounds: int, precisions=PRECISIONS, *, batch=128, size=32, blocks=3
) -> list[timing.Row]:
    """A training step, in each precision; and what of it is for batch norm."""
    found = []
    for precision in precisions:
        if precision == "bfloat16" and peers.ON_TENSORFLOW_1:
            continue
        calls = {}
        for name in LAYERS:
            if precision == "float32" or name in _IN_EACH_PRECISION:
                calls[name] = train_step(name, precision, batch, size, blocks)
        if importlib.util.find_spec("torch"):
            calls["PyTorch"] = _torch_step(precision, batch, size, blocks)
        case = (
            f"ResNet-{6 * blocks + 2} step, batch {batch}, {size}x{size}, {precision}"
        )
        timings = timing.in_turns(calls, rounds, warm_up=1)
        found += timing.rows(case, timings)
        timings.pop("PyTorch", None)  # of its own, this network is no limit
        found += timing.beyond(case, timings, NONE)
    return found


def measure_inference(rounds: int, *, batch=128, size=32, blocks=3) -> list[timing.Row]:
    """Inference of each model, as `eval.py` builds it."""
    found = []
    for model in models.MODELS:
        calls = {
            name: _inference(name, model, batch, size, blocks)
            for name in (peers.OURS, EACH_STEP, NONE, BIAS, "recipe")
        }
        kind = f"ResNet-{6 * blocks + 2}" if model == "resnet" else model
        case = f"{kind} inference, batch {batch}, {size}x{size}"
        # More rounds for what takes no time: the ratios are close to 1.
        timings = timing.in_turns(calls, rounds, seconds=rounds / 5)
        found += timing.rows(case, timings)
    return found


def measure_memory(names, *, batch=128, size=32, blocks=3) -> list[timing.Row]:
    """The largest memory of a process that takes three steps, by contender."""
    found = []
    case = f"peak memory, ResNet-{6 * blocks + 2} step, batch {batch}, {size}x{size}"
    for name in names:
        arguments = [name, str(batch), str(size), str(blocks)]
        output = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.networks", *arguments],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ).stdout
        found.append(timing.Row(case, name, float(output), 0.0, "MB"))
    return found


def train_step(name: str, precision: str, batch: int, size: int, blocks: int):
    """A function that takes one step of the contender `name`."""
    with tf.Graph().as_default() as graph:
        images, labels = _data(batch, size)
        logits = _network(name, "resnet", images, True, precision, blocks)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=labels, logits=logits
        )
        optimizer = tf.train.MomentumOptimizer(0.01, 0.9)
        minimize = optimizer.minimize(tf.reduce_mean(losses))
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        initialize = tf.global_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(initialize)
    return lambda: session.run([minimize, updates])


def _inference(name, model, batch, size, blocks):
    with tf.Graph().as_default() as graph:
        images, _ = _data(batch, size)
        logits = _network(name, model, images, False, "float32", blocks)
        initialize = tf.global_variables_initializer()
        fold = tf.local_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(initialize)
    session.run(fold)
    return lambda: session.run(logits.op)


def _data(batch, size):
    rng = np.random.RandomState(0)
    images = rng.uniform(size=[batch, size, size, 3]).astype(np.float32)
    labels = rng.randint(0, 10, size=[batch]).astype(np.int32)
    return (
        tf.get_variable("images", initializer=images, trainable=False),
        tf.get_variable("labels", initializer=labels, trainable=False),
    )


def _network(name, model, images, is_training, precision, blocks):
    settings = models.Settings(
        num_classes=10,
        normalization="none" if name == NONE else "batch",
        bn_kernel="compiled" if name == peers.COMPILED else "auto",
        resnet_n=blocks,
        precision=precision,
        fold_once=name == peers.OURS,
    )
    build = models.MODELS[model]
    layer = peers.bias if name == BIAS else LAYERS.get(name)
    if layer is None:
        return build(images, is_training, settings)

    def replacement(x, is_training, *, activation=None, residual=None, **_):
        return statistics.activated(layer(x, is_training), residual, activation)

    with mock.patch.object(bn_tf1, "batch_norm", replacement):
        return build(images, is_training, settings)


def _torch_step(precision, batch, size, blocks):
    import torch
    from torch import nn

    torch.set_num_threads(os.cpu_count())

    class Block(nn.Module):
        def __init__(self, inputs, filters, stride):
            super().__init__()
            self.added, self.stride = filters - inputs, stride
            self.body = nn.Sequential(
                nn.Conv2d(inputs, filters, 3, stride, 1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
                nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
                nn.BatchNorm2d(filters),
            )

        def forward(self, x):
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = nn.functional.pad(shortcut, [0, 0, 0, 0, 0, self.added])
            return torch.relu(self.body(x) + shortcut)

    stages = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(blocks):
            stages.append(Block(before, filters, 2 if stage and not block else 1))
            before = filters
    network = nn.Sequential(
        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, [batch])

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def _print_memory(name, batch, size, blocks):
    """In a process of its own: its peak memory after three steps, in MB."""
    tf.disable_v2_behavior()
    memory_allocator.keep_memory()
    step = train_step(name, "float32", int(batch), int(size), int(blocks))
    for _ in range(3):
        step()
    print(_peak_memory())


def _peak_memory():
    """Of this process on Linux, in MB.

    `resource.getrusage` also counts what the parent held when it started this process.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    kilobytes, _ = lines["VmHWM"].split()
    return int(kilobytes) / 1024


if __name__ == "__main__":
    _print_memory(*sys.argv[1:])
