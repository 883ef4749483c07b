"""Checks of the batch norm in somebody's graph, made by any library.

    from bn_tf1.doctor.lint import lint
    for finding in lint("model.ckpt-1000.meta"): ...

Contract: the graph is parsed and read, never imported or run; whatever is in it, the
result is a list of findings in bounded time. A healthy graph has no finding of gravity
"error". A graph does not tell what a program fetches: that an update is not among what a
train op runs is called "likely" and not "certain" for this reason.

The checks are in `graph_checks.updates` (does anybody run the updates), `graph_checks.modes`
(batch or moving statistics), `graph_checks.importing` (can it be imported at all) and
`graph_checks.settings` (all else).
"""

from __future__ import annotations

import os
from typing import Any

from bn_tf1.doctor.findings import Finding, by_gravity
from bn_tf1.doctor.graph_checks import importing, modes, settings, updates
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.view import read_graph, view_of

# Findings of one gravity are told in this order.
_CHECKS = (
    updates.check_updates_run,
    updates.check_branches,
    updates.check_several_updates,
    updates.check_zero_debias,
    modes.check_inference_mode,
    modes.check_training_mode,
    modes.check_single_values,
    importing.check_frozen,
    importing.check_stored_shapes,
    settings.check_saver,
    settings.check_trained_statistics,
    settings.check_decay,
    settings.check_epsilon,
    settings.check_weight_decay,
    settings.check_bias,
    settings.check_presence,
)


def lint(graph: Any) -> list[Finding]:
    """What is wrong, or may be, with the batch norm of a graph.

    Args:
        graph: a tf.Graph, GraphDef or MetaGraphDef, or the path of a .meta file, of a
            GraphDef (frozen graph, graph.pbtxt) or of a SavedModel.

    Returns:
        The findings, the gravest first.

    Raises:
        TypeError: `graph` is none of these.
        ValueError: the file cannot be read, is damaged, or is no graph.
    """
    if isinstance(graph, (str, os.PathLike)):
        path = os.fspath(graph)
        # The prefix of a checkpoint is no file: to be told that there is none would not
        # help.
        if os.path.exists(path + ".index") and not os.path.exists(path):
            raise ValueError(
                f"{path} is a checkpoint, whose graph is {path}.meta: `lint` tells of "
                "that, bn_tf1.audit of the checkpoint"
            )
        return lint_facts(Facts(read_graph(path)))
    return lint_facts(Facts(view_of(graph)))


def lint_facts(facts: Facts) -> list[Finding]:
    """As `lint`, for a graph whose facts are known already."""
    findings = [finding for check in _CHECKS for finding in check(facts)]
    return by_gravity(findings)
