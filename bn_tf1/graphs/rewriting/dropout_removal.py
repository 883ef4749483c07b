"""Takes dropout out: in inference, every unit stays, and none is scaled.

    y = x / keep * floor(keep + uniform)                TensorFlow up to 1.12
    y = x * (1 / (1 - rate)) * (uniform >= rate)        1.13 and later
    y = where(uniform >= rate, x * 1 / (1 - rate), 0)   2.x

Contract: a mask goes only where it keeps the mean: where scale and probability to keep
are inverse, or are both made of the same placeholder.

Source: Srivastava et al., "Dropout", 2014.
"""

from __future__ import annotations

from bn_tf1.graphs.rewriting.constant_values import constant_scalar
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    data_inputs,
    node_name,
)
from bn_tf1.graphs.rewriting.inference_mode import PLACEHOLDERS, RANDOM
from bn_tf1.graphs.view import reached

_SIZES = ("Shape", "ShapeN", "Size", "Rank")
_PRODUCTS = ("Mul", "RealDiv", "Div", "Select", "SelectV2")
_MAX_STEPS = 200


def remove_dropout(graph: EditableGraph, inputs: list[str]) -> list[str]:
    """Takes out the dropouts of `graph`, and returns the names of their nodes.

    Args:
        graph: is changed.
        inputs: the nodes that data comes in by.
    """
    consumers = graph.consumers()

    def depending(names):
        """The nodes that depend on `names`, by more than their sizes."""
        return reached(
            names,
            lambda n: (c for c in consumers[n] if graph.nodes[c].op not in _SIZES),
        )

    noise = depending(n for n, node in graph.nodes.items() if node.op in RANDOM)
    data = depending(inputs)
    # What depends on both is no mask but data with noise in it, such as a latent variable.
    masks = noise - data
    removed = []
    for name, node in list(graph.nodes.items() if masks else ()):
        if node.op in _PRODUCTS and name in data:
            kept = _undropped(graph, node, masks)
            if kept is not None:
                graph.make_identity(name, kept)
                removed.append(name)
    return removed


def _undropped(graph, node, masks):
    """The input that a dropout leaves in inference; None where `node` is no dropout."""
    inputs = data_inputs(node)
    if node.op in ("Select", "SelectV2"):
        if node_name(inputs[0]) not in masks or not _is_zero(graph, inputs[2]):
            return None
        mask, dropped = inputs[:2]
    else:
        of_mask = [i for i in inputs if node_name(i) in masks]
        if len(of_mask) != 1 or node.op != "Mul":
            return None
        mask = of_mask[0]
        dropped = inputs[1 - inputs.index(mask)]
    # The scale is with the data (1.13 and later), or within the mask.
    x, scale = _without_scale(graph, dropped, lambda name: name not in masks)
    if scale is None:
        x = dropped
        mask, scale = _without_scale(graph, mask, lambda name: True)
    if scale is not None and _are_inverse(graph, scale, mask):
        return x
    return None


def _is_zero(graph, source):
    node = graph.nodes[node_name(source)]
    # What 2.x puts where a unit is dropped, by whatever operation.
    if node.op == "ZerosLike":
        return True
    if node.op == "Fill":
        source = node.input[1]
    value = constant_scalar(graph, source)
    if value is None and node.op == "Const":
        tensor = node.attr["value"].tensor
        return not any(tensor.float_val) and not tensor.tensor_content.strip(b"\0")
    return value is not None and value == 0


def _without_scale(graph, source, counts):
    """(x, (number, is divided by)) of what is x scaled by a number; else (source, None)."""
    name = node_name(source)
    for _ in range(10):
        if graph.nodes[name].op not in ("Identity", "Reshape"):
            break
        name = node_name(graph.nodes[name].input[0])
    node = graph.nodes[name]
    if node.op in ("Mul", "RealDiv", "Div") and counts(name):
        pairs = [(0, 1)] if node.op != "Mul" else [(0, 1), (1, 0)]
        for x, number in pairs:
            if _is_number(graph, node.input[number]):
                return node.input[x], (node.input[number], node.op != "Mul")
    return source, None


def _is_number(graph, source):
    value = constant_scalar(graph, source)
    return value is not None or bool(_numbers_behind(graph, source))


def _numbers_behind(graph, source):
    """The placeholders that a scalar is computed from; empty where it is none."""
    found, seen, pending = set(), set(), [node_name(source)]
    while pending and len(seen) < _MAX_STEPS:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph.nodes[name]
        if node.op in PLACEHOLDERS:
            shape = node.attr["shape"].shape
            if shape.dim:
                return set()
            found.add(name)
        elif node.op in RANDOM or node.op in _SIZES:
            continue
        elif len(node.input) > 2 and node.op not in ("Select", "SelectV2"):
            return set()
        pending += [node_name(i) for i in node.input]
    return found if len(seen) < _MAX_STEPS else set()


def _are_inverse(graph, scale, mask):
    source, is_divisor = scale
    number = constant_scalar(graph, source)
    keep = _keep_probability(graph, mask)
    if number is not None and keep is not None:
        # Not inverse: noise of the model, or a mask that nothing makes up for. float32 rounds
        # 1 / 0.9 by less than this.
        return abs((keep / number if is_divisor else keep * number) - 1) < 1e-4
    # keep_prob is fed: both are made of it.
    return bool(_numbers_behind(graph, source) & _numbers_behind(graph, mask))


def _keep_probability(graph, mask):
    """The share of ones in a mask; None where constants do not tell it."""
    name = node_name(mask)
    for _ in range(10):
        node = graph.nodes[name]
        if node.op in ("GreaterEqual", "Greater", "Less", "LessEqual"):
            noise, rate = (constant_scalar(graph, i) for i in node.input[:2])
            if rate is None and noise is None:
                return None
            # uniform >= rate, or its mirror image: rate <= uniform.
            is_above = node.op.startswith("Greater") == (rate is not None)
            share = float(noise if rate is None else rate)
            return 1 - share if is_above else share
        if node.op == "Floor":
            node = graph.nodes[node_name(node.input[0])]
            numbers = [constant_scalar(graph, i) for i in node.input]
            known = [number for number in numbers if number is not None]
            return float(known[0]) if node.op in ("Add", "AddV2") and known else None
        if node.op not in ("Cast", "Identity", "Reshape"):
            return None
        name = node_name(node.input[0])
    return None
