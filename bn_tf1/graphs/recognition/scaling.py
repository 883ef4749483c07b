"""What an inverse deviation scales: the way from 1 / sqrt(variance + epsilon) to the data.

(x - mean) * inverse, (x - mean) / deviation, or x * inverse and mean * inverse that are
added later; with gamma multiplied on the way.
"""

from __future__ import annotations

from typing import NamedTuple

from bn_tf1.graphs.node_values import leaves, same_values, scalars
from bn_tf1.graphs.recognition.batch_statistics import (
    is_statistic_like,
    statistic_leaves,
    through_casts,
)
from bn_tf1.graphs.view import GraphView, node_of, reference_to

_DIVISIONS = frozenset(["RealDiv", "Div"])
_RECIPROCALS = frozenset(["Reciprocal", "Inv"])
_SEARCH_STEPS = 200  # a deviation has few users; a hostile one has millions


class Scale(NamedTuple):
    """What the data is multiplied (or divided: `is_root`) by, on its way to the data."""

    node: int
    is_root: bool
    gamma: int | None


class _Products(NamedTuple):
    data: list
    means: list


def normalised_by(
    view: GraphView, scale: Scale
) -> tuple[int, int, int | None, int] | None:
    """(x, mean, gamma, last node) of what is scaled by `scale`, or None."""
    # x * inverse and mean * inverse, which are added later.
    products = _Products([], [])
    seen, pending = {scale.node}, [scale]
    while pending and len(seen) < _SEARCH_STEPS:
        scale = pending.pop(0)  # the nearest first: others are behind it
        for consumer in view.consumers(scale.node, _SEARCH_STEPS):
            if consumer in seen:
                continue
            seen.add(consumer)
            following = _follow(view, scale, consumer, products)
            if isinstance(following, Scale):
                pending.append(following)
            elif following is not None:
                return following
    for data in products.data:
        for mean in products.means:
            joined = _joined(view, data, mean)
            if joined is not None:
                return joined
    return None


def _follow(view, scale, consumer, products):
    """A match, the next `Scale`, or None; products are noted down."""
    inputs = view.inputs[consumer]
    op = view.ops[consumer]
    source = node_of(inputs[0]) == scale.node
    if op in _RECIPROCALS and scale.is_root:
        return scale._replace(node=consumer, is_root=False)
    if op == "Mul" and len(inputs) == 2 and not scale.is_root:
        return _multiplied(view, scale, consumer, inputs[1 if source else 0], products)
    if op in _DIVISIONS and len(inputs) == 2 and scale.is_root and not source:
        return _multiplied(view, scale, consumer, inputs[0], products)
    if source and same_values(view, reference_to(consumer))[:1] == inputs[:1]:
        return scale._replace(node=consumer)
    return None


def _multiplied(view, scale, consumer, other, products):
    centered = _centered(view, other)
    if centered is not None:
        return centered + (scale.gamma, consumer)
    # What is neither a number nor a vector by channel is the data.
    numbers = scalars(view, other)
    if not numbers and not is_statistic_like(view, other):
        products.data.append((other, scale.gamma, consumer))
        return None
    # tf.nn.batch_normalization: x * inverse + (beta - mean * inverse).
    if _is_subtracted(view, consumer) or view.ops[node_of(other)] == "Neg":
        products.means.append((other, consumer))
        return None
    gamma = scale.gamma if numbers else other
    return Scale(consumer, False, gamma)


def _centered(view, reference):
    """(x, mean) where `reference` is x - mean, else None."""
    node = node_of(through_casts(view, reference))
    if view.ops[node] != "Sub" or len(view.inputs[node]) != 2:
        return None
    x, mean = view.inputs[node]
    # A difference of two statistics is an offset (beta - mean * inverse), and no data.
    found = statistic_leaves(view, mean)
    if found is None or is_statistic_like(view, x) or _is_weights(view, x):
        return None
    return x, mean


def _is_weights(view, reference):
    """Whether it is computed from variables alone: standardised weights are no data."""
    found = leaves(view, reference)
    return bool(found.variables) and not any(found._replace(variables=()))


def _is_subtracted(view, node):
    """Whether `node` is what a Sub subtracts, by way of reshapes or not."""
    for _ in range(4):  # a reshape or two, a cast
        consumers = view.consumers(node, 8)
        for consumer in consumers:
            op, inputs = view.ops[consumer], view.inputs[consumer]
            if op == "Neg" or op == "Sub" and node_of(inputs[1]) == node:
                return True
        copies = [
            c for c in consumers if view.ops[c] in ("Reshape", "Identity", "Cast")
        ]
        if not copies:
            return False
        node = copies[0]
    return False


def _joined(view, data, mean):
    """The match of x * inverse and mean * inverse where an addition joins them."""
    x, gamma, product = data
    for consumer in view.consumers(product, 8):
        if view.ops[consumer] not in ("Add", "AddV2", "Sub", "BiasAdd"):
            continue
        for reference in view.inputs[consumer]:
            other = node_of(through_casts(view, reference))
            sources = view.inputs[other]
            behind = {other, *map(node_of, sources)}
            behind.update(node_of(through_casts(view, source)) for source in sources)
            if mean[1] in behind:
                source = node_of(mean[0])
                negated = view.ops[source] == "Neg"
                true_mean = view.inputs[source][0] if negated else mean[0]
                return x, true_mean, gamma, consumer
    return None
