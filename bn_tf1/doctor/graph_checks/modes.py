"""Checks of a graph: is it normalised with the statistics that its use asks for?"""

from __future__ import annotations

from typing import Iterator

from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.facts import PARAMETERS, Facts
from bn_tf1.graphs.node_values import VARIABLES, static_shape, ways_to
from bn_tf1.graphs.recognition.normalizations import Normalization
from bn_tf1.graphs.view import reference_to


def check_inference_mode(facts: Facts) -> Iterator[Finding]:
    """Layers of a training graph whose gamma or beta learn, but not the statistics.

    A frozen layer, which is not trained at all, is no fault of a fine-tuned model.
    """
    if not facts.training.applies:
        return
    for analysis in facts.layers:
        layer = analysis.layer
        trained = [role for role in PARAMETERS if facts.is_trained(analysis, role)]
        if trained and {call.mode for call in analysis.calls} == {"inference"}:
            what = (
                "The training graph normalises with the moving statistics, since "
                f"is_training is always false, but {' and '.join(trained)} of the layer "
                f"{'are' if len(trained) > 1 else 'is'} trained."
            )
            yield found_by(
                "inference-mode-in-training",
                "likely",
                layer.node,
                what,
                layer=layer.name,
            )


def check_training_mode(facts: Facts) -> Iterator[Finding]:
    """Layers that use batch statistics for good in a graph that is for inference."""
    # A graph with signatures serves, whatever else is in it; one with gradients trains.
    if facts.served is None and facts.has_gradients:
        return
    is_served = facts.served is not None
    # Without variables there is nothing to train: the graph can be for inference only.
    is_frozen = not any(op in VARIABLES for op in facts.view.ops)
    certainty = "certain" if is_served or is_frozen else "likely"
    for analysis in facts.layers:
        layer = analysis.layer
        calls = [c for c in analysis.calls if not is_served or facts.served[c.node]]
        if calls and all(_is_baked(facts, call) for call in calls):
            check = "training-mode-in-inference"
            place = "The served outputs use" if is_served else "The graph uses"
            what = f"{place} batch statistics: is_training is always true."
            yield found_by(check, certainty, layer.node, what, layer=layer.name)
        elif is_served and any(_trains_by_default(facts, call) for call in calls):
            check = "training-mode-by-default"
            what = "The served outputs use batch statistics unless somebody feeds "
            what += "is_training: its default is true."
            yield found_by(check, "likely", layer.node, what, layer=layer.name)


def _is_baked(facts: Facts, call: Normalization) -> bool:
    return call.mode == "training" and not facts.conditions.is_conditional(call.node)


def _trains_by_default(facts, call):
    """Whether a condition that nobody feeds chooses the batch statistics."""
    if call.mode == "inference":
        return False
    ways = {reference_to(call.node)}
    if call.mode == "switched":
        # The node runs in both modes: only what leads to its mean tells them apart.
        ways = ways_to(facts.view, call.mean, VARIABLES)
    return any(facts.conditions.by_default(way) is True for way in ways)


def check_single_values(facts: Facts) -> Iterator[Finding]:
    """Batch statistics over one value."""
    view = facts.view
    for analysis in facts.layers:
        for call in analysis.calls:
            shape = static_shape(view, call.x)
            if call.mode == "inference" or not _has_one_value(call, shape):
                continue
            # A mode that is fed may never be that of training in a graph that only serves.
            if facts.training.applies or _is_baked(facts, call):
                yield found_by(
                    "one-value-per-channel",
                    "certain",
                    view.names[call.node],
                    "Batch statistics are taken over one value per channel: the input "
                    f"has shape {list(shape)}.",
                    layer=analysis.layer.name,
                )
                break


def _has_one_value(call, shape):
    axes = call.axes
    if shape is not None and call.kind == "fused":
        # The kernel's axes are in its layout; no node of the graph holds them.
        channel = 1 if call.layout.startswith("NC") else len(shape) - 1
        axes = [axis for axis in range(len(shape)) if axis != channel]
    # Axes that are not there: what a foreign graph says need not fit together.
    if not shape or not axes or max(axes) >= len(shape):
        return False
    return all(shape[axis] == 1 for axis in axes)
