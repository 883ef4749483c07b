"""Batch statistics and the normalisation that uses them: pure functions.

Purpose: everything of batch normalization that is arithmetic on tensors, with no
variable, no collection and no mode.

The seam: whatever returns a `Moments` for a batch can be put in the place of
`batch_moments`, and in front of `normalize_with_moments`; each way of computing them has
its own module. What computes what is decided in `plan` alone.

    plan                                   kernel, view and layout of a tensor
    fused, composed                        the two ways; `channels` is their arithmetic
    moments, formula, output_gradients     what goes from one to the other
    weighted, ghost_batches, joint_batches  a mask; parts of a batch; several batches
    renormalization                        batch renormalisation
    folded_weights                         constant statistics, in the weights before them
    registered_gradients                   the names of gradients by hand
"""

from bn_tf1.statistics.composed import batch_moments, normalize_with_moments
from bn_tf1.statistics.composed import normalize_batch as normalize_composed
from bn_tf1.statistics.folded_weights import normalize as normalize_folded
from bn_tf1.statistics.folded_weights import why_not_folded
from bn_tf1.statistics.formula import (
    ACTIVATIONS,
    activated,
    normalize,
    normalize_constant,
    scale_and_shift,
)
from bn_tf1.statistics.fused import normalize_batch as normalize_fused
from bn_tf1.statistics.ghost_batches import join_ghost_batches, split_ghost_batches
from bn_tf1.statistics.joint_batches import joint_of, normalize_part, part_moments
from bn_tf1.statistics.moments import (
    BatchOutput,
    Moments,
    count_of,
    degrees_of_freedom,
    in_dtype,
    unbiased_variance,
)
from bn_tf1.statistics.plan import (
    KERNELS,
    Plan,
    channel_axes,
    channels_for_arithmetic,
    plan_of,
    statistics_dtype,
)
from bn_tf1.statistics.renormalization import Renormalization, renorm_correction
from bn_tf1.statistics.weighted import weighted_moments, weights_like

__all__ = ["KERNELS", "Plan", "channel_axes", "channels_for_arithmetic", "plan_of"]
__all__ += ["count_of", "degrees_of_freedom", "in_dtype", "statistics_dtype"]
__all__ += ["Moments", "batch_moments", "weighted_moments", "weights_like"]
__all__ += ["joint_of", "normalize_part", "part_moments", "unbiased_variance"]
__all__ += ["BatchOutput", "normalize_composed", "normalize_fused"]
__all__ += ["join_ghost_batches", "normalize_with_moments", "split_ghost_batches"]
__all__ += ["normalize", "normalize_constant", "normalize_folded", "why_not_folded"]
__all__ += ["ACTIVATIONS", "activated", "scale_and_shift"]
__all__ += ["Renormalization", "renorm_correction"]
