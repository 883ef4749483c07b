"""Batch norms that `bn_tf1` composes, with a gradient that is written by hand.

The gradient is attached to an IdentityN whose inputs are the output, x and the operands,
and whose name tells the axes and the epsilon.
"""

from __future__ import annotations

import re

from bn_tf1.graphs.node_values import is_fused, leaves, static_shape
from bn_tf1.graphs.recognition.batch_statistics import layout_of, through_casts
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.view import GraphView, node_of

# As `bn_tf1.statistics.composed` registers it.
_OWN_GRADIENT = re.compile(
    rb"bn_tf1\.normalize_batch\(axes=\(([\d, ]+)\), epsilon=([-+.\de]+)\)$"
)
# That, and what `bn_tf1.statistics.output_gradients` registers.
_OWN_ARITHMETIC = re.compile(rb"bn_tf1\.(normalize_batch|output_gradients)\(")


def match_own(view: GraphView, node: int) -> Normalization | None:
    """The batch norm that the IdentityN at `node` stands for, or None."""
    gradient = view.attribute(node, "_gradient_op_type")
    named = gradient is not None and _OWN_GRADIENT.match(gradient.s)
    if not named or len(view.inputs[node]) < 6:
        return None
    _, x, mean, variance, gamma, beta = view.inputs[node][:6]
    shape = static_shape(view, x)
    channels = {int(axis) for axis in named.group(1).split(b",") if axis.strip()}
    axes = None
    if shape is not None:
        axes = tuple(axis for axis in range(len(shape)) if axis not in channels)
    return Normalization(
        node,
        "composed",
        view.ops[node],
        x,
        gamma,
        beta,
        mean,
        variance,
        leaves(view, mean),
        leaves(view, variance),
        float(named.group(2)),
        layout_of(view, x, axes),
        "training",
        axes,
    )


def own_kernels(view: GraphView, node: int) -> set[int]:
    """The fused kernels that serve `bn_tf1` to compute what the IdentityN at `node` gives.

    They are a part of its arithmetic, and no batch norm by themselves.
    """
    gradient = view.attribute(node, "_gradient_op_type")
    named = gradient is not None and _OWN_ARITHMETIC.match(gradient.s)
    if not named:
        return set()
    reference = through_casts(view, view.inputs[node][0])
    if named.group(1) == b"output_gradients":
        # The share of dy comes first in the sum, and the weights in their product.
        for _ in range(2):
            if view.ops[node_of(reference)] in ("Add", "AddV2", "Mul"):
                second = view.inputs[node_of(reference)][1]
                reference = through_casts(view, second)
    kernel = node_of(reference)
    return {kernel} if is_fused(view.ops[kernel]) else set()
