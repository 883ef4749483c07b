"""Checks of a graph: who runs the updates of the moving statistics, and how often."""

from __future__ import annotations

from typing import Iterator

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.node_values import LOCKED_AVERAGES, VARIABLES, variable_name
from bn_tf1.graphs.view import node_of
from bn_tf1.moving_averages import MERGED_MARK, UPDATE_OPS_COLLECTION

# Times the way to the batch from which the distance grows in each step.
_DIVERGES = 2.0
_SETTING = {"Assign", "AssignVariableOp"}
# Nodes that are looked at before an update for one that it waits for.
_NEARBY = 200
_MOST_NAMES = 4


def check_updates_run(facts: Facts) -> Iterator[Finding]:
    """Moving statistics that no training step updates."""
    if not facts.training.applies:
        return
    for analysis in facts.layers:
        calls = [call for call in analysis.calls if call.mode != "inference"]
        # It is of a network beside the one that is trained, such as that for
        # evaluation.
        if not any(facts.runs_in_training(call) for call in calls):
            continue
        statistics = [
            node
            for role in STATISTICS
            for node in analysis.variables[role]
            if facts.view.ops[node] in VARIABLES
        ]
        writes = {node: facts.writes(analysis, node) for node in statistics}
        lost = [
            node
            for node in statistics
            if not any(facts.training.runs[write] for write in writes[node])
        ]
        if statistics and not lost:
            continue
        # That it is there and does not run is another fault than that there is none.
        ignored = sorted({write for node in lost for write in writes[node]})
        if ignored:
            yield _not_run(facts, analysis, lost, ignored)
        else:
            yield _no_update(facts, analysis, lost)


def _no_update(facts, analysis, lost):
    layer, names = analysis.layer, facts.names_of(lost)
    if _is_to_be_merged(facts.view, analysis.calls):
        what = (
            "The updates of the calls of the layer are to be merged into one, which "
            "bn_tf1.make_train_op makes, and nothing in the graph updates "
            f"{names or 'its moving statistics'}."
        )
        where = names or layer.node
        return found_by(
            "merged-update-not-made", "certain", where, what, layer=layer.name
        )
    if not lost:
        what = "The layer normalises with batch statistics and has no moving ones."
        return found_by(
            "no-moving-statistics", "possible", layer.node, what, layer=layer.name
        )
    what = (
        "The layer is trained with batch statistics, but no operation of the graph "
        f"updates {names}."
    )
    return found_by(
        "no-update", "certain", names, what, layer=layer.name, name=layer.name
    )


def _is_to_be_merged(view, calls):
    """Whether a call of a layer stands in a scope with the mark of merged updates."""
    for call in calls:
        scope = view.names[call.node].rpartition("/")[0]
        while scope:
            if view.find(f"{scope}/{MERGED_MARK}") is not None:
                return True
            scope = scope.rpartition("/")[0]
    return False


def _not_run(facts, analysis, lost, updates):
    view = facts.view
    names = [view.names[node] for node in updates]
    collections = {
        key
        for key, members in view.collections.items()
        if not {member.split(":")[0] for member in members}.isdisjoint(names)
    }
    # One of its own name tells that somebody chose it, and forgot it later.
    if collections and UPDATE_OPS_COLLECTION not in collections:
        custom = min(collections)
        check, source = "update-collection-not-run", f"tf.get_collection({custom!r})"
        place = f"They are in the collection {custom!r}, from which nothing takes them."
    elif collections:
        check, source = "update-not-run", "tf.get_collection(tf.GraphKeys.UPDATE_OPS)"
        place = f"They are in the collection {UPDATE_OPS_COLLECTION!r}."
    else:
        check, source = "update-not-run", "layer.updates"
        place = "They are in no collection, as those of a Keras layer in a graph."
    # Whoever grouped them may fetch the group beside the train op: no graph tells.
    is_grouped = any(
        view.ops[later] == "NoOp" for node in updates for later in view.runs_after(node)
    )
    if is_grouped:
        place += " Only a tf.group apart from the train op waits for them."
    return found_by(
        check,
        "possible" if is_grouped else "likely",
        ", ".join(names[:_MOST_NAMES]),
        f"No train op runs the {len(updates)} update operations of "
        f"{facts.names_of(lost)}. {place}",
        gravity="warning" if is_grouped else "error",
        layer=analysis.layer.name,
        updates=source,
    )


