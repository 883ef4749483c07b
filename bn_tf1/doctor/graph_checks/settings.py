"""Checks of a graph: decay, epsilon, savers, weight decay, biases."""

from __future__ import annotations

from typing import Iterator

import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.dialects import STATISTICS
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.facts import PARAMETERS, Facts
from bn_tf1.graphs.node_values import (
    VARIABLES,
    constant_size,
    leaves,
    origin,
    variables_of,
)
from bn_tf1.graphs.recognition.fused_kernels import FUSED_CONVOLUTIONS
from bn_tf1.graphs.view import node_of

# From the decays and epsilons of the known libraries: 0.9 to 0.9999, 1e-6 to 1e-2.
_DECAYS = (0.5, 0.9999)
_EPSILONS = (1e-6, 0.05)
_TOLERANCE = 1e-6
_CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul")


def check_saver(facts: Facts) -> Iterator[Finding]:
    """Moving statistics that the graph's saver leaves out."""
    every = facts.saves()
    # A graph without its .meta, such as graph.pbtxt, does not say which saver is meant.
    own = facts.saves_of_saver() or every
    if not every or facts.is_saved_by_object():
        return  # a SavedModel of TensorFlow 2 saves copies of the variables it serves
    saved = facts.saved_by(own)
    elsewhere = facts.saved_by(every)
    for analysis in facts.layers:
        missing = [
            node
            for role in STATISTICS
            for node in analysis.variables[role]
            if facts.view.ops[node] in VARIABLES and node not in saved
        ]
        if not missing:
            continue
        names = facts.names_of(missing)
        what = f"The graph's saver saves {len(saved)} variables, but not {names}."
        # A part of a network is often saved alone, beside a saver of all of it.
        by_another = elsewhere.issuperset(missing)
        yield found_by(
            "statistics-not-saved",
            "possible" if by_another else "certain",
            names,
            what + " Another saver of the graph does." * by_another,
            gravity="warning" if by_another else "error",
            layer=analysis.layer.name,
        )


def check_trained_statistics(facts: Facts) -> Iterator[Finding]:
    """Moving statistics that an optimizer moves, or would if they had a gradient."""
    trainable = {
        name.split(":")[0]
        for name in facts.view.collections.get(tf.GraphKeys.TRAINABLE_VARIABLES, ())
    }
    for analysis in facts.layers:
        nodes = [node for role in STATISTICS for node in analysis.variables[role]]
        trained = [node for node in nodes if node in facts.training.trained]
        listed = [node for node in nodes if facts.view.names[node] in trainable]
        names = facts.names_of(trained or listed)
        gravity, certainty = "error", "certain"
        what = f"An optimizer applies gradients to {names}."
        if not trained:
            # An optimizer moves them as soon as a gradient reaches them.
            gravity, certainty = "warning", "likely"
            what = f"Among the trainable variables are {names}."
        if names:
            layer = analysis.layer.name
            yield found_by(
                "statistics-trained",
                certainty,
                names,
                what,
                gravity=gravity,
                layer=layer,
            )


def check_decay(facts: Facts) -> Iterator[Finding]:
    """Decays that no moving average is meant to have."""
    for analysis in facts.layers:
        decay = analysis.layer.decay
        if decay is None or _DECAYS[0] <= decay <= _DECAYS[1] + _TOLERANCE:
            continue
        what = f"The decay is {decay:g}; usual are 0.9 to 0.9999."
        if _DECAYS[1] < decay < 1:
            # decay^(1 / (1 - decay)) is nearly 1 / e.
            what += f" Initial values weigh 37% after {1 / (1 - decay):.0f} steps."
        never = decay >= 1 or decay < 0
        yield found_by(
            "unusual-decay",
            "certain" if never else "likely",
            facts.view.names[analysis.updates[0].node],
            what,
            gravity="error" if never else "warning",
            layer=analysis.layer.name,
        )


def check_epsilon(facts: Facts) -> Iterator[Finding]:
    """Epsilons that do not protect, or that drown the variance."""
    for analysis in facts.layers:
        layer, epsilon = analysis.layer, analysis.layer.epsilon
        # A float32 constant of 1e-6 is a little less than 1e-6.
        least = _EPSILONS[0] * (1 - _TOLERANCE)
        if epsilon is not None and not least <= epsilon <= _EPSILONS[1]:
            what = f"Epsilon is {epsilon:g}; usual are 1e-5 to 1e-3."
            sure = "certain" if epsilon <= 0 else "likely"
            yield found_by("unusual-epsilon", sure, layer.node, what, layer=layer.name)


