"""Values of the constants of a graph, and of what is computed from them alone.

And what affine arithmetic makes of a tensor with them, by channel,

    y = scale * x + offset

which a batch norm in inference mode is, however it is written. Both are arrays that
broadcast against x.

Weights are folded in float64, whatever the graph has, and rounded once. Settings are
computed in the dtype of the graph: it compares what it rounded, 1 - 0.1 with 0.9.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import is_fused
from bn_tf1.graphs.rewriting.editable_graph import (
    SWITCHES,
    EditableGraph,
    data_inputs,
    node_name,
    port_in,
)

_COPIES = frozenset(
    ["Identity", "StopGradient", "CheckNumerics", "PreventGradient", "Snapshot"]
)
# Values that go into a branch or a loop. What is folded there would have to be made in it.
_WAYS_IN = frozenset([*SWITCHES, "Enter"])
_SHAPING = ("Reshape", "Squeeze", "ExpandDims")
_UNARY = {
    # Not 1 / v, which NumPy 1 makes float64 of a scalar.
    "Rsqrt": lambda v: np.reciprocal(np.sqrt(v)),
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Square": np.square,
    "Reciprocal": np.reciprocal,
    "Inv": np.reciprocal,
    "LogicalNot": np.logical_not,
}
_BINARY = {
    "Add": np.add,
    "AddV2": np.add,
    "BiasAdd": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "RealDiv": np.divide,
    "Div": np.divide,
    "Pow": np.power,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Equal": np.equal,
    "NotEqual": np.not_equal,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
}
_LOGICAL = {"LogicalAnd": np.logical_and, "LogicalOr": np.logical_or}
_MAX_DEPTH = 60


class Affine(NamedTuple):
    """scale * x + offset, float64."""

    scale: np.ndarray
    offset: np.ndarray


class Values:
    """The values of a graph that constants decide.

    Args:
        graph: the graph; it is not to be changed where that changes a value.
        is_scalar: whether settings are asked for, which are scalars: a predicate, a rate.
            Then nothing larger is looked at, which may be the weights, what enters a
            branch or loop counts, too, and numbers keep their dtype.
    """

    def __init__(self, graph: EditableGraph, is_scalar: bool = False):
        self._graph = graph
        self._is_scalar = is_scalar
        self._known: dict[str, Any] = {}

    def constant(self, source: str, depth: int = 0) -> np.ndarray | None:
        """The value of an input; None: not constant."""
        if source not in self._known:
            self._known[source] = None  # in a cycle nothing decides
            self._known[source] = self._computed(source, depth)
        return self._known[source]

    def _computed(self, source, depth):
        node = self._graph.nodes.get(node_name(source))
        if node is None or depth > _MAX_DEPTH:
            return None
        is_way_in = self._is_scalar and node.op in _WAYS_IN
        if port_in(source) and not (is_way_in and port_in(source) > 0):
            return None
        if node.op == "Const":
            return self._stored(node)
        data = data_inputs(node)
        if data and (is_way_in or node.op in _COPIES):
            return self.constant(data[0], depth + 1)
        if len(data) < _OPERANDS.get(node.op, len(data) + 1):
            return None
        if self._is_scalar and node.op == "ConcatV2":
            return None  # a vector, though of scalars
        operands = [self.constant(i, depth + 1) for i in data]
        if node.op in _LOGICAL:
            return _decided(node.op, operands)
        if operands[0] is not None and node.op in _SHAPING and self._is_scalar:
            return operands[0]  # of whatever shape: it stays the one number that it is
        if any(operand is None for operand in operands):
            return None
        if node.op == "Div" and operands[0].dtype.kind in "iu":
            return None  # of integers it is cut, and NumPy's is not
        # What is not finite is not for here to say: whoever takes it compares outputs.
        with np.errstate(all="ignore"):
            return self._number(_result(node, operands))

    def _stored(self, node):
        shape = node.attr["value"].tensor.tensor_shape
        # Before it is made an array.
        if self._is_scalar and any(size.size != 1 for size in shape.dim):
            return None
        return self._number(tf.make_ndarray(node.attr["value"].tensor))

    def _number(self, value):
        value = np.asarray(value)
        is_widened = not self._is_scalar and value.dtype.kind == "f"
        return value.astype(np.float64) if is_widened else value

    def affine(self, source: str, x: str, depth: int = 0) -> Affine | None:
        """What `source` is of the tensor `x`; None where it is not affine in it alone."""
        if source == x:  # the end of all ways, itself of whatever shape
            return Affine(np.ones(()), np.zeros(()))
        node = self._graph.nodes.get(node_name(source))
        if node is None or depth > _MAX_DEPTH or port_in(source):
            return None
        data = data_inputs(node)
        # Of the IdentityN of `bn_tf1`, the first is the output.
        if node.op in _COPIES or node.op == "IdentityN":
            return self.affine(data[0], x, depth + 1)
        if is_fused(node.op):
            inner = self.affine(data[0], x, depth + 1)
            own = self._fused(node, data)
            if inner is None or own is None:
                return None
            return Affine(
                own.scale * inner.scale, own.scale * inner.offset + own.offset
            )
        if node.op not in _BINARY or len(data) != 2:
            return None
        return self._combined(node, data, x, depth)

    def _combined(self, node, data, x, depth):
        constants = [self.constant(i) for i in data]
        if node.op == "BiasAdd" and constants[1] is not None:
            constants[1] = by_channel(constants[1], _format(node))
        parts = [
            self.affine(source, x, depth + 1) if value is None else value
            for source, value in zip(data, constants)
        ]
        if any(part is None for part in parts):
            return None
        left, right = parts
        if node.op in ("Add", "AddV2", "BiasAdd", "Sub"):
            sign = -1 if node.op == "Sub" else 1
            left, right = map(_as_affine, (left, right))
            return Affine(
                left.scale + sign * right.scale, left.offset + sign * right.offset
            )
        if node.op == "Mul" and isinstance(right, Affine):
            left, right = right, left
        # Neither a product of two that depend on x, nor a number divided by one that does.
        if not isinstance(left, Affine) or isinstance(right, Affine):
            return None
        if node.op == "Mul":
            return Affine(left.scale * right, left.offset * right)
        if node.op in ("RealDiv", "Div"):
            return Affine(left.scale / right, left.offset / right)
        return None

    def _fused(self, node, data):
        gamma, beta, mean, variance = (self.constant(i) for i in data[1:5])
        if any(value is None for value in (gamma, beta, mean, variance)):
            return None
        # Its default is true.
        if "is_training" not in node.attr or node.attr["is_training"].b:
            return None
        epsilon = node.attr["epsilon"].f if "epsilon" in node.attr else 1e-4
        scale = gamma / np.sqrt(variance + np.float64(epsilon))
        layout = _format(node)
        return Affine(
            by_channel(scale, layout), by_channel(beta - mean * scale, layout)
        )


def constant_scalar(graph: EditableGraph, source: str) -> Any:
    """The value of a scalar that constants decide; None where others do, too."""
    value = Values(graph, is_scalar=True).constant(source)
    return None if value is None else value.reshape(-1)[0]


def _as_affine(part):
    return part if isinstance(part, Affine) else Affine(np.zeros(()), part)


def _format(node):
    value = node.attr["data_format"].s.decode() if "data_format" in node.attr else ""
    return value or "NHWC"


def by_channel(vector: np.ndarray, layout: str) -> np.ndarray:
    """A vector in the shape in which it broadcasts against a tensor of `layout`."""
    if layout.startswith("NC") and vector.ndim == 1:
        return vector.reshape([-1] + [1] * (len(layout) - 2))
    return vector


def _decided(op, operands):
    """One operand can decide, though the other is known only as the graph runs."""
    decisive = op == "LogicalOr"
    if any(o is not None and o.size == 1 and o.all() == decisive for o in operands):
        return np.array(decisive)
    is_known = all(operand is not None for operand in operands)
    return _LOGICAL[op](*operands[:2]) if is_known else None


def _result(node, operands):
    first, *others = operands
    if node.op in _UNARY:
        return _UNARY[node.op](first)
    if node.op in _BINARY:
        return _BINARY[node.op](first, others[0])
    if node.op == "Cast":
        return first.astype(tf.as_dtype(node.attr["DstT"].type).as_numpy_dtype)
    if node.op == "ConcatV2":
        return np.concatenate(operands[:-1], int(others[-1]))
    if node.op == "Reshape":
        return first.reshape([int(size) for size in others[0]])
    if node.op == "ExpandDims":
        return np.expand_dims(first, int(others[0]))
    axes = tuple(node.attr["squeeze_dims"].list.i)
    return np.squeeze(first, axes or None)


# How many there are at least: a damaged node may have fewer.
_OPERANDS = {
    **dict.fromkeys([*_UNARY, "Squeeze", "Cast"], 1),
    **dict.fromkeys([*_BINARY, *_LOGICAL, "Reshape", "ExpandDims", "ConcatV2"], 2),
}
