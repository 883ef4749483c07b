"""Batch norms that `bn_tf1` composes, with a gradient that is written by hand.

The gradient is attached to an IdentityN whose inputs are the output, the settings (epsilon
and channel axes), x and the operands.
"""

from __future__ import annotations

import re
from typing import Any

from bn_tf1.graphs.node_values import constant_at, is_fused, static_shape
from bn_tf1.graphs.recognition.batch_statistics import composed, through_casts
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.view import GraphView, node_of
from bn_tf1.statistics.joint_batches import NO_SECOND_DERIVATIVES
from bn_tf1.statistics.registered_gradients import (
    NORMALIZE_BATCH,
    NORMALIZE_PART,
    OUTPUT_GRADIENTS,
)

# Graphs of 0.1.0 have the settings in the name of the gradient. To go with 1.0.
_OF_0_1 = re.compile(r"(bn_tf1\.\w+)\((?:axes=\(([\d, ]+)\), epsilon=([-+.\de]+))?\)$")


def _own_gradient(view: GraphView, node: int) -> tuple[str, Any, int] | None:
    """The name of the gradient at `node`, its settings, and where its inputs begin."""
    attribute = view.attribute(node, "_gradient_op_type")
    if attribute is None:  # somebody's own IdentityN
        return None
    name, inputs = attribute.s.decode("utf-8", "replace"), view.inputs[node]
    outputs = {NORMALIZE_BATCH: 1, NORMALIZE_PART: 1, OUTPUT_GRADIENTS: 3}
    old = _OF_0_1.match(name)
    if old and old.group(1) in outputs and old.group(2):
        axes = [int(axis) for axis in old.group(2).split(",") if axis.strip()]
        return old.group(1), (float(old.group(3)), *axes), outputs[old.group(1)]
    if name not in outputs or len(inputs) <= outputs[name]:
        return None
    settings = constant_at(view, inputs[outputs[name]])
    if settings is None or settings.dtype.kind != "f" or settings.ndim != 1:
        return None
    return name, tuple(settings), outputs[name] + 1


def match_own(view: GraphView, node: int) -> Normalization | None:
    """The batch norm that the IdentityN at `node` stands for, or None."""
    name, settings, first = _own_gradient(view, node) or (None, (), 0)
    is_whole = len(settings) > 1 and len(view.inputs[node]) >= first + 5
    if name not in (NORMALIZE_BATCH, NORMALIZE_PART) or not is_whole:
        return None
    x, mean, variance, gamma, beta = view.inputs[node][first : first + 5]
    epsilon, *channels = settings
    shape = static_shape(view, x)
    axes = None
    # The settings have the axes that are kept, which are fewer.
    if shape is not None:
        axes = tuple(axis for axis in range(len(shape)) if axis not in channels)
    operands = (gamma, beta, mean, variance)
    return composed(view, node, x, operands, float(epsilon), axes)


def gradient_kernels(view: GraphView, node: int) -> set[int]:
    """The fused kernels in the gradients of joint statistics, which end in a node that
    prevents second ones."""
    message = view.attribute(node, "message")
    if message is None or message.s.decode("utf-8", "replace") != NO_SECOND_DERIVATIVES:
        return set()
    reference = through_casts(view, view.inputs[node][0])
    if view.ops[node_of(reference)] == "Mul":  # the weights
        reference = through_casts(view, view.inputs[node_of(reference)][0])
    return _kernel(view, reference)


def _kernel(view, reference):
    node = node_of(reference)
    return {node} if is_fused(view.ops[node]) else set()


def own_kernels(view: GraphView, node: int) -> set[int]:
    """The fused kernels that serve `bn_tf1` to compute what the IdentityN at `node` gives.

    They are a part of its arithmetic, and no batch norm by themselves.
    """
    name, _, _ = _own_gradient(view, node) or (None, (), 0)
    if name is None:
        return set()
    reference = through_casts(view, view.inputs[node][0])
    if name == OUTPUT_GRADIENTS:
        # The share of dy comes first in the sum, and the weights in their product.
        for _ in range(2):
            if view.ops[node_of(reference)] in ("Add", "AddV2", "Mul"):
                second = view.inputs[node_of(reference)][1]
                reference = through_casts(view, second)
    return _kernel(view, reference)
