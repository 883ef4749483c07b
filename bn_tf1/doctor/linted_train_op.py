"""`make_train_op` with a look at the whole graph: layers of any maker are checked.

`bn_tf1.train_op` refuses to leave out an update that `batch_norm` made. What other
layers of the graph suffer from is a warning, one line each: the graph is the user's.
"""

from __future__ import annotations

import functools
from typing import Any, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import train_op
from bn_tf1.doctor.lint import lint

# What training does wrong; a saver may be made after the train op.
_NOT_RUN = ("update-not-run", "update-collection-not-run")
_CHECKS = ("no-update", "update-in-branch", "several-updates", "one-value-per-channel")


@functools.wraps(train_op.make_train_op)
def make_train_op(
    loss: tf.Tensor,
    optimizer: tf.train.Optimizer,
    *,
    ignored_layers: Sequence[str] = (),
    **options: Any,
) -> tf.Operation:
    operation = train_op.make_train_op(
        loss, optimizer, ignored_layers=ignored_layers, **options
    )
    # Who chooses the updates leaves the others to another train op.
    checks = _CHECKS if options.get("update_ops") is not None else _CHECKS + _NOT_RUN
    for finding in lint(loss.graph):
        is_grave = finding.gravity != "note" and finding.check in checks
        if is_grave and finding.layer not in ignored_layers:
            tf.logging.warning(
                "batch norm %s: %s %s", finding.layer, finding.what, finding.remedy
            )
    return operation
