"""Two graphs compared part by part, so that no network hides an error or makes one up.

A network amplifies what happens in its first layers, by a thousand where it is deep and
little trained: the outputs of two right graphs then differ by more than those of a right
and a wrong one whose last layer has another epsilon. Here each part is given the very
same values, those of the graph before, and only what it makes of them is compared:

    cuts    what both graphs have: results of weights, of activations, of folded layers
    odd     is given, and the even ones and the outputs are compared; then the other way
"""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.rewriting.dead_branches import SWITCHES
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, node_name
from bn_tf1.graphs.rewriting.folding import LINEAR
from bn_tf1.serving.isolated_run import Isolated

# NumPy's own: a file of arrays loses what bfloat16 is.
_DTYPES = [d.as_datatype_enum for d in (tf.float16, tf.float32, tf.float64)]
_ACTIVATIONS = frozenset(
    ["Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Softplus", "Tanh", "Sigmoid"]
)


def differences_by_part(
    before: EditableGraph,
    after: EditableGraph,
    feed: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    isolated: Isolated,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(node, what it gives, what it gave) of each part and output.

    Args:
        before: the graph that is right.
        after: the graph that is compared with it.
        feed: what both take.
        outputs: the names of their outputs.
        isolated: runs them.

    Raises:
        IsolatedError: one of them cannot be run.
    """
    cuts = [name for name in _common_cuts(before, after) if name not in outputs]
    names = [*cuts, *outputs]
    # As written: 2.21 fuses a node away that is given or asked for (LeakyRelu after a
    # bias), and then does not find it.
    (values,) = isolated.run(before, [feed], names, as_written=True)
    right = dict(zip(names, values))
    found = []
    for first in (0, 1):
        given = {**feed, **{name: right[name] for name in cuts[first::2]}}
        asked = [*cuts[1 - first :: 2], *outputs]
        (own,) = isolated.run(after, [given], asked, as_written=True)
        found += [(name, value, right[name]) for name, value in zip(asked, own)]
    return found


def _common_cuts(before, after):
    """The nodes that mean the same in both graphs, in the order of the data."""
    placed = _in_branches_and_loops(after)
    return [
        name
        for name in after.in_order()
        if name in before.nodes
        and name not in placed
        and _is_cut(before.nodes[name], after.nodes[name])
    ]


def _in_branches_and_loops(graph):
    """What nobody can give or take at will: what depends on a branch or a loop."""
    begins = (*SWITCHES, "Enter", "RefEnter")
    return graph.descendants(n for n, node in graph.nodes.items() if node.op in begins)


def _is_cut(before, after):
    if after.op in _ACTIVATIONS:
        is_same = before.op == after.op
    elif after.op in LINEAR:
        # With other weights it gives something else: a layer was folded into it.
        sources = [[node_name(i) for i in node.input] for node in (before, after)]
        is_same = before.op == after.op and sources[0] == sources[1]
    else:
        is_same = len(after.input) > 1 and after.input[1] == f"{after.name}/folded"
    return is_same and after.attr["T"].type in _DTYPES
