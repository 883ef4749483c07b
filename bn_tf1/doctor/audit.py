"""What is wrong with the batch norm of a checkpoint, as a function.

    import bn_tf1
    for finding in bn_tf1.audit("model.ckpt-1000"): ...

Contract: no model code is needed, nothing is imported into TensorFlow or run. Tensors are
read in pieces, so that memory does not grow with the checkpoint.
"""

from __future__ import annotations

import os

from bn_tf1.doctor.examination import examine
from bn_tf1.doctor.findings import Finding


def audit(checkpoint: str) -> list[Finding]:
    """What is wrong, or may be, with the batch norm of a checkpoint.

    Args:
        checkpoint: prefix of a checkpoint ("model.ckpt-1000"), its .index file, or a
            training directory or the directory of a SavedModel; the findings on these
            include those on their graph.

    Returns:
        The findings, the gravest first.

    Raises:
        ValueError: there is no checkpoint, or it cannot be read.
    """
    examination = examine(os.fspath(checkpoint))
    if examination.kind == "graph":
        raise ValueError(f"{checkpoint} is a graph and no checkpoint: use bn_tf1.lint")
    return list(examination.findings)
