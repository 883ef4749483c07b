"""The switch between training and inference: which placeholder it is, and its value.

A candidate is a placeholder, with a default or without, that decides by a condition or
a selection whether a layer takes the batch's statistics, or whether noise is drawn.
Which value means inference is tried out: it is set, what is then dead is taken out, and
the recogniser is asked again how the layers normalise.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, NamedTuple

from bn_tf1.graphs.layer_analysis import Analysis, analyse
from bn_tf1.graphs.node_values import VARIABLES, ways_to
from bn_tf1.graphs.recognition.normalizations import Normalization
from bn_tf1.graphs.rewriting.dead_branches import resolve
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, node_name
from bn_tf1.graphs.training_nodes import Conditions, is_gradient
from bn_tf1.graphs.view import GraphView, node_of, reached, reference_to

PLACEHOLDERS = ("Placeholder", "PlaceholderV2", "PlaceholderWithDefault")
RANDOM = frozenset(
    ["RandomUniform", "RandomStandardNormal", "TruncatedNormal", "RandomUniformInt"]
    + ["ParameterizedTruncatedNormal", "Multinomial", "RandomGamma", "RandomShuffle"]
    + ["StatelessRandomUniform", "StatelessRandomNormal", "StatelessRandomUniformV2"]
    + ["StatelessRandomNormalV2", "StatelessTruncatedNormal", "RandomPoissonV2"]
    + ["StatelessTruncatedNormalV2", "StatelessMultinomial", "RandomCrop"]
    + ["StatelessRandomUniformInt", "StatelessRandomUniformIntV2"]
)
# What a predicate can be made of: the placeholder is behind it.
_LOGIC = frozenset(
    ["Identity", "LogicalNot", "LogicalAnd", "LogicalOr", "Equal", "NotEqual", "Cast"]
    + ["Greater", "GreaterEqual", "Less", "LessEqual", "Switch", "Enter", "Squeeze"]
    + ["Reshape", "StopGradient", "Merge"]
)
_SELECTIONS = ("Select", "SelectV2")
# Each is tried out, and each trial analyses the whole graph.
_MAX_SOURCES = 8


class Mode(NamedTuple):
    """A graph in which the mode has a value.

    Attributes:
        graph: the graph, without what cannot run any more.
        values: the values by name of the placeholders that were set.
        view: its view.
        layers: its layers, however they still normalise.
    """

    graph: EditableGraph
    values: Mapping[str, Any]
    view: GraphView
    layers: tuple[Analysis, ...]


def set_inference_mode(
    graph: EditableGraph,
    values: Mapping[str, Any],
    definitions: Mapping[str, Any],
    outputs: Iterable[str] = (),
) -> Mode:
    """Finds the switch of the layers that `outputs` need, and sets it to inference.

    Args:
        graph: is changed.
        values: values by name that are known already.
        definitions: OpDef by operation, see `inline_functions`.
        outputs: names of tensors; without any, all layers count.

    Returns:
        The `Mode`. Layers without a switch still take the batch's statistics in it.

    Raises:
        bn_tf1.graphs.rewriting.function_inlining.InliningError: a function is damaged.
    """
    outputs = list(outputs)
    mode, conditions, wanted = _set(graph, values, definitions, outputs)
    sources = _sources(mode.view, conditions, wanted)[:_MAX_SOURCES]
    if not sources:
        return mode

    # False means inference for most: is_training, phase_train. Then one after the other
    # is turned, which finds `is_test`, too, without trying all combinations.
    def tried(settings):
        trial, _, left = _set(graph.copy(), settings, definitions, outputs)
        # A value that makes an output dead is none, however few layers it leaves: an output
        # may be in the branch for training.
        names = (node_name(trial.graph.tensor(tensor)) for tensor in outputs)
        missing = sum(name not in trial.graph.nodes for name in names)
        return (missing, len(left)), trial

    best = tried({source: 0 for source in sources})
    for source in sources:
        if best[0] == (0, 0):  # nothing takes the batch, and no output is missing
            break
        flipped = dict(best[1].values)
        flipped[source] = 1 - flipped[source]
        best = min(best, tried(flipped), key=lambda trial: trial[0])
    return best[1]._replace(values=dict(values, **best[1].values))


def _set(graph, values, definitions, outputs):
    """(the `Mode`, its `Conditions`, what still takes the batch or draws noise)."""
    resolve(graph, values, definitions, map(node_name, outputs))
    view = graph.view()
    conditions = Conditions(view)
    layers = analyse(view, conditions)
    needed = view.needed(map(graph.tensor, outputs))
    left = _statistics_of_the_batch(view, layers, needed) + _noise(view, needed)
    return Mode(graph, dict(values), view, tuple(layers)), conditions, left


def _statistics_of_the_batch(view, layers, needed):
    """References to what is there only when a layer takes the batch's statistics."""
    found = []
    for layer in layers:
        for call in layer.calls:
            if call.mode != "inference" and (needed is None or needed[call.node]):
                found += statistics_taken(view, call)
    return found


def statistics_taken(view: GraphView, call: Normalization) -> list[int]:
    """References to what there is, in a condition, only with batch statistics."""
    # A fused layer with a switch is two kernels, each in its own branch.
    if call.mode == "switched":
        ways = ways_to(view, call.mean, VARIABLES)
        return sorted(ways | ways_to(view, call.variance, VARIABLES))
    return [reference_to(call.node)]


def _noise(view, needed):
    return [
        reference_to(node)
        for node, op in enumerate(view.ops)
        if op in RANDOM
        and (needed is None or needed[node])
        and not is_gradient(view, node)
    ]


def _sources(view, conditions, references):
    """The names of the placeholders that decide about any of `references`."""
    found: dict[str, None] = {}
    for reference in references:
        predicates = [p for p, _ in conditions.of_value(reference)]
        node = node_of(reference)
        if view.ops[node] in _SELECTIONS:
            predicates.append(view.inputs[node][0])
        for predicate in predicates:
            for source in _placeholders(view, predicate):
                found[view.names[source]] = None
    return list(found)


def _placeholders(view, predicate):
    def operands(node):
        return map(node_of, view.inputs[node] if view.ops[node] in _LOGIC else ())

    behind = reached([node_of(predicate)], operands)
    # In the order of the graph: they are tried one after the other.
    return [node for node in sorted(behind) if view.ops[node] in PLACEHOLDERS]
