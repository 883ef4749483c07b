"""The batch-norm layers of a graph."""

from __future__ import annotations

from typing import NamedTuple

from bn_tf1.tools.graph_view import GraphView


class GraphLayer(NamedTuple):
    """A batch-norm layer of a graph, with all calls that share its variables.

    Attributes:
        name: the scope of its variables, or of its nodes where it has none.
        kind: "fused", "composed" or "folded".
        op: the operations that normalise, such as "FusedBatchNormV3".
        gamma, beta, moving_mean, moving_variance: names of variables, or of constants
            of a frozen graph; None where there is none.
        decay: decay of the moving statistics; None where it is not known.
        epsilon: the number added to the variance; None where it is not known.
        layout: "NHWC", "NCHW" or "" where it is not known.
        mode: "training" (batch statistics), "inference" (moving statistics),
            "switched" (both, by a condition or by separate calls) or "unknown".
        node: name of the node that normalises.
    """

    name: str
    kind: str
    op: str
    gamma: str | None
    beta: str | None
    moving_mean: str | None
    moving_variance: str | None
    decay: float | None
    epsilon: float | None
    layout: str
    mode: str
    node: str


def find_layers(view: GraphView) -> list[GraphLayer]:
    """The layers of `view`, in the order of their nodes."""
    layers = []
    for node, op in enumerate(view.ops):
        if op.startswith("FusedBatchNorm") and "Grad" not in op:
            scope = view.names[node].rpartition("/")[0]
            layers.append(
                GraphLayer(scope, "fused", op, *[None] * 6, "", "unknown", scope)
            )
    return layers
