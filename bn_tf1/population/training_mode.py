"""What has to be fed so that batch norm trains, and nothing else does.

A condition on a tensor `is_training` has a copy of it for itself (`cond/pred_id`). Fed
are the copies of the conditions that normalise; dropout has conditions of its own, and
stays in inference, where the statistics shall be right. What is constant in a branch
waits for the original and not for the copy (its *pivot*), which has to be changed.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple, Sequence

from bn_tf1.graphs.layer_analysis import Analysis
from bn_tf1.graphs.node_values import leaves, same_values
from bn_tf1.graphs.training_nodes import Conditions
from bn_tf1.graphs.view import BRANCHES, GraphView, node_of, port_of, reference_to

_SWITCHES = ("Switch", "RefSwitch")
_STEPS = 200


class TrainingSwitches(NamedTuple):
    """How to switch to training; predicates are references to bools.

    Attributes:
        conditions: what the conditions of the layers depend on, and its value.
        origins: where that comes from, such as a placeholder, and its value.
        pivots: by node of a Switch that waits for the original, the copy.
    """

    conditions: dict[int, bool]
    origins: dict[int, bool]
    pivots: dict[int, int]


def training_mode(
    view: GraphView, conditions: Conditions, layers: Sequence[Analysis]
) -> TrainingSwitches:
    """How to switch `layers` to training; empty where nothing switches them."""
    mode = TrainingSwitches({}, {}, {})
    for layer in layers:
        for call in layer.calls:
            if call.mode != "inference":
                for reference in _in_branches(view, call):
                    _switch(view, conditions, reference, mode)
    return mode


def _in_branches(view, call) -> Iterable[int]:
    """What is there only where `call` uses the statistics of the batch."""
    yield reference_to(call.node)
    if call.kind == "composed":
        yield from _of_batch(view, call.mean)
        yield from _of_batch(view, call.variance)


def _of_batch(view, reference):
    """What a condition gives when it gives the batch's statistic."""
    for _ in range(_STEPS):
        earlier = same_values(view, reference)
        if len(earlier) > 1:
            for way in earlier:
                found = leaves(view, way)
                if found.reductions or found.statistics:
                    yield way
            return
        if not earlier:
            return
        reference = earlier[0]


def _switch(view, conditions, reference, mode):
    node = node_of(reference)
    for predicate, branch in conditions.of(node):
        if view.ops[node_of(predicate)] != "LoopCond":
            _note_origins(view, predicate, bool(branch), mode)
    copies = {}
    for switch, branch in _switches(view, conditions, reference):
        predicate = view.inputs[switch][1]
        origin = _origin(view, predicate)
        if predicate == view.inputs[switch][0] and origin in copies:
            mode.pivots[switch] = copies[origin]
            continue
        copies[origin] = predicate
        mode.conditions.setdefault(predicate, branch)
        _note_origins(view, predicate, branch, mode)
    body = view.body_of(node)
    for caller in view.callers.get(body, ()):
        chosen = view.attribute(caller, "then_branch")
        if view.ops[caller] in BRANCHES and chosen is not None:
            predicate = view.inputs[caller][0]
            branch = chosen.func.name == view.bodies[body].name
            mode.conditions.setdefault(predicate, branch)
            _note_origins(view, predicate, branch, mode)


def _switches(view, conditions, reference):
    """(Switch, branch) by which a branch gets what is outside; those of pivots last."""
    found, pivots = [], []
    seen, pending = set(), [reference]
    while pending and len(seen) < _STEPS:
        reference = pending.pop()
        node = node_of(reference)
        if node in seen:
            continue
        seen.add(node)
        if view.ops[node] in _SWITCHES:
            is_pivot = len(set(view.inputs[node])) == 1
            (pivots if is_pivot else found).append((node, bool(port_of(reference))))
        elif conditions.of(node):
            pending += view.inputs[node]
            pending += [reference_to(control) for control in view.controls[node]]
    return found + pivots


def _note_origins(view, predicate, branch, mode):
    """Notes what `predicate` depends on, through copies and logic."""
    pending = [(predicate, branch)]
    for _ in range(_STEPS):
        if not pending:
            break
        reference, value = pending.pop()
        reference = _origin(view, reference)
        op, inputs = view.ops[node_of(reference)], view.inputs[node_of(reference)]
        if op in ("LogicalOr", "LogicalAnd"):
            pending += [(operand, value) for operand in inputs]
        elif op == "LogicalNot":
            pending.append((inputs[0], not value))
        else:
            mode.origins.setdefault(reference, value)


def _origin(view, reference):
    for _ in range(_STEPS):
        earlier = same_values(view, reference)
        if len(earlier) != 1 or view.ops[node_of(reference)].startswith("Placeholder"):
            break
        reference = earlier[0]
    return reference
