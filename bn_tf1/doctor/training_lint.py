"""What a train op is told about the whole graph: layers of any maker are checked.

`bn_tf1.train_step` refuses to leave out an update that `batch_norm` made. What other
layers of the graph suffer from is a warning, one line each: the graph is the user's.
"""

from __future__ import annotations

import functools
from typing import Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.doctor.lint import lint
from bn_tf1.train_step import train_op

# What training does wrong; a saver may be made after the train op.
_NOT_RUN = ("update-not-run", "update-collection-not-run")
_CHECKS = (
    "no-update",
    "merged-update-not-made",
    "update-in-branch",
    "several-updates",
    "one-value-per-channel",
)


def warn_of_training(
    graph: tf.Graph, *, ignored_layers: Sequence[str], are_chosen: bool
) -> None:
    """Logs what is wrong with the training of a graph that has its train op.

    Args:
        ignored_layers: variable scopes of layers that are left to another train op.
        are_chosen: whether the user chose the updates, and so leaves the others to
            another train op.
    """
    checks = _CHECKS if are_chosen else _CHECKS + _NOT_RUN
    for finding in lint(graph):
        # A note is no reason to interrupt; who wants all asks lint.
        is_grave = finding.gravity != "note" and finding.check in checks
        if is_grave and finding.layer not in ignored_layers:
            tf.logging.warning(
                "batch norm %s: %s %s", finding.layer, finding.what, finding.remedy
            )


# A function and no `functools.partial`, whose help would begin with its addresses.
@functools.wraps(train_op.make_train_op, assigned=("__name__", "__doc__"))
def make_train_op(*arguments, **options):
    options.setdefault("lint", warn_of_training)
    return train_op.make_train_op(*arguments, **options)
