"""What is said of a place of a graph where something is normalised over the batch."""

from __future__ import annotations

from typing import NamedTuple

from bn_tf1.graphs.node_values import Leaves


class Normalization(NamedTuple):
    """One place where something is normalised.

    Attributes:
        node: the node; the last multiplication or addition of a composed one.
        kind: "fused" or "composed".
        op: the operation, or the inverse deviation's: "Rsqrt", "Sqrt" or "Pow".
        x: reference to what is normalised.
        gamma, beta: references, or None.
        mean, variance: references to the statistics that normalise; None for a fused
            one that computes them itself.
        mean_leaves, variance_leaves: what these are computed from.
        epsilon: the number added to the variance; None where it is not known.
        layout: "NHWC", "NCHW" or "".
        mode: "training", "inference" or "switched".
        axes: the axes that are reduced, or None.
    """

    node: int
    kind: str
    op: str
    x: int
    gamma: int | None
    beta: int | None
    mean: int | None = None
    variance: int | None = None
    mean_leaves: Leaves | None = None
    variance_leaves: Leaves | None = None
    epsilon: float | None = None
    layout: str = ""
    mode: str = "training"
    axes: tuple[int, ...] | None = None
