"""Batch statistics and the normalisation that uses them: pure functions.

Purpose: everything of batch normalization that is arithmetic on tensors, with no
variable, no collection and no mode.

The seam: whatever returns a `Moments` for a batch can be put in the place of
`batch_moments`; each way of computing them has its own module.
"""

from bn_tf1.statistics.moments import (
    Moments,
    batch_moments,
    channel_axes,
    reduction_axes,
    static_count,
    statistics_dtype,
    unbiased_variance,
)
from bn_tf1.statistics.output import normalize

__all__ = [
    "Moments",
    "batch_moments",
    "channel_axes",
    "normalize",
    "reduction_axes",
    "static_count",
    "statistics_dtype",
    "unbiased_variance",
]
