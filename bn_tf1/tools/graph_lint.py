"""Checks of somebody's graph."""

from __future__ import annotations

from typing import Any

from bn_tf1.tools.findings import Finding
from bn_tf1.tools.graph_view import GraphView, read_graph, view_of


def lint(graph: Any) -> list[Finding]:
    """What is wrong with the batch norm of a tf.Graph, GraphDef, MetaGraphDef or file."""
    return lint_view(read_graph(graph) if isinstance(graph, str) else view_of(graph))


def lint_view(view: GraphView) -> list[Finding]:
    """What is wrong with the batch norm of `view`."""
    return []