def check_branches(facts: Facts) -> Iterator[Finding]:
    """Updates inside of a condition or loop that nothing in there waits for."""
    for analysis in facts.layers:
        inside = [u.node for u in analysis.updates if _is_loose(facts, u.node)]
        misled = [
            u.node
            for u in analysis.updates
            if facts.conditions.misleading(u.node, facts.training.applies)
        ]
        names = [facts.view.names[node] for node in sorted({*inside, *misled})]
        if not names:
            continue
        told = ", ".join(names[:_MOST_NAMES])
        what = f"The update {told} is inside of a condition or loop. "
        what += (
            "The train op waits for it, and stops where the branch is not taken."
            if misled
            else "Nothing in there waits for it, and what is outside cannot."
        )
        sure = "certain" if misled else "likely"
        yield found_by("update-in-branch", sure, told, what, layer=analysis.layer.name)


def _is_loose(facts, node):
    """In a branch or loop body whose result does not depend on it."""
    if not facts.conditions.in_called_body(node):
        in_training = facts.training.applies and not facts.training.runs[node]
        # It stands in the graph itself, as in control flow v1: loose is what no step runs.
        if not (in_training and facts.conditions.of(node)):
            return False
        return not facts.leads_out(node)
    return not facts.runs_with_its_body(node)


def check_several_updates(facts: Facts) -> Iterator[Finding]:
    """Variables that one training step updates several times."""
    for analysis in facts.layers:
        for node in (n for role in STATISTICS for n in analysis.variables[role]):
            nodes = _together(facts, facts.writes(analysis, node))
            if len(nodes) > 1:
                yield _several(facts, analysis.layer, nodes, node)
                break  # one for a layer: its mean and its variance move together


def _together(facts, writes):
    """The writes that a training step runs, one of two that exclude each other."""
    found: list[int] = []
    for node in writes:
        if not facts.training.runs[node]:
            continue
        if not any(_exclude(facts, node, other) for other in found):
            found.append(node)
    return found


def _exclude(facts, node, other):
    """Whether they are in the two branches of one condition, of either control flow."""
    own = facts.conditions.of(node)
    if any(
        (predicate, 1 - branch) in own
        for predicate, branch in facts.conditions.of(other)
    ):
        return True
    bodies = facts.view.body_of(node), facts.view.body_of(other)
    # Of control flow v2: two functions that one node calls are its branches.
    return bodies[0] != bodies[1] and any(
        set(bodies) <= set(called) for called in facts.view.called.values()
    )


def _several(facts, layer, nodes, variable):
    view, decay, count = facts.view, layer.decay, len(nodes)
    name = variable_name(view, variable)
    # Nearby, as make_train_op puts one behind the other.
    in_order = all(
        earlier in _awaited(view, later) for earlier, later in zip(nodes, nodes[1:])
    )
    gravity = "note" if in_order else "warning"
    reach = 0.0
    what = f"{count} operations update {name} in one training step"
    if decay is not None:
        what += f" ({count} times decay {decay:g} is {decay**count:g})"
        # What reads and writes under one lock never takes an old value; and of several
        # values that are set, the last one stays.
        kinds = LOCKED_AVERAGES | _SETTING
        at_once = [node for node in nodes if view.ops[node] not in kinds]
        reach = 0.0 if in_order else len(at_once) * (1 - decay)
    what += f": {', '.join(view.names[node] for node in nodes[:_MOST_NAMES])}."
    if reach > 1:
        what += (
            f" They read one old value: together they move it {reach:.3g} times the "
        )
        what += "way to the batch."
    if reach >= _DIVERGES:
        gravity = "error"
    return found_by(
        "several-updates", "likely", name, what, gravity=gravity, layer=layer.name
    )


def _awaited(view, node):
    """What `node` waits for, up to some steps away, control inputs first."""
    # Breadth first, and not far: what waits by accident waits a long way off.
    found, pending = {node}, [node]
    while pending and len(found) < _NEARBY:
        current = pending.pop(0)
        for earlier in (*view.controls[current], *map(node_of, view.inputs[current])):
            if earlier not in found:
                found.add(earlier)
                pending.append(earlier)
    return found


def check_zero_debias(facts: Facts) -> Iterator[Finding]:
    """Hidden variables of zero-debiased averages."""
    for analysis in facts.layers:
        hidden = {u.variable for u in analysis.updates if u.debiased}
        if not hidden:
            continue
        told = facts.names_of(hidden)
        names = told.split(", ")
        counters = [name.rpartition("/")[0] + "/local_step" for name in names]
        saved = facts.names_of(facts.saved_by(facts.saves())).split(", ")
        yield found_by(
            "zero-debias",
            "possible",
            told,
            f"The moving statistics are zero-debiased, by {told} and a counter.",
            # Where both are saved, a restore loses nothing.
            gravity="note" if set(names + counters) <= set(saved) else "warning",
            layer=analysis.layer.name,
        )
