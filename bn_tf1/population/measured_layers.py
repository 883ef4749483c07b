"""The layers whose statistics are measured: ours by their records, or anybody's.

A layer of another library is given as `LayerTensors`, or found by the recogniser in a
graph that was built or imported: of tf.layers, slim, Keras, Sonnet, tensorpack or
written by hand. What lies inside of a loop or a function cannot be fetched; such a layer
is named with that reason.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.built_layers import BatchNormCall, batch_norm_calls
from bn_tf1.checkpoints.dialects import STATISTICS, statistic_role
from bn_tf1.graphs.layer_analysis import Analysis, analyse
from bn_tf1.graphs.node_values import leaves, same_values, variable_name
from bn_tf1.graphs.recognition.batch_statistics import is_weighted
from bn_tf1.graphs.training_nodes import Conditions
from bn_tf1.graphs.view import GraphView, node_of, port_of, reference_to, view_of
from bn_tf1.population.probes import (
    Probe,
    of_input,
    of_statistics,
    size_of,
)
from bn_tf1.population.variable_cells import Cell, cell_of

# Why a layer of a graph that somebody built cannot be measured.
WEIGHTED = (
    "a mask, or other weights, say which values count: recalibrate it in the program that "
    "builds it"
)
_INTO_BRANCHES = ("Switch", "RefSwitch", "_Arg")
_RESHAPES = ("Reshape", "Cast", "Identity")
_REDUCTIONS = ("Mean", "Sum")
_WAYS = (
    *("Identity", "Reshape", "Squeeze", "Cast", "StopGradient", "Merge", "RealDiv"),
    *("Sub", "Add", "AddV2", "Mul"),
)


class MeasuredCall(NamedTuple):
    """One call of a layer.

    Attributes:
        probe: how its batch statistics are had; None where they cannot be.
        input: makes a probe of what it normalises, which serves in any mode; None where
            that cannot be fetched.
        obstacle: why there is no probe; "" where there is one.
    """

    probe: Probe | None
    input: Callable[[], Probe] | None
    obstacle: str = ""


class MeasuredLayer(NamedTuple):
    """A layer with all its calls.

    Attributes:
        name: its name.
        moving: the cells of its moving mean and variance; None where it has none.
        calls: its calls, those in inference mode only where it has no other.
        epsilon: the number that is added to the variance; 0 where it is not known.
        decay: share of the old moving statistics that an update keeps; None where it is
            not known, or no constant.
    """

    name: str
    moving: tuple[Cell, Cell] | None
    calls: tuple[MeasuredCall, ...]
    epsilon: float = 0.0
    decay: float | None = None


def given_layers(layers: Sequence[Any]) -> list[MeasuredLayer]:
    """Our records and `LayerTensors`; several of one moving mean are one layer.

    Raises:
        ValueError: a layer has no batch statistics, or it cannot be told how many values
            they are made from.
    """
    found = []
    for name, moving, calls in grouped(layers):
        # Of a layer for both modes: those for inference have no statistics of a batch.
        of_training = [call for call in calls if call.batch_mean is not None] or calls
        measured = [one for call in of_training for one in _given_calls(call)]
        arguments = getattr(calls[0], "arguments", None)
        decay = getattr(arguments, "decay", None)
        decay = float(decay) if isinstance(decay, (int, float)) else None
        epsilon = getattr(arguments, "epsilon", 0.0)
        found.append(MeasuredLayer(name, moving, tuple(measured), epsilon, decay))
    return found


def grouped(layers: Iterable[Any]) -> list[tuple[str, tuple[Cell, Cell], list]]:
    """(name, moving mean and variance, calls) of each layer, in the order given."""
    by_variable: dict[str, list] = {}
    for call in layers:
        by_variable.setdefault(cell_of(call.moving_mean).name, []).append(call)
    return [
        (
            # A record of ours may be that of one of several banks.
            getattr(calls[0], "bank_name", calls[0].name),
            (cell_of(calls[0].moving_mean), cell_of(calls[0].moving_variance)),
            calls,
        )
        for calls in by_variable.values()
    ]


def layers_of(graph: tf.Graph) -> list[MeasuredLayer]:
    """Those that `batch_norm` recorded in `graph`, and those that others built there."""
    recorded = given_layers(batch_norm_calls(graph))
    known = {cell.name for layer in recorded for cell in layer.moving}
    # The names are looked at first: the recogniser takes longer than a step.
    foreign = [
        variable.op.name
        for variable in graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
        if statistic_role(variable.op.name) and variable.op.name not in known
    ]
    if recorded and not foreign:
        return recorded
    view = view_of(graph)
    conditions = Conditions(view)
    analysed = analyse(view, conditions)
    found = [
        _Recognised(view, conditions, layer, graph).layer(name)
        for name, layer in zip(layer_names(analysed), analysed)
    ]
    # What has no moving statistics may be a part of one of ours, seen by itself.
    return recorded + [
        layer
        for layer in found
        if (layer.moving[0].name not in known if layer.moving else not recorded)
    ]


def _recorded_call(call, x):
    arguments = call.arguments
    source = functools.partial(
        of_input, x, arguments.plan.axes, arguments.weights, call.is_chosen
    )
    if call.batch_mean is None:
        return MeasuredCall(None, source, "it was built with is_training=False")
    if arguments.sync is not None and getattr(arguments.sync, "size", 0) != 1:
        # Whoever runs it waits for the others, who would have to run just as many batches.
        what = "`sync` gives it the statistics of all workers: recalibrate one process alone"
        return MeasuredCall(None, source, what)
    rich = (arguments.weights, arguments.ghost_batch_size)
    if rich == (None, None) and x is call.x:
        unbiased = arguments.ema_variance == "unbiased"
        own = call.batch_mean, call.batch_variance
        probe = of_statistics(*own, size=size_of(x), unbiased=unbiased)
        probe = probe._replace(is_chosen=call.is_chosen)
    else:  # what enters the moving average is not the statistic of `x` alone
        probe = source()
    if tf.is_tensor(arguments.is_training):
        probe = probe._replace(switch=arguments.is_training)
    return MeasuredCall(probe, source)


def _given_calls(call):
    if isinstance(call, BatchNormCall):
        towers = call.x if isinstance(call.x, list) else [call.x]
        return [_recorded_call(call, x) for x in towers]
    source, x = None, call.x
    if x is None:
        x = _reduced(call)
    else:
        channels = call.batch_mean.shape.num_elements()
        axis = channel_axis(x.shape.as_list(), None, channels)
        source = functools.partial(of_input, x, axis)
    size = size_of(x)
    probe = of_statistics(call.batch_mean, call.batch_variance, size=size)
    return [MeasuredCall(probe, source)]


def channel_axis(
    shape: Sequence[int | None], reduced: Sequence[int] | None, channels: int | None
) -> int | None:
    """The axis of `shape` that is not `reduced`, or else the last of `channels`."""
    if reduced is not None:
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        if len(kept) == 1:
            return kept[0]
    # Axis 0 counts the examples, even where they are as many as the channels.
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] == channels]
    return fitting[-1] if fitting and channels is not None else None


def _reduced(call):
    """The tensor that the batch mean of `call` was computed from."""
    # The nearest first: behind it are the means of the layers before.
    pending, seen = [call.batch_mean], set()
    while pending:
        op = pending.pop(0).op
        if op in seen:
            continue
        seen.add(op)
        if op.type in _REDUCTIONS or "FusedBatchNorm" in op.type:
            return op.inputs[0]
        if op.type in _WAYS:
            pending += list(op.inputs)
    raise ValueError(
        f"`layers` has {call.name!r}, whose batch mean {call.batch_mean.name} is no mean "
        "over a tensor of the graph: give that tensor as `x` of its LayerTensors"
    )


def layer_names(found: Sequence[Analysis]) -> list[str]:
    """Their names, with a number where a scope has several."""
    names: list[str] = []
    for layer in found:
        name = layer.layer.name
        seen = sum(other == name or other.startswith(name + " ") for other in names)
        names.append(f"{name} {seen + 1}" if seen else name)
    return names


class _Recognised:
    """One layer that the recogniser found in `view`, as tensors of `graph`, the same."""

    def __init__(self, view, conditions, analysis, graph):
        self._view = view
        self._conditions = conditions
        self._analysis = analysis
        self._graph = graph
        self._channels = analysis.layer.channels

    def layer(self, name):
        calls, variables = self._analysis.calls, self._analysis.variables
        # Which of them a run is for, a graph without our records does not tell.
        banks = banks_of(self._view, self._analysis)
        if banks:
            call = MeasuredCall(None, None, f"each run chooses one of {banks} for it")
            return MeasuredLayer(name, None, (call,))
        training = [call for call in calls if call.mode != "inference"]
        moving = None
        if all(variables[role] for role in STATISTICS):
            names = [self._view.names[variables[role][0]] for role in STATISTICS]
            moving = tuple(map(cell_of, map(self._graph.get_operation_by_name, names)))
        return MeasuredLayer(
            name,
            moving,
            tuple(self._call(call) for call in training or calls),
            self._analysis.layer.epsilon or 0.0,
            self._analysis.layer.decay,
        )

    def _call(self, call):
        x, axis = self._input(call)
        source = None if axis is None else functools.partial(of_input, x, axis)
        if call.mode == "inference":
            return MeasuredCall(None, source, "the graph has it in inference mode only")
        if source is None:
            what = "what it normalises is inside of a loop or a function"
            return MeasuredCall(None, None, what)
        if is_weighted(self._view, call.mean):
            return MeasuredCall(None, None, WEIGHTED)
        mean, variance, unbiased, switch = self._statistics(call)
        is_known = mean is not None and variance is not None
        if not is_known or self._channels not in (mean.shape.num_elements(), None):
            return MeasuredCall(source(), source)
        probe = of_statistics(mean, variance, size=size_of(x), unbiased=unbiased)
        if switch is not None:
            probe = probe._replace(switch=switch[0], when=switch[1])
        return MeasuredCall(probe, source)

    def _statistics(self, call):
        """(mean, variance, whether it is unbiased, how a condition tells its branch)."""
        if call.kind != "fused":
            mean, variance = self._tensor(call.mean), self._tensor(call.variance)
            return mean, variance, False, self._switch(call.mean)
        mean, switch = self._out_of(reference_to(call.node, 1))
        variance, _ = self._out_of(reference_to(call.node, 2))
        factor = self._view.attribute(call.node, "exponential_avg_factor")
        if switch is not None and factor is not None and factor.f < 1:
            mean = None  # averaged, and the batch's does not leave the branch
        return mean, variance, switch is not None, switch

    def _out_of(self, reference):
        """(a tensor with the value of `reference`, as `_switch` if it is in a branch)."""
        tensor = self._tensor(reference)
        if tensor is not None:
            return tensor, None
        # Inside of a branch nothing can be fetched, but the Merge behind it can, and tells
        # which of its inputs it took.
        for consumer in self._view.consumers(node_of(reference)):
            inputs = self._view.inputs[consumer]
            if self._view.ops[consumer] == "Merge" and reference in inputs:
                taken = self._tensor(reference_to(consumer, 1)), inputs.index(reference)
                return self._tensor(reference_to(consumer)), taken
        return None, None

    def _switch(self, reference):
        """(a tensor, its value) that tell the batch's branch; None out of no condition."""
        # Of control flow v1 alone: what a cond of v2 took, no operation tells.
        for _ in range(8):
            node = node_of(reference)
            if self._view.ops[node] == "Merge":
                ways = [leaves(self._view, r) for r in self._view.inputs[node]]
                of_batch = [bool(w.reductions or w.statistics) for w in ways]
                if sum(of_batch) != 1:
                    return None
                return self._tensor(reference_to(node, 1)), of_batch.index(True)
            earlier = same_values(self._view, reference)
            if len(earlier) != 1:
                break
            reference = earlier[0]
        return None

    def _input(self, call):
        """What `call` normalises, outside of conditions, and its axis; None in a loop."""
        # What is in a branch cannot be fetched, but what enters it can: back through its
        # Switches, and through what changes no value on the way.
        reference, axes = call.x, call.axes
        for _ in range(64):
            node = node_of(reference)
            op = self._view.ops[node]
            if op not in _INTO_BRANCHES:
                if op not in _RESHAPES or self._tensor(reference) is not None:
                    break
                axes = None  # of the reshaped tensor
            earlier = same_values(self._view, reference)
            if len(earlier) != 1:
                return None, None
            reference = earlier[0]
        x = self._tensor(reference)
        if x is None or x.shape.ndims is None:
            return None, None
        return x, channel_axis(x.shape.as_list(), axes, self._channels)

    def _tensor(self, reference):
        """The tensor, if it can be fetched."""
        node = node_of(reference)
        if self._view.body_of(node) or in_loop(self._view, self._conditions, node):
            return None
        name = f"{self._view.names[node]}:{port_of(reference)}"
        tensor = self._graph.get_tensor_by_name(name)
        return tensor if self._graph.is_fetchable(tensor.op) else None


def in_loop(view: GraphView, conditions: Conditions, node: int) -> bool:
    """Whether `node` is in a loop of control flow v1, where nothing can be fetched."""
    predicates = [node_of(predicate) for predicate, _ in conditions.of(node)]
    return any(view.ops[predicate] == "LoopCond" for predicate in predicates)


def banks_of(view: GraphView, analysis: Analysis) -> str:
    """The moving means that each run chooses one of; "" where there is one or none."""
    nodes = analysis.variables["moving_mean"]
    names = dict.fromkeys(variable_name(view, node) for node in nodes)
    return ", ".join(names) if len(names) > 1 else ""
