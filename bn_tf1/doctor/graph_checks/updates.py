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


def check_updates_run(facts: Facts) -> Iterator[Finding]:
    """Moving statistics that no training step updates."""
    if not facts.training.applies:
        return
    for analysis in facts.layers:
        calls = [call for call in analysis.calls if call.mode != "inference"]
        if not any(facts.runs_in_training(call) for call in calls):
            continue
        statistics = [
            node
            for role in STATISTICS
            for node in analysis.variables[role]
            if facts.view.ops[node] in VARIABLES
        ]
        if not statistics and not _is_to_be_merged(facts.view, analysis):
            yield _without_statistics(facts, analysis)
            continue
        writes = {node: facts.writes(analysis, node) for node in statistics}
        lost = [n for n in statistics if not _any_runs(facts, writes[n])]
        if statistics and not lost:
            continue
        # That it is there and does not run is another fault than that there is none.
        ignored = sorted({write for node in lost for write in writes[node]})
        if ignored:
            yield _not_run(facts, analysis, lost, ignored)
        else:
            yield _no_update(facts, analysis, lost)


def _any_runs(facts, nodes):
    return any(facts.training.runs[node] for node in nodes)


def _without_statistics(facts, analysis):
    return found_by(
        "no-moving-statistics",
        certainty="possible",
        layer=analysis.layer.name,
        where=analysis.layer.node,
        what="The layer normalises with batch statistics and has no moving ones.",
    )


def _no_update(facts, analysis, lost):
    if _is_to_be_merged(facts.view, analysis):
        return found_by(
            "merged-update-not-made",
            certainty="certain",
            layer=analysis.layer.name,
            where=facts.names_of(lost) or analysis.layer.node,
            what="The updates of the calls of the layer are to be merged into one, which "
            "bn_tf1.make_train_op makes, and nothing in the graph updates "
            f"{facts.names_of(lost) or 'its moving statistics'}.",
        )
    return found_by(
        "no-update",
        certainty="certain",
        layer=analysis.layer.name,
        where=facts.names_of(lost),
        what="The layer is trained with batch statistics, but no operation of the graph "
        f"updates {facts.names_of(lost)}.",
        name=analysis.layer.name,
    )


def _is_to_be_merged(view, analysis):
    """Whether a call of the layer stands in a scope with the mark of merged updates."""
    for call in analysis.calls:
        scope = view.names[call.node].rpartition("/")[0]
        while scope:
            if view.find(f"{scope}/{MERGED_MARK}") is not None:
                return True
            scope = scope.rpartition("/")[0]
    return False


def _not_run(facts, analysis, lost, updates):
    view = facts.view
    collections = _collections_with(view, {view.names[node] for node in updates})
    grouped = [node for node in updates if _is_grouped(view, node)]
    custom = sorted(set(collections) - {UPDATE_OPS_COLLECTION})
    # One of its own name tells that somebody chose it, and forgot it later.
    if custom and UPDATE_OPS_COLLECTION not in collections:
        check, source = "update-collection-not-run", f"tf.get_collection({custom[0]!r})"
        place = (
            f"They are in the collection {custom[0]!r}, from which nothing takes them."
        )
    elif collections:
        check, source = "update-not-run", "tf.get_collection(tf.GraphKeys.UPDATE_OPS)"
        place = f"They are in the collection {UPDATE_OPS_COLLECTION!r}."
    else:
        check, source = "update-not-run", "layer.updates"
        place = "They are in no collection, as those of a Keras layer in a graph."
    if grouped:
        place += " Only a tf.group apart from the train op waits for them."
    names = ", ".join(view.names[node] for node in updates[:4])
    return found_by(
        check,
        gravity="warning" if grouped else "error",
        certainty="possible" if grouped else "likely",
        layer=analysis.layer.name,
        where=names,
        what=f"No train op runs the {len(updates)} update operations of "
        f"{facts.names_of(lost)}. {place}",
        updates=source,
    )


def _collections_with(view, names):
    found = []
    for key, members in sorted(view.collections.items()):
        if any(member.split(":")[0] in names for member in members):
            found.append(key)
    return found


def _is_grouped(view, node):
    """Whether an operation that does nothing else waits for `node`."""
    return any(view.ops[later] == "NoOp" for later in view.runs_after(node))


