"""Batch statistics and the normalisation that uses them: pure functions.

Purpose: everything of batch normalization that is arithmetic on tensors, with no
variable, no collection and no mode.

The seam: whatever returns a `Moments` for a batch can be put in the place of
`batch_moments`; each way of computing them has its own module.
"""

from bn_tf1.statistics.ghost_batches import join_ghost_batches, split_ghost_batches
from bn_tf1.statistics.moments import (
    Moments,
    batch_moments,
    channel_axes,
    parameter_shape,
    reduction_axes,
    static_count,
    statistics_dtype,
    unbiased_variance,
)
from bn_tf1.statistics.output import normalize, scale_and_shift
from bn_tf1.statistics.renormalization import (
    Correction,
    Renormalization,
    renorm_correction,
)
from bn_tf1.statistics.weighted import weighted_moments, weights_like

__all__ = [
    "Correction",
    "Moments",
    "Renormalization",
    "batch_moments",
    "channel_axes",
    "join_ghost_batches",
    "normalize",
    "parameter_shape",
    "reduction_axes",
    "renorm_correction",
    "scale_and_shift",
    "split_ghost_batches",
    "static_count",
    "statistics_dtype",
    "unbiased_variance",
    "weighted_moments",
    "weights_like",
]
