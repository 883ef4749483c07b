"""Checks of a graph: can it be imported and run at all?

A training graph of TensorFlow 1 may hold shapes that TensorFlow 2 does not accept. Freezing
puts a constant in the place of each variable and leaves what writes or reads the variable
as it was, where it does not know it. Such a graph looks whole, and its import fails:
"incompatible with expected float_ref", "... with expected resource". In a function, a value
may be returned under the name that the read of a variable gave it.
"""

from __future__ import annotations

import re
from typing import Iterator

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.node_values import ASSIGNMENTS, LOCKED_AVERAGES, origins
from bn_tf1.graphs.view import node_of

_MOST = 3
_FUSED_GRADIENT = re.compile(r"FusedBatchNormGrad(V\d+)?$")
# Of its outputs, those that hold nothing for a caller.
_FIRST_UNUSED = 3
# What takes a variable as its first input, and no value.
_READS = {"ReadVariableOp", "ResourceGather", "VarIsInitializedOp"}
_OF_VARIABLES = ASSIGNMENTS | LOCKED_AVERAGES | _READS


def check_frozen(facts: Facts) -> Iterator[Finding]:
    """Variables that became constants beneath what writes or reads a variable."""
    view = facts.view
    broken: dict[str, list[tuple[str, str]]] = {}
    # By node: each write of a large graph asks.
    layer_of = {
        node: analysis.layer.name
        for analysis in facts.layers
        for role in STATISTICS
        for node in analysis.variables[role]
    }
    for node, op in enumerate(view.ops):
        if op not in _OF_VARIABLES or not view.inputs[node]:
            continue
        ends = {node_of(end) for end in origins(view, view.inputs[node][0])}
        if all(view.ops[end] == "Const" for end in ends):
            layer = next((layer_of[end] for end in ends if end in layer_of), "")
            names = ", ".join(sorted(view.names[end] for end in ends))
            told = f"{view.names[node]} ({op}) takes the constant {names}"
            broken.setdefault(layer, []).append((view.names[node], told))
    # A function returns what its variable's read was called before it was frozen.
    for place in view.unanswered:
        told = f"no node gives what a function returns, {place}"
        broken.setdefault("", []).append((place.partition(":")[0], told))
    for layer, places in broken.items():
        names = ", ".join(name for name, _ in places[:_MOST])
        told = "; ".join(told for _, told in places[:_MOST])
        more = f"; and {len(places) - _MOST} more" if len(places) > _MOST else ""
        what = f"The graph cannot be imported or run: {told}{more}."
        yield found_by("broken-freeze", "certain", names, what, layer=layer)


def check_stored_shapes(facts: Facts) -> Iterator[Finding]:
    """Gradients of fused batch norms whose stored shapes TensorFlow 2 refuses."""
    view = facts.view
    refused = [
        view.names[node]
        for node, op in enumerate(view.ops)
        if _FUSED_GRADIENT.match(op) and _has_other_shapes(view, node)
    ]
    if refused:
        what = (
            f"{len(refused)} gradients of fused batch norms in inference mode hold "
            "the shape [channels] of outputs that are empty in TensorFlow 2."
        )
        names = ", ".join(refused[:_MOST])
        yield found_by("stored-shapes", "certain", names, what)


def _has_other_shapes(view, node):
    """Whether its last outputs have a shape that only TensorFlow 1 infers.

    It does in inference mode alone; and shapes within functions are inferred anew.
    """
    mode, stored = (
        view.attribute(node, name) for name in ("is_training", "_output_shapes")
    )
    if mode is None or mode.b or stored is None or view.body_of(node):
        return False
    sizes = [[size.size for size in shape.dim] for shape in stored.list.shape]
    return any(shape != [0] for shape in sizes[_FIRST_UNUSED:])