def check_branches(facts: Facts) -> Iterator[Finding]:
    """Updates inside of a condition or loop that nothing in there waits for."""
    for analysis in facts.layers:
        inside = [u.node for u in analysis.updates if _is_loose(facts, u.node)]
        misled = [
            u.node
            for u in analysis.updates
            if facts.conditions.misleading(u.node, facts.training.applies)
        ]
        nodes = sorted(set(inside + misled))
        if nodes:
            yield _in_branch(facts, analysis, nodes, bool(misled))


def _is_loose(facts, node):
    """In a branch or loop body whose result does not depend on it."""
    if not facts.conditions.in_called_body(node):
        in_training = facts.training.applies and not facts.training.runs[node]
        if not (in_training and facts.conditions.of(node)):
            return False
        return not facts.leads_out(node)
    return not facts.runs_with_its_body(node)


def _in_branch(facts, analysis, nodes, misled):
    names = ", ".join(facts.view.names[node] for node in nodes[:4])
    consequence = "Nothing in there waits for it, and what is outside cannot."
    if misled:
        consequence = (
            "The train op waits for it, and stops where the branch is not taken."
        )
    return found_by(
        "update-in-branch",
        certainty="certain" if misled else "likely",
        layer=analysis.layer.name,
        where=names,
        what=f"The update {names} is inside of a condition or loop. {consequence}",
    )


def check_several_updates(facts: Facts) -> Iterator[Finding]:
    """Variables that one training step updates several times."""
    for analysis in facts.layers:
        for role in STATISTICS:
            counts = [
                (_together(facts, facts.writes(analysis, node)), node)
                for node in analysis.variables[role]
            ]
            counts = [(nodes, node) for nodes, node in counts if len(nodes) > 1]
            if counts:
                yield _several(facts, analysis, *counts[0])
                break


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
    own = facts.conditions.of(node)
    if any(
        (predicate, 1 - branch) in own
        for predicate, branch in facts.conditions.of(other)
    ):
        return True
    bodies = facts.view.body_of(node), facts.view.body_of(other)
    return bodies[0] != bodies[1] and any(
        set(bodies) <= set(called) for called in facts.view.called.values()
    )


def _several(facts, analysis, nodes, variable):
    name = variable_name(facts.view, variable)
    decay = analysis.layer.decay
    count = len(nodes)
    reach = 0.0
    rate = ""
    in_order = _follow_one_another(facts.view, nodes)
    if decay is not None:
        rate = f" ({count} times decay {decay:g} is {decay**count:g})"
        # What reads and writes under one lock never takes an old value; and of several
        # values that are set, the last one stays.
        kinds = LOCKED_AVERAGES | _SETTING
        at_once = [n for n in nodes if facts.view.ops[n] not in kinds]
        reach = 0.0 if in_order else len(at_once) * (1 - decay)
    gravity = "note" if in_order else "warning"
    return found_by(
        "several-updates",
        gravity="error" if reach >= _DIVERGES else gravity,
        certainty="likely",
        layer=analysis.layer.name,
        where=name,
        what=f"{len(nodes)} operations update {name} in one training step{rate}: "
        + ", ".join(facts.view.names[node] for node in nodes[:4])
        + "."
        + (
            f" They read one old value: together they move it {reach:.3g} times the way "
            "to the batch."
            if reach > 1
            else ""
        ),
    )


def _follow_one_another(view, nodes):
    """Whether each update waits for the one before it; nearby, as it was made to."""
    return all(
        earlier in _awaited(view, later) for earlier, later in zip(nodes, nodes[1:])
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
        hidden = sorted({u.variable for u in analysis.updates if u.debiased})
        if hidden:
            names = facts.names_of(hidden)
            yield found_by(
                "zero-debias",
                gravity="note" if _are_saved(facts, hidden) else "warning",
                certainty="possible",
                layer=analysis.layer.name,
                where=names,
                what=f"The moving statistics are zero-debiased, by {names} and a counter.",
            )


def _are_saved(facts, hidden):
    """Whether savers of the graph save the averages and their counters."""
    saved = facts.names_of(facts.saved_by(facts.saves())).split(", ")
    names = facts.names_of(hidden).split(", ")
    counters = [name.rpartition("/")[0] + "/local_step" for name in names]
    return set(names + counters) <= set(saved)