def check_weight_decay(facts: Facts) -> Iterator[Finding]:
    """Penalties on gamma and beta."""
    if not facts.training.applies:
        return
    penalised = _penalised(facts)
    for analysis in facts.layers:
        roles, nodes = [], []
        for role in PARAMETERS:
            found = [node for node in analysis.variables[role] if node in penalised]
            roles += [role] * bool(found)
            nodes += found
        if roles:
            what = f"There is weight decay on {' and '.join(roles)}."
            sure = "likely"
            if all(penalised[node] == "certain" for node in nodes):
                sure = "certain"
            names, layer = facts.names_of(nodes), analysis.layer.name
            yield found_by("weight-decay", sure, names, what, layer=layer)


def _penalised(facts):
    """By variable, how sure it is that its own value enters its gradient."""
    view = facts.view
    wanted = {
        node for a in facts.layers for role in PARAMETERS for node in a.variables[role]
    }
    found: dict[int, str] = {}
    for node, op in enumerate(view.ops):
        # That it is in the loss is likely: it could be in another one, or be printed.
        if op == "L2Loss" and _is_used(view, node):
            for variable in variables_of(view, view.inputs[node][0]):
                if variable in facts.training.trained:
                    found[variable] = "likely"
    for apply in facts.training.applies:
        if view.ops[apply] in ("Assign", "AssignVariableOp"):
            continue  # the new value always holds the old one
        trained = variables_of(view, view.inputs[apply][0])
        # To go back through each gradient of a large network takes its time.
        if not wanted.intersection(trained):
            continue
        for source in view.inputs[apply][1:]:
            for variable in _entering(view, source).intersection(trained):
                found[variable] = "certain"
    return {node: sure for node, sure in found.items() if node in wanted}


def _is_used(view, node):
    return any("Summary" not in view.ops[later] for later in view.consumers(node))


def _entering(view, reference):
    """The variables in a gradient, also in the mean of the gradients of towers."""
    ends = leaves(view, reference)
    found = set(ends.variables)
    for node in ends.reductions:
        stacked = view.inputs[node][0]
        if view.ops[node_of(stacked)] in ("ConcatV2", "Concat", "Pack"):
            found |= leaves(view, stacked).variables
    return found


def check_bias(facts: Facts) -> Iterator[Finding]:
    """Biases that the subtraction of the mean takes away again."""
    for analysis in facts.layers:
        for call in analysis.calls:
            # What a fused convolution takes is convolved before it is normalised.
            is_next = call.op not in FUSED_CONVOLUTIONS
            bias = _added_bias(facts.view, call.x) if is_next else None
            if bias is not None:
                check, name = "bias-before-batch-norm", facts.view.names[bias]
                what = f"The bias {name} is added just before the layer."
                layer = analysis.layer.name
                yield found_by(check, "certain", name, what, layer=layer)
                break  # one for a layer: its calls share the bias most often


def _added_bias(view, reference):
    """The variable or vector that is added to what `reference` is a copy of."""
    node = node_of(origin(view, reference))
    if view.ops[node] not in ("BiasAdd", "Add", "AddV2") or len(view.inputs[node]) != 2:
        return None
    # The bias is most often the second operand.
    for operand in reversed(view.inputs[node]):
        for variable in variables_of(view, operand):
            shape = view.attribute(variable, "shape")
            if shape is not None and len(shape.shape.dim) == 1:
                return variable
        source = node_of(origin(view, operand))
        is_bias = view.ops[node] == "BiasAdd" and view.ops[source] == "Const"
        if is_bias and constant_size(view, source) not in (None, 1):
            return source
    return None


def check_presence(facts: Facts) -> Iterator[Finding]:
    """Graphs in which there is nothing to check."""
    if facts.layers:
        return
    folded = len(facts.folded)
    weights = sum(op in _CONVOLUTIONS for op in facts.view.ops)
    what = (
        f"There is no batch-norm layer in {len(facts.view)} nodes, {weights} of which "
        "are convolutions or matrix products."
    )
    if folded:
        what += f" {folded} biases are what batch norms folded into them left behind."
    yield found_by("no-batch-norm", "likely" if folded else "certain", "", what)
