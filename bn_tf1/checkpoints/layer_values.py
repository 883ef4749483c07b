"""What the batch-norm layers of one checkpoint hold: the numbers that are checked.

Only the variables of the layers, their counters and the global step are read. A
variable whose bytes are damaged, or too large to be one of a layer, is left out and
named.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, NamedTuple

import numpy as np

from bn_tf1.checkpoints.dialects import COUNTER, ROLES, ZERO_DEBIAS, find_slot, join
from bn_tf1.checkpoints.found_layers import (
    STATISTICS,
    CheckpointLayer,
    find_checkpoint_layers,
)
from bn_tf1.checkpoints.object_names import variable_names
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import TensorFile

# As tf.train, tf.keras's optimizers and Keras 3 call it.
_STEP = re.compile(r"(^|/)(global_step|iterations?|iter|_iterations)$")
_NAMED_STEP = re.compile(r"-(\d{1,12})$")
# More is no layer, but an embedding whose name looks like one's: not to be read whole.
_MAX_CHANNELS = 1 << 20
_RENORM = ("renorm_mean", "renorm_stddev")


class LayerValues(NamedTuple):
    """One layer with its numbers.

    Attributes:
        layer: the layer and the names of its variables.
        values: by role, float64 of shape [channels]; roles are gamma, beta,
            moving_mean, moving_variance, and, where they are there, renorm_mean,
            renorm_stddev, num_updates and the state of zero-debiased averages:
            mean_biased, mean_steps, variance_biased, variance_steps.
        decay, epsilon: of the layer, where a graph tells; else None.
        mode: "training", "inference", "switched" or "unknown", as a graph tells.
        kind: how the graph computes it; "" without a graph.
        is_rectified: whether nothing but a ReLU takes its output; None without a graph.
    """

    layer: CheckpointLayer
    values: Mapping[str, np.ndarray]
    decay: float | None = None
    epsilon: float | None = None
    mode: str = "unknown"
    kind: str = ""
    is_rectified: bool | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether both moving statistics are there, of one size."""
        sizes = {self.values[role].size for role in STATISTICS if role in self.values}
        return len(sizes) == 1 and all(role in self.values for role in STATISTICS)

    @property
    def is_initial(self) -> bool:
        """Whether every mean is 0, and every variance 1 or every variance 0."""
        if not self.has_statistics:
            return False
        mean, variance = (self.values[role] for role in STATISTICS)
        # Averages of tf.train start from 0, variables of layers from 1.
        return not mean.any() and (bool(np.all(variance == 1)) or not variance.any())


class CheckpointValues(NamedTuple):
    """What was read of one checkpoint.

    Attributes:
        prefix: its path without ".index".
        step: its global step, or the number at the end of its name; None without both.
        layers: its batch-norm layers.
        damaged: why, by the name of a variable that could not be read.
        is_step_named: whether only the name tells the step; the number may also be that
            of an epoch.
    """

    prefix: str
    step: int | None
    layers: tuple[LayerValues, ...]
    damaged: Mapping[str, str]
    is_step_named: bool = False


def read_values(file: TensorFile, graph_layers: Iterable[Any] = ()) -> CheckpointValues:
    """Reads the batch-norm layers of `file`.

    Args:
        file: the open checkpoint.
        graph_layers: `GraphLayer`s of its graph, for decay, epsilon and mode.
    """
    reader = _Reader(file)
    graph_layers = list(graph_layers)
    by_mean = {layer.moving_mean: layer for layer in graph_layers}
    # A layer without a moving mean has none in the checkpoint either.
    by_mean.pop(None, None)
    layers = []
    for layer in find_checkpoint_layers(file.shapes, graph_layers, reader.plain):
        graph_layer = by_mean.get(reader.plain_of.get(layer.names.get("moving_mean")))
        layers.append(_layer_values(reader, layer, graph_layer))
    # The number that a saver appends may be all that tells: a saver of some variables.
    step, named = _step(reader), step_of(file.prefix)
    return CheckpointValues(
        file.prefix,
        named if step is None else step,
        tuple(layers),
        reader.damaged,
        step is None and named is not None,
    )


def step_of(prefix: str) -> int | None:
    """The number at the end of the name of a checkpoint, as a saver puts it there."""
    match = _NAMED_STEP.search(prefix)
    return int(match.group(1)) if match else None


class _Reader:
    """Reads small tensors by name, and remembers which of them are damaged."""

    def __init__(self, file):
        self._file = file
        self.plain = variable_names(file)
        self.plain_of = {full: plain for plain, full in self.plain.items()}
        # TensorFlow repeats the scope in front of it: `bn/bn/moving_mean/biased`.
        slots = [(name, find_slot(name, self.plain)) for name in self.plain]
        self.slots = {(s.variable, s.leaf): name for name, s in slots if s is not None}
        self.damaged: dict[str, str] = {}

    def read(self, full):
        """The numbers of a tensor, float64, flat; None where there are none."""
        tensor = self._file.tensors.get(full)
        # A complex number is no statistic, whatever it is called.
        if tensor is None or tensor.dtype is None or tensor.dtype.kind == "c":
            return None
        if tensor.elements > _MAX_CHANNELS:
            self.damaged[full] = f"shape {list(tensor.shape)} is none of a batch norm"
            return None
        try:
            return np.asarray(tensor.read(), np.float64).reshape(-1)
        except CheckpointError as error:
            self.damaged[full] = str(error)
            return None


def _layer_values(reader, layer, graph_layer):
    values = {role: reader.read(layer.names.get(role)) for role in ROLES}
    mean_name = reader.plain_of.get(layer.names.get("moving_mean"))
    if mean_name is not None:
        scope = mean_name.rpartition("/")[0]
        for role in (*_RENORM, COUNTER):
            values[role] = reader.read(reader.plain.get(join(scope, role)))
    for statistic in STATISTICS:
        name = reader.plain_of.get(layer.names.get(statistic))
        short = statistic.split("_")[-1]
        for role, leaf in zip(("biased", "steps"), ZERO_DEBIAS):
            slot = reader.slots.get((name, leaf))
            values[f"{short}_{role}"] = reader.read(reader.plain.get(slot))
    values = {role: value for role, value in values.items() if value is not None}
    settings = {}
    if graph_layer is not None:
        settings = {
            name: getattr(graph_layer, name) for name in LayerValues._fields[2:]
        }
    return LayerValues(layer, values, **settings)


def _step(reader):
    steps = []
    for plain, full in reader.plain.items():
        if _STEP.search(plain):
            value = reader.read(full)
            if value is not None and value.size == 1 and np.isfinite(value[0]):
                steps.append(int(value[0]))
    # Of several optimizers, as of a GAN, the one that went furthest.
    return max(steps, default=None)
