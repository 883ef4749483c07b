"""Batch norms in inference mode, folded into the weights of what comes before them.

    scale * (conv(x, w) + bias) + offset = conv(x, w * scale) + (bias * scale + offset)

Into convolutions of two and three dimensions, depthwise, dilated and transposed ones and
matrix products; through what adds a constant and what keeps the channels; into each part
of a concatenation. Weights that others take, too, are copied.

Contract: a layer is folded only where nobody else takes what it normalises, so that the
outputs stay what they were, up to rounding. Each layer that is left has a reason.

Source: Jacob et al., "Quantization and Training of Neural Networks", 2017
(arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

from typing import Any, Iterable, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import analyse
from bn_tf1.graphs.rewriting.constant_values import Values, by_channel
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    data_inputs,
    input_for,
    node_name,
    port_in,
    set_attributes,
)
from bn_tf1.graphs.training_nodes import Conditions
from bn_tf1.graphs.view import reached

# What has weights, and the axis of the output channels among those, from the end.
LINEAR = {
    "Conv2D": -1,
    "Conv3D": -1,
    "DepthwiseConv2dNative": -1,
    "Conv2DBackpropInput": -2,
    "Conv3DBackpropInputV2": -2,
    "MatMul": -1,
    "BatchMatMulV2": -1,
    "BatchMatMulV3": -1,
}
_PRODUCTS = ("MatMul", "BatchMatMulV2", "BatchMatMulV3")
_KEEPING = ("Identity", "BatchToSpaceND", "StopGradient", "CheckNumerics")
_ADDING = ("BiasAdd", "Add", "AddV2", "Sub")
_SHAPING = ("Reshape", "ExpandDims", "Squeeze")
_MAX_STEPS = 20


class Folding(NamedTuple):
    """What `fold` did.

    Attributes:
        folded: names of layers.
        left: (name, reason) of layers.
    """

    folded: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


class _Left(Exception):
    """A layer that is left; its message is the reason."""


class _Place(NamedTuple):
    """Where a layer can be folded into.

    Attributes:
        linear: the name of the operation with the weights.
        weights: their value.
        bias: what is added to its result by channel, or zeros.
        additions: names of the nodes on the way that add it.
        after: how many axes follow that of the channels.
        is_nchw: whether it gives [batch, channels, height, width], and so does the way.
    """

    linear: str
    weights: np.ndarray
    bias: np.ndarray
    additions: tuple[str, ...]
    after: int
    is_nchw: bool


def fold(graph: EditableGraph, outputs: Iterable[str]) -> Folding:
    """Folds the layers of `graph`, whose variables are constants.

    Args:
        graph: is changed.
        outputs: the names of nodes that somebody takes from outside.
    """
    view = graph.view()
    folder = _Folder(graph, frozenset(outputs))
    folded, left = [], []
    for analysis in analyse(view, Conditions(view)):
        for call in analysis.calls:
            name = analysis.layer.name
            if len(analysis.calls) > 1:
                name = f"{name} ({view.names[call.node]})"
            try:
                # A gamma or a shift by hand after the kernel goes with it.
                last = folder.last_of(view.names[call.node])
                rest = folder.fold(last, input_for(view, call.x))
                folded.append(name)
                if rest is not None:
                    left.append((name, rest))
            except _Left as reason:
                left.append((name, str(reason)))
    return Folding(tuple(folded), tuple(left))


class _Folder:
    def __init__(self, graph: EditableGraph, outputs: frozenset):
        self._graph = graph
        self._outputs = outputs
        self._values = Values(graph)
        self._users: dict[str, list[str]] = graph.consumers()

    def last_of(self, name):
        """The last node that scales or shifts the result of `name` by a constant."""
        for _ in range(_MAX_STEPS):
            users = self._users.get(name, ())
            if len(users) != 1 or name in self._outputs:
                break
            user = self._graph.nodes[users[0]]
            if user.op not in (*_ADDING, "Mul") or port_in(user.input[0]) > 0:
                break
            others = [i for i in data_inputs(user) if node_name(i) != name]
            if len(others) != 1 or self._values.constant(others[0]) is None:
                break
            name = user.name
        return name

    def fold(self, last, x):
        """Folds the layer whose output is the node `last` and whose input is `x`.

        Returns:
            Why a part of it is left; None if there is no such part.

        Raises:
            _Left: nothing of it can be folded; nothing was changed.
        """
        affine = self._values.affine(last, x)
        if affine is None:
            raise _Left("it is not scale * x + offset with constants")
        self._check_region(last, x)
        producer = self._graph.nodes[node_name(x)]
        if producer.op == "ConcatV2" and port_in(x) == 0:
            # Each part, as in dense blocks, has weights of its own before it.
            return self._fold_parts(last, x, producer, affine)
        place = self._place(x)
        scale, offset = self._vectors(affine, place)
        self._scale_weights(place, scale)
        dtype = _dtype_of(self._graph.nodes[place.linear])
        bias = place.bias * scale + offset
        self._add(last, x, bias, place.after, dtype, place.is_nchw)
        return None

    # --------------------------------------------------------------------- who takes what

    def _check_region(self, last, x):
        """Nobody but the layer itself takes its input or what is on the way."""
        region = self._between(node_name(x), last)
        self._check_users(node_name(x), region)
        for name in region - {last}:
            self._check_users(name, region)
        # Of a kernel only the first output is there still.
        for user in self._users.get(last, ()):
            for source in self._graph.nodes[user].input:
                if node_name(source) == last and port_in(source):
                    raise _Left(f"{user!r} takes its statistics")

    def _between(self, start, last):
        """The nodes that depend on `start` and that `last` depends on."""
        depends = self._depending(start, last) - {start}

        def sources(name):
            return depends.intersection(map(node_name, self._graph.nodes[name].input))

        return reached([last], sources)

    def _depending(self, start, last):
        """What depends on `start`, not further than some steps: a layer is short."""
        found, ring = {start}, [start]
        for _ in range(_MAX_STEPS):
            ring = [
                user
                for name in ring
                if name != last
                for user in self._users.get(name, ())
                if user not in found
            ]
            found.update(ring)
        return found

    def _check_users(self, name, allowed):
        if name in self._outputs:
            raise _Left(f"{name!r} is an output itself")
        others = [user for user in self._users.get(name, ()) if user not in allowed]
        if others:
            raise _Left(f"{others[0]!r} takes {name!r}, too")

    # -------------------------------------------------------------------------- the place

    def _place(self, x):
        """Walks back from `x` to weights."""
        way, source = [], x
        for _ in range(_MAX_STEPS):
            name = node_name(source)
            node = self._graph.nodes[name]
            if port_in(
                source
            ):  # of a Split, say: the other outputs are somebody else's
                raise _Left(f"it normalises output {port_in(source)} of {name!r}")
            if node.op in LINEAR:
                return self._place_at(name, node, way)
            way.append(name)
            source = self._before(name, node)
            self._check_users(node_name(source), {name})
        raise _Left("what it normalises is too far from any weights")

    def _before(self, name, node):
        """What a node that keeps the channels took."""
        data = data_inputs(node)
        if node.op in _KEEPING:
            return data[0]
        if node.op in _SHAPING:
            if node.op != "Squeeze" and self._values.constant(data[1]) is None:
                raise _Left(f"the shape that {name!r} gives is not constant")
            return data[0]
        if node.op in _ADDING:
            return data[self._variable_operand(name, node)]
        if node.op in ("Pad", "PadV2", "MirrorPad"):
            raise _Left(f"{name!r} pads what it normalises: the offset would be padded")
        raise _Left(
            f"it normalises what {name!r} ({node.op}) gives, which has no weights"
        )

    def _variable_operand(self, name, node):
        """0 or 1: the operand of an addition to which the other, a constant, is added."""
        constants = [self._values.constant(i) is not None for i in data_inputs(node)]
        if constants == [False, True]:
            return 0
        if constants == [True, False] and node.op in ("Add", "AddV2"):
            return 1
        raise _Left(f"{name!r} adds two tensors, not one and a constant")

    def _place_at(self, name, node, way):
        weights = self._values.constant(data_inputs(node)[1])
        if weights is None or weights.ndim < 2:
            raise _Left(f"the weights of {name!r} are not constant")
        if node.op in _PRODUCTS and weights.ndim != 2:
            raise _Left(f"{name!r} is no product with a matrix of weights")
        # Scaled weights of 8 or 11 bits would be other weights.
        dtype = tf.as_dtype(node.attr["T"].type)
        if dtype not in (tf.float32, tf.float64):
            raise _Left(f"{name!r} is in {dtype.name}, where weights would be rounded")
        channels = _channels(node, weights)
        after = weights.ndim - 2 if _is_first(node) else 0
        bias = np.zeros(channels)
        # In the order of the data: what moves the channels decides what is by channel then.
        for step in reversed(way):
            passed = self._graph.nodes[step]
            if passed.op in _ADDING:
                bias = bias + self._added(step, passed, channels, after)
            elif passed.op in _SHAPING:
                after = self._after_shaping(step, passed, channels, after)
        additions = tuple(n for n in way if self._graph.nodes[n].op in _ADDING)
        is_shaped = any(self._graph.nodes[n].op in _SHAPING for n in way)
        is_nchw = after == 2 and weights.ndim == 4 and not is_shaped
        return _Place(name, weights, bias, additions, after, is_nchw)

    def _added(self, name, node, channels, after):
        constant = data_inputs(node)[1 - self._variable_operand(name, node)]
        value = self._values.constant(constant)
        if node.op == "BiasAdd":
            value = by_channel(value, node.attr["data_format"].s.decode() or "NHWC")
        vector = _as_vector(value, channels, after)
        if vector is None:
            raise _Left(f"{name!r} adds a constant that is not one by channel")
        return -vector if node.op == "Sub" else vector

    def _after_shaping(self, name, node, channels, after):
        """How many axes follow the channels after a node that gives another shape."""
        if node.op == "Reshape":
            sizes = [int(size) for size in self._values.constant(data_inputs(node)[1])]
            trailing = len(sizes) - 1
            # [-1, channels, 1, 1]: the axes that follow are for broadcasting.
            while trailing and sizes[trailing] == 1 and channels != 1:
                trailing -= 1
            behind = len(sizes) - 1 - trailing
            if sizes and sizes[trailing] == channels and after in (0, behind):
                return behind
        elif node.op == "ExpandDims":
            axis = int(self._values.constant(data_inputs(node)[1]))
            if not after and axis in (1, 2):
                return after
        elif not after and all(0 <= a <= 2 for a in node.attr["squeeze_dims"].list.i):
            return after
        raise _Left(f"{name!r} may move the channels to another axis")

    def _vectors(self, affine, place):
        """The layer's scale and offset as vectors by channel of the weights."""
        channels = len(place.bias)
        vectors = [_as_vector(array, channels, place.after) for array in affine]
        if any(vector is None for vector in vectors):
            raise _Left(
                f"its channels are not the {channels} of the weights of {place.linear!r}"
            )
        return vectors

    # -------------------------------------------------------------------------- the change

    def _scale_weights(self, place, scale):
        node = self._graph.nodes[place.linear]
        shape = [1] * place.weights.ndim
        if node.op == "DepthwiseConv2dNative":
            shape[-2:] = place.weights.shape[-2:]
        else:
            shape[_axis(node)] = -1
        dtype = tf.as_dtype(node.attr["T"].type).as_numpy_dtype
        scaled = (place.weights * scale.reshape(shape)).astype(dtype)
        # Of its own: somebody else may take the same weights.
        node.input[1] = self._graph.constant(f"{place.linear}/folded", scaled)
        for name in place.additions:
            passed = self._graph.nodes[name]
            kept = data_inputs(passed)[self._variable_operand(name, passed)]
            self._graph.make_identity(name, kept)

    def _add(self, name, x, bias, after, dtype, is_nchw=False):
        """Lets the node `name` be x + bias."""
        # TensorFlow makes one kernel of a convolution, its BiasAdd and a ReLU, but not
        # of a sum; a BiasAdd of other ranks has its channels last.
        is_bias = is_nchw or not after
        made = self._constant(f"{name}/folded", bias, 0 if is_bias else after, dtype)
        op = "BiasAdd" if is_bias else "AddV2"
        node = tf.NodeDef(name=name, op=op, input=[x, made])
        set_attributes(node, T=dtype, **({"data_format": b"NCHW"} if is_nchw else {}))
        self._graph.replace(node)

    # --------------------------------------------------------------------- concatenations

    def _fold_parts(self, last, x, concatenation, affine):
        parts = data_inputs(concatenation)[:-1]
        places, reasons = [], []
        for part in parts:
            try:
                self._check_users(node_name(part), {concatenation.name})
                places.append(self._place(part))
            except _Left as reason:
                places.append(None)
                reasons.append(str(reason))
        # One part may keep a product and a sum: the others win more than it loses.
        if len(reasons) > 1 or len(parts) < 2:
            raise _Left(f"of the parts that it normalises, {reasons[0]}")
        self._check_concatenation(concatenation, places)
        # A scale of one number for all channels may stand beside an offset by channel.
        total = max(array.size for array in affine)
        after = next(place.after for place in places if place is not None)
        vectors = [_as_vector(array, total, after) for array in affine]
        sizes = [len(place.bias) if place is not None else 0 for place in places]
        sizes = [size or total - sum(sizes) for size in sizes]
        if any(v is None for v in vectors) or sum(sizes) != total or min(sizes) < 1:
            raise _Left("its channels are not those of what is concatenated")
        dtype = _dtype_of(concatenation)
        start = 0
        for number, (part, place, size) in enumerate(zip(parts, places, sizes)):
            scale, offset = (vector[start : start + size] for vector in vectors)
            start += size
            name = self._graph.free_name(f"{last}/part_{number}")
            if place is None:
                factor = self._constant(f"{name}/scale", scale, after, dtype)
                self._graph.add("Mul", name, [part, factor], T=dtype)
                self._add(f"{name}/offset", name, offset, after, dtype)
                name = f"{name}/offset"
            else:
                self._scale_weights(place, scale)
                bias = place.bias * scale + offset
                self._add(name, part, bias, after, dtype, place.is_nchw)
            concatenation.input[number] = name
        self._graph.make_identity(last, x)
        return f"one of its parts: {reasons[0]}" if reasons else None

    def _check_concatenation(self, concatenation, places):
        axis = self._values.constant(data_inputs(concatenation)[-1])
        afters = {place.after for place in places if place is not None}
        weights = next(place.weights for place in places if place is not None)
        channel_axes = (-1, weights.ndim - 1) if 0 in afters else (1,)
        if axis is None or len(afters) != 1 or int(axis) not in channel_axes:
            raise _Left("it normalises a concatenation along another axis")

    def _constant(self, name, vector, after, dtype):
        """A vector by channel for what has `after` more axes."""
        value = vector.astype(dtype.as_numpy_dtype).reshape([-1] + [1] * after)
        return self._graph.constant(name, value)


def _dtype_of(node):
    return tf.as_dtype(node.attr["T"].type)


def _is_first(node):
    return "data_format" in node.attr and node.attr["data_format"].s[:2] == b"NC"


def _channels(node, weights):
    if node.op == "DepthwiseConv2dNative":
        return weights.shape[-2] * weights.shape[-1]
    return weights.shape[_axis(node)]


def _axis(node):
    """The axis of the output channels among those of the weights."""
    flag = {"MatMul": "transpose_b", "BatchMatMulV2": "adj_y", "BatchMatMulV3": "adj_y"}
    is_turned = node.op in flag and node.attr[flag[node.op]].b
    return -2 if is_turned else LINEAR[node.op]


def _as_vector(array: np.ndarray, channels: int, after: int) -> Any:
    """[channels] of what broadcasts by channel; None of what does not."""
    array = np.asarray(array, np.float64)
    if array.size == 1:  # one number for all
        return np.full(channels, array.reshape(()))
    expected = [channels] + [1] * after
    shape = [1] * (len(expected) - array.ndim) + list(array.shape)
    if shape[-len(expected) :] != expected or any(s != 1 for s in shape[: -1 - after]):
        return None
    return array.reshape(-1)
