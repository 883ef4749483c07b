"""Values of constants, and what affine arithmetic does to a tensor, by channel.

    y = scale * x + offset

is what a batch norm in inference mode is, however it is written. Both are arrays that
broadcast against x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import is_fused
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, node_name, port_in

_COPIES = frozenset(
    ["Identity", "StopGradient", "CheckNumerics", "PreventGradient", "Snapshot"]
)
_UNARY = {
    "Rsqrt": lambda v: 1 / np.sqrt(v),
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Square": np.square,
    "Reciprocal": np.reciprocal,
    "Inv": np.reciprocal,
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
}
_SHAPING = ("Reshape", "Squeeze", "ExpandDims")
_MAX_DEPTH = 40


class Affine(NamedTuple):
    """scale * x + offset, float64."""

    scale: np.ndarray
    offset: np.ndarray


class Values:
    """The values of the constants of a graph, and of what is computed from them alone."""

    def __init__(self, graph: EditableGraph):
        self._graph = graph
        self._known: dict[str, Any] = {}

    def constant(self, source: str, depth: int = 0) -> np.ndarray | None:
        """The value of an input, float64 if it is a number; None: not constant."""
        if source not in self._known:
            self._known[source] = None  # in a cycle
            self._known[source] = self._computed(source, depth)
        return self._known[source]

    def _computed(self, source, depth):
        node = self._graph.nodes.get(node_name(source))
        if node is None or port_in(source) or depth > _MAX_DEPTH:
            return None
        if node.op == "Const":
            value = tf.make_ndarray(node.attr["value"].tensor)
            return value.astype(np.float64) if value.dtype.kind == "f" else value
        data = [i for i in node.input if not i.startswith("^")]
        if not data or not (
            node.op in _COPIES
            or node.op in _UNARY
            or node.op in _BINARY
            or node.op in _SHAPING
            or node.op == "ConcatV2"
        ):
            return None
        operands = []
        for i in data:
            operands.append(self.constant(i, depth + 1))
            if operands[-1] is None:
                return None
        if node.op in _COPIES:
            return operands[0]
        with np.errstate(all="ignore"):
            if node.op in _UNARY:
                return _UNARY[node.op](operands[0])
            if node.op in _BINARY:
                return _BINARY[node.op](*operands[:2])
        if node.op == "ConcatV2":
            return np.concatenate(operands[:-1], int(operands[-1]))
        return _shaped(node, operands)

    def affine(self, source: str, x: str, depth: int = 0) -> Affine | None:
        """What `source` is of the tensor `x`; None where it is not affine in it alone."""
        if source == x:
            return Affine(np.ones(()), np.zeros(()))
        node = self._graph.nodes.get(node_name(source))
        if node is None or depth > _MAX_DEPTH or port_in(source):
            return None
        data = [i for i in node.input if not i.startswith("^")]
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
        if "is_training" not in node.attr or node.attr["is_training"].b:
            return None
        epsilon = node.attr["epsilon"].f if "epsilon" in node.attr else 1e-4
        scale = gamma / np.sqrt(variance + np.float64(epsilon))
        layout = _format(node)
        return Affine(
            by_channel(scale, layout), by_channel(beta - mean * scale, layout)
        )


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


def _shaped(node, operands):
    if node.op == "Reshape":
        return operands[0].reshape([int(size) for size in operands[1]])
    if node.op == "ExpandDims":
        return np.expand_dims(operands[0], int(operands[1]))
    axes = tuple(node.attr["squeeze_dims"].list.i)
    return np.squeeze(operands[0], axes or None)
