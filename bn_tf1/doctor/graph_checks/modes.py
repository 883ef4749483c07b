"""Checks of a graph: is it normalised with the statistics that its use asks for?"""

from __future__ import annotations

from typing import Iterator

from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by
from bn_tf1.graphs.facts import PARAMETERS, Facts
from bn_tf1.graphs.layer_analysis import Analysis
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
        trained = [role for role in PARAMETERS if facts.is_trained(analysis, role)]
        running = [call for call in analysis.calls if facts.runs_in_training(call)]
        if not trained or any(call.mode != "inference" for call in analysis.calls):
            continue
        if running or analysis.calls:
            yield _inference_in_training(analysis, trained)


def _inference_in_training(analysis, trained):
    return found_by(
        "inference-mode-in-training",
        certainty="likely",
        layer=analysis.layer.name,
        where=analysis.layer.node,
        what="The training graph normalises with the moving statistics, since is_training "
        f"is always false, but {' and '.join(trained)} of the layer "
        f"{'are' if len(trained) > 1 else 'is'} trained.",
    )


def check_training_mode(facts: Facts) -> Iterator[Finding]:
    """Layers that use batch statistics for good in a graph that is for inference."""
    if facts.served is None and facts.has_gradients:
        return
    # Without variables there is nothing to train: the graph can be for inference only.
    frozen = not any(op in VARIABLES for op in facts.view.ops)
    for analysis in facts.layers:
        calls = [call for call in analysis.calls if _is_served(facts, call)]
        if not calls:
            continue
        if all(_is_baked(facts, call) for call in calls):
            yield _training_in_inference(facts, analysis, frozen)
        elif facts.served is not None and _trains_by_default(facts, calls):
            yield _training_by_default(analysis)


def _is_served(facts, call):
    return facts.served is None or bool(facts.served[call.node])


def _is_baked(facts: Facts, call: Normalization) -> bool:
    return call.mode == "training" and not facts.conditions.is_conditional(call.node)


def _training_in_inference(facts, analysis, frozen):
    certain = facts.served is not None or frozen
    place = "The served outputs use" if facts.served is not None else "The graph uses"
    return found_by(
        "training-mode-in-inference",
        certainty="certain" if certain else "likely",
        layer=analysis.layer.name,
        where=analysis.layer.node,
        what=f"{place} batch statistics: is_training is always true.",
    )


def _trains_by_default(facts, calls):
    """Whether a condition that nobody feeds chooses the batch statistics."""
    return any(
        facts.conditions.by_default(reference) is True
        for call in calls
        if call.mode != "inference"
        for reference in _ways_of_the_batch(facts, call)
    )


def _ways_of_the_batch(facts, call):
    """What there is, in a condition, only when `call` uses batch statistics."""
    if call.mode == "switched":
        return ways_to(facts.view, call.mean, VARIABLES)
    return {reference_to(call.node)}


def _training_by_default(analysis):
    return found_by(
        "training-mode-by-default",
        certainty="likely",
        layer=analysis.layer.name,
        where=analysis.layer.node,
        what="The served outputs use batch statistics unless somebody feeds is_training: "
        "its default is true.",
    )


def check_single_values(facts: Facts) -> Iterator[Finding]:
    """Batch statistics over one value."""
    for analysis in facts.layers:
        for call in analysis.calls:
            if call.mode == "inference" or not _has_one_value(facts, call):
                continue
            if facts.training.applies or _is_baked(facts, call):
                yield _one_value(facts, analysis, call)
                break


def _has_one_value(facts, call):
    shape = static_shape(facts.view, call.x)
    axes = call.axes
    if shape is not None and call.kind == "fused":
        # The kernel's axes are in its layout; no node of the graph holds them.
        channel = 1 if call.layout.startswith("NC") else len(shape) - 1
        axes = [axis for axis in range(len(shape)) if axis != channel]
    if not shape or not axes or max(axes) >= len(shape):
        return False
    return all(shape[axis] == 1 for axis in axes)


def _one_value(facts: Facts, analysis: Analysis, call: Normalization) -> Finding:
    return found_by(
        "one-value-per-channel",
        certainty="certain",
        layer=analysis.layer.name,
        where=facts.view.names[call.node],
        what="Batch statistics are taken over one value per channel: the input has shape "
        f"{list(static_shape(facts.view, call.x))}.",
    )
