"""Batch norms that are composed of arithmetic: (x - mean) / sqrt(variance + epsilon).

In any of these forms: (x - mean) * rsqrt(...) [* gamma + beta], x * inverse + (beta -
mean * inverse), with sqrt and division, or with a power of -0.5 or 0.5; mean and variance
from moments, from E[x^2] - E[x]^2, from variables, or from a condition between them.

L2 normalization subtracts no mean; optimizers divide by sqrt(v) what is no difference of
data and a mean. Neither is taken for a batch norm.
"""

from __future__ import annotations

from bn_tf1.graphs.node_values import (
    constant_at,
    constant_size,
    leaves,
    origin,
    same_values,
    scalars,
    variables_of,
)
from bn_tf1.graphs.recognition.batch_statistics import (
    batch_axes,
    composed,
    is_per_channel,
    is_same_statistic,
    is_statistic_like,
    mode_of,
    statistic_leaves,
    through_casts,
)
from bn_tf1.graphs.recognition.normalization_match import Normalization
from bn_tf1.graphs.recognition.scaling import Scale, normalised_by
from bn_tf1.graphs.view import GraphView, node_of

ROOTS = frozenset(["Rsqrt", "Sqrt", "Pow"])
_ADDITIONS = frozenset(["Add", "AddV2", "BiasAdd"])


def match_composed(view: GraphView, node: int) -> Normalization | None:
    """The batch norm whose inverse deviation is `node`, one of `ROOTS`; or None."""
    is_root = view.ops[node] == "Sqrt"
    if not view.inputs[node]:
        return None
    if view.ops[node] == "Pow":  # (variance + epsilon) ** -0.5, by hand
        exponents = scalars(view, view.inputs[node][-1])
        if exponents not in ({0.5}, {-0.5}):
            return None
        is_root = exponents == {0.5}
    variance, epsilon = _without_epsilon(view, view.inputs[node][0])
    variance_leaves = statistic_leaves(view, variance)
    if variance_leaves is None:
        return None
    # An optimizer, too, divides by a root; but not a difference of data and a mean.
    match = normalised_by(view, Scale(node, is_root, None))
    if match is None:
        return None
    x, mean, gamma, last = match
    mean_leaves = statistic_leaves(view, mean)
    if mean_leaves is None or is_same_statistic(mean_leaves, variance_leaves):
        return None
    gamma, beta, last = _affine(view, gamma, last, mean)
    has_variables = mean_leaves.variables or variance_leaves.variables
    if not (gamma or beta or epsilon or has_variables):
        # The constants that an input is scaled by have no number to protect them.
        return None
    # Either tells: those of one batch reduce the same.
    axes = batch_axes(view, mean_leaves) or batch_axes(view, variance_leaves)
    found = composed(view, last, x, (gamma, beta, mean, variance), epsilon, axes)
    mode = mode_of(variance_leaves, mean_leaves)
    return found._replace(op=view.ops[node], mode=mode)


def _without_epsilon(view, reference):
    """The variance and the number that is added to it, 0 where there is none."""
    # Casts and reshapes may stand between the root and the addition.
    current = reference
    for _ in range(8):
        node = node_of(current)
        if view.ops[node] in ("Add", "AddV2", "Maximum"):
            left, right = view.inputs[node][:2]
            for variance, epsilon in ((left, right), (right, left)):
                # tf.maximum(variance, epsilon) protects as well.
                numbers = scalars(view, epsilon)
                if len(numbers) == 1:
                    return variance, next(iter(numbers))
        earlier = same_values(view, current)
        if len(earlier) != 1:
            break
        current = earlier[0]
    return reference, 0.0


def _affine(view, gamma, last, mean):
    """(gamma, beta, last node), where they follow the normalisation or are in it."""
    beta = None
    if view.ops[last] in _ADDITIONS:  # x * inverse + (beta - mean * inverse)
        beta = _offset(view, last)
    # A gamma, a beta, and what else is scaled by hand.
    for _ in range(4):
        following = _only_scaled(view, last)
        if following is None:
            break
        consumer, parameter = following
        if view.ops[consumer] == "Mul" and gamma is None and beta is None:
            gamma = parameter
        elif view.ops[consumer] in _ADDITIONS and beta is None:
            beta = parameter
        else:
            break
        last = consumer
    return gamma, beta, last


def _offset(view, addition):
    for reference in view.inputs[addition]:
        node = node_of(through_casts(view, reference))
        if view.ops[node] == "Sub" and not leaves(view, view.inputs[node][0]).others:
            return view.inputs[node][0]
        if view.ops[node] in ("Add", "AddV2"):
            for operand in view.inputs[node]:
                is_constant = constant_at(view, operand) is not None
                if is_constant or variables_of(view, operand):
                    return operand
    return None


def _only_scaled(view, node):
    """(consumer, parameter) where a node's result meets a vector of parameters."""
    for consumer in view.consumers(node, 8):
        op, inputs = view.ops[consumer], view.inputs[consumer]
        if op != "Mul" and op not in _ADDITIONS or len(inputs) != 2:
            continue
        other = inputs[1] if node_of(inputs[0]) == node else inputs[0]
        if variables_of(view, other) and is_statistic_like(view, other):
            return consumer, other
        # In a frozen graph, a constant; a number scales all channels alike and is no gamma.
        source = node_of(origin(view, other))
        is_vector = view.ops[source] == "Const" and constant_size(view, source) != 1
        if is_vector and is_per_channel(view, source):
            return consumer, other
    return None
