"""Checks of a graph: who runs the updates of the moving statistics, and how often."""

from __future__ import annotations

from typing import Iterator

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.doctor.findings import Finding
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.node_values import VARIABLES, variable_name
from bn_tf1.graphs.view import ancestors, descendants
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION

_INITIAL = (
    "Moving statistics that are never updated keep their initial values, a mean of 0 and "
    "a variance of 1. Training looks healthy, and evaluation is far worse."
)

# How values leave a condition or a loop of control flow v1.
_WAYS_OUT = ("Merge", "RefMerge", "Exit", "RefExit")


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
        if not statistics:
            yield _without_statistics(facts, analysis)
            continue
        writes = {node: facts.writes(analysis, node) for node in statistics}
        lost = [n for n in statistics if not _any_runs(facts, writes[n])]
        if not lost:
            continue
        ignored = sorted({write for node in lost for write in writes[node]})
        if ignored:
            yield _not_run(facts, analysis, lost, ignored)
        else:
            yield _no_update(facts, analysis, lost)


def _any_runs(facts, nodes):
    return any(facts.training.runs[node] for node in nodes)


def _without_statistics(facts, analysis):
    return Finding(
        check="no-moving-statistics",
        gravity="warning",
        certainty="possible",
        layer=analysis.layer.name,
        where=analysis.layer.node,
        what="The layer normalises with batch statistics and has no moving ones.",
        why="Evaluation must use batch statistics too: a prediction depends on the other "
        "examples of its batch, and one example alone cannot be normalised.",
        remedy="Keep moving statistics: y = bn_tf1.batch_norm(x, is_training)",
    )


def _no_update(facts, analysis, lost):
    return Finding(
        check="no-update",
        gravity="error",
        certainty="certain",
        layer=analysis.layer.name,
        where=facts.names_of(lost),
        what="The layer is trained with batch statistics, but no operation of the graph "
        f"updates {facts.names_of(lost)}.",
        why=_INITIAL,
        remedy="Use a layer whose updates are part of the graph, with the same variables: "
        f"y = bn_tf1.batch_norm(x, is_training, name={analysis.layer.name!r})",
    )


def _not_run(facts, analysis, lost, updates):
    view = facts.view
    collections = _collections_with(view, {view.names[node] for node in updates})
    grouped = [node for node in updates if _is_grouped(view, node)]
    custom = sorted(set(collections) - {UPDATE_OPS_COLLECTION})
    if custom and UPDATE_OPS_COLLECTION not in collections:
        check, key = "update-collection-not-run", repr(custom[0])
        place = f"They are in the collection {key}, from which nothing takes them."
    elif collections:
        check, key = "update-not-run", "tf.GraphKeys.UPDATE_OPS"
        place = f"They are in the collection {UPDATE_OPS_COLLECTION!r}."
    else:
        check, key = "update-not-run", None
        place = "They are in no collection, as those of a Keras layer in a graph."
    if grouped:
        place += " Only a tf.group apart from the train op waits for them."
    names = ", ".join(view.names[node] for node in updates[:4])
    return Finding(
        check=check,
        gravity="warning" if grouped else "error",
        certainty="possible" if grouped else "likely",
        layer=analysis.layer.name,
        where=names,
        what=f"No train op runs the {len(updates)} update operations of "
        f"{facts.names_of(lost)}. {place}",
        why=_INITIAL,
        remedy=_run_updates(key),
    )


def _run_updates(key):
    if key is None:
        return (
            "Make the train op wait for them: with tf.control_dependencies(layer.updates)"
            ": train_op = optimizer.minimize(loss). Or use bn_tf1.batch_norm, and "
            "train_op = bn_tf1.make_train_op(loss, optimizer)."
        )
    return (
        "Make the train op wait for them: with tf.control_dependencies("
        f"tf.get_collection({key})): train_op = optimizer.minimize(loss). Nothing is to be "
        "done if the program fetches them in every step by itself."
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
    view = facts.view
    if not facts.conditions.in_called_body(node):
        in_training = facts.training.applies and not facts.training.runs[node]
        if not (in_training and facts.conditions.of(node)):
            return False
        after = descendants(view, [node])
        return not any(after[n] and op in _WAYS_OUT for n, op in enumerate(view.ops))
    body = view.bodies[view.body_of(node)]
    return not ancestors(view, body.returns + body.controls)[node]


def _in_branch(facts, analysis, nodes, misled):
    names = ", ".join(facts.view.names[node] for node in nodes[:4])
    consequence = (
        "The train op waits for it: where the branch is not taken, the step does nothing "
        "at all, without an error."
        if misled
        else "Nothing in the branch or loop waits for it, and what is outside cannot."
    )
    return Finding(
        check="update-in-branch",
        gravity="warning",
        certainty="certain" if misled else "likely",
        layer=analysis.layer.name,
        where=names,
        what=f"The update {names} is inside of a condition or loop.",
        why=consequence,
        remedy='Update in place: bn_tf1.batch_norm(x, is_training, update="in_place"). '
        "Or call the layer outside of tf.cond and tf.while_loop.",
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
    rate = ""
    if decay is not None:
        rate = f" ({len(nodes)} times decay {decay:g} is {decay ** len(nodes):g})"
    return Finding(
        check="several-updates",
        gravity="warning",
        certainty="likely",
        layer=analysis.layer.name,
        where=name,
        what=f"{len(nodes)} operations update {name} in one training step{rate}: "
        + ", ".join(facts.view.names[node] for node in nodes[:4])
        + ".",
        why="A layer that is called several times (towers, a discriminator on real and "
        "generated data) mixes the statistics of all calls, in no certain order.",
        remedy="Choose the calls whose statistics count. In the others, bn_tf1.batch_norm("
        'x, is_training, update="skip"). For towers, take the updates of the first alone: '
        "tf.get_collection(tf.GraphKeys.UPDATE_OPS, scope)",
    )


def check_zero_debias(facts: Facts) -> Iterator[Finding]:
    """Hidden variables of zero-debiased averages."""
    for analysis in facts.layers:
        hidden = sorted({u.variable for u in analysis.updates if u.debiased})
        if hidden:
            names = facts.names_of(hidden)
            yield Finding(
                check="zero-debias",
                gravity="warning",
                certainty="possible",
                layer=analysis.layer.name,
                where=names,
                what=f"The moving statistics are zero-debiased, by {names} and a counter.",
                why="A checkpoint restored without these variables loses its moving "
                "statistics at the first update: the mean becomes that of one batch.",
                remedy="Pass zero_debias=False to assign_moving_average, or "
                "zero_debias_moving_mean=False in slim. Or see that every checkpoint "
                "holds them: saver = tf.train.Saver(tf.global_variables())",
            )
