"""The places of a graph where something is normalised per channel over the batch.

    fused      one kernel: `fused_kernels`
    composed   arithmetic: `arithmetic`; what `bn_tf1` composes: `own_layers`

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

from bn_tf1.graphs.node_values import origin
from bn_tf1.graphs.recognition.arithmetic import ROOTS, match_composed
from bn_tf1.graphs.recognition.fused_kernels import FUSED_CONVOLUTIONS, match_fused
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.recognition.own_layers import (
    gradient_kernels,
    match_own,
    own_kernels,
)
from bn_tf1.graphs.view import GraphView


def find_normalizations(view: GraphView) -> list[Normalization]:
    """All places of `view` where a batch norm normalises, in the order of the nodes."""
    # A SavedModel of Keras also holds functions that only Python code would call. Where the
    # graph calls none at all, they are what there is.
    called = view.called_from([0])
    found, own, inner = [], [], set()
    for body in sorted(called) if len(called) > 1 else range(len(view.bodies)):
        for node in range(view.bodies[body].first, view.bodies[body].end):
            op = view.ops[node]
            if op in ROOTS:
                match = match_composed(view, node)
            # A search in the name first: most nodes are none, and patterns are slow.
            elif "BatchNorm" in op or op in FUSED_CONVOLUTIONS:
                match = match_fused(view, node)
            elif op == "IdentityN":
                match = match_own(view, node)
                own += [match] if match is not None else []
                inner.update(own_kernels(view, node))
            elif op == "PreventGradient":
                inner.update(gradient_kernels(view, node))
                continue
            else:
                continue
            if match is not None:
                found.append(match)
    # The arithmetic below one of ours, and that of its gradient, takes its statistics; a
    # kernel may compute the output for the moments that were composed, or a gradient.
    variances = {origin(view, match.variance) for match in own}

    def is_part(match):
        is_composed = match.kind == "composed" and match.variance is not None
        takes_one = is_composed and origin(view, match.variance) in variances
        return match.node in inner or takes_one

    return [match for match in found if match in own or not is_part(match)]
