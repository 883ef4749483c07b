"""The places of a graph where something is normalised per channel over the batch.

    fused      FusedBatchNorm, V2, V3, _FusedBatchNormEx, the oneDNN rewritings
               (_MklFusedBatchNorm...), batch norms fused into a convolution and the old
               BatchNormWithGlobalNormalization
    composed   (x - mean) / sqrt(variance + epsilon), in any of these forms:
               (x - mean) * rsqrt(...) [* gamma + beta], x * inverse + (beta - mean *
               inverse), with sqrt and division, or with a power of -0.5 or 0.5; mean
               and variance from moments, from E[x^2] - E[x]^2, from variables, or from
               a condition between them; and what `bn_tf1` composes, whose gradient is
               written by hand and attached to a node that names all operands

Layer, instance and group normalization reduce other axes than the batch; L2
normalization subtracts no mean; optimizers divide by sqrt(v) what is no difference of
data and a mean. None of them is taken for a batch norm.

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), algorithm 1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bn_tf1.tools.graph_values import (
    Leaves,
    constant,
    constant_size,
    integers,
    is_fused,
    leaves,
    origin,
    same_values,
    scalars,
    static_shape,
    variables_of,
)
from bn_tf1.tools.graph_view import GraphView, node_of, reference_to

_FUSED_CONVOLUTIONS = (
    "_FusedConv2D",
    "_FusedDepthwiseConv2dNative",
    "_MklFusedConv2D",
    "_MklNativeFusedConv2D",
    "_MklFusedDepthwiseConv2dNative",
    "_MklNativeFusedDepthwiseConv2dNative",
)
_GLOBAL = "BatchNormWithGlobalNormalization"
_ROOTS = frozenset(["Rsqrt", "Sqrt", "Pow"])
_ADDITIONS = frozenset(["Add", "AddV2", "BiasAdd"])
_DIVISIONS = frozenset(["RealDiv", "Div"])
_RECIPROCALS = frozenset(["Reciprocal", "Inv"])
_SEARCH_STEPS = 200
# As `bn_tf1.statistics.composed` registers it.
_OWN_GRADIENT = re.compile(
    rb"bn_tf1\.normalize_batch\(axes=\(([\d, ]+)\), epsilon=([-+.\de]+)\)$"
)


class Normalization(NamedTuple):
    """One place where something is normalised.

    Attributes:
        node: the node; the last multiplication or addition of a composed one.
        kind: "fused" or "composed".
        op: the operation, or the inverse deviation's: "Rsqrt", "Sqrt" or "Pow".
        x: reference to what is normalised.
        gamma, beta: references, or None.
        mean, variance: references to the statistics that normalise; None for a fused
            one that computes them itself.
        mean_leaves, variance_leaves: what these are computed from.
        epsilon: the number added to the variance; None where it is not known.
        layout: "NHWC", "NCHW" or "".
        mode: "training", "inference" or "switched".
        axes: the axes that are reduced, or None.
    """

    node: int
    kind: str
    op: str
    x: int
    gamma: int | None
    beta: int | None
    mean: int | None
    variance: int | None
    mean_leaves: Leaves | None
    variance_leaves: Leaves | None
    epsilon: float | None
    layout: str
    mode: str
    axes: tuple[int, ...] | None


class _Scale(NamedTuple):
    """What the data is multiplied (or divided: `is_root`) by, on its way to the data."""

    node: int
    is_root: bool
    gamma: int | None


class _Products(NamedTuple):
    """x * inverse and mean * inverse, which are added later."""

    data: list
    means: list


def find_normalizations(view: GraphView) -> list[Normalization]:
    """All places of `view` where a batch norm normalises, in the order of the nodes."""
    examined = _examined_bodies(view)
    found, inner = [], set()
    for body in examined:
        for node in range(view.bodies[body].first, view.bodies[body].end):
            op = view.ops[node]
            if op in _ROOTS:
                match = _composed(view, node)
            elif "BatchNorm" in op or op in _FUSED_CONVOLUTIONS:
                match = _fused(view, node)
            elif op == "IdentityN":
                match = _own(view, node)
                if match is not None:
                    inner.add(node_of(_through_casts(view, view.inputs[node][0])))
            else:
                continue
            if match is not None:
                found.append(match)
    # A kernel may compute the output for the moments that were composed.
    return [match for match in found if match.node not in inner]


def _examined_bodies(view):
    """The graph and the functions that it leads to; all, if it calls none.

    A SavedModel of Keras also holds functions that only Python code would call.
    """
    reached, pending = {0}, [0]
    calls: dict[int, set[int]] = {}
    for node, called in view.called.items():
        calls.setdefault(view.body_of(node), set()).update(called)
    if not calls.get(0):
        return range(len(view.bodies))
    while pending:
        for body in calls.get(pending.pop(), ()):
            if body not in reached:
                reached.add(body)
                pending.append(body)
    return sorted(reached)


# ------------------------------------------------------------------------------- fused


def _fused(view, node):
    op, inputs = view.ops[node], view.inputs[node]
    if op in _FUSED_CONVOLUTIONS:
        fused = view.attribute(node, "fused_ops")
        if fused is None or b"FusedBatchNorm" not in fused.list.s or len(inputs) < 6:
            return None
        operands = (inputs[0],) + inputs[2:6]
    elif op == _GLOBAL and len(inputs) >= 5:
        x, mean, variance, beta, gamma = inputs[:5]
        operands = (x, gamma, beta, mean, variance)
    elif is_fused(op) and len(inputs) >= 5:
        operands = inputs[:5]
    else:
        return None
    x, gamma, beta, mean, variance = operands
    training = is_fused(op) and _flag(view, node, "is_training", True)
    if training and _is_layer_norm(view, x, gamma, beta):
        return None
    # The moving statistics come in and go out where the kernel averages them itself.
    averaging = (
        training and (_number(view, node, "exponential_avg_factor") or 1.0) < 1.0
    )
    known = averaging or not training
    layout = _text(view, node, "data_format", "NHWC")
    return Normalization(
        node,
        "fused",
        op,
        x,
        gamma,
        beta,
        mean if known else None,
        variance if known else None,
        leaves(view, mean) if known else None,
        leaves(view, variance) if known else None,
        _number(view, node, "epsilon" if op != _GLOBAL else "variance_epsilon"),
        {"NDHWC": "NHWC", "NCDHW": "NCHW"}.get(layout, layout),
        "training" if training else "inference",
        (0, 2, 3) if layout.startswith("NC") else (0, 1, 2),
    )


def _is_layer_norm(view, x, gamma, beta):
    """Layer and group norms reshape to [1, N, ...] and scale after the kernel."""
    node = node_of(x)
    if view.ops[node] != "Reshape" or variables_of(view, gamma):
        return False
    shape = node_of(origin(view, view.inputs[node][1]))
    if view.ops[shape] == "Pack" and view.inputs[shape]:
        first = scalars(view, view.inputs[shape][0])
    else:
        sizes = integers(view, reference_to(shape))
        first = sizes[:1] if sizes else ()
    return tuple(first) == (1,) and not variables_of(view, beta)


def _flag(view, node, name, default):
    value = view.attribute(node, name)
    return default if value is None else value.b


def _number(view, node, name):
    value = view.attribute(node, name)
    if value is None:
        return 1e-4 if name.endswith("epsilon") else None
    return float(f"{value.f:.7g}")  # a float32: 0.001 and not 0.0010000000474974513


def _text(view, node, name, default):
    value = view.attribute(node, name)
    return default if value is None else value.s.decode("utf-8", "replace")


# --------------------------------------------------------------------- bn_tf1's composed


def _own(view, node):
    gradient = view.attribute(node, "_gradient_op_type")
    named = gradient is not None and _OWN_GRADIENT.match(gradient.s)
    if not named or len(view.inputs[node]) < 6:
        return None
    _, x, mean, variance, gamma, beta = view.inputs[node][:6]
    shape = static_shape(view, x)
    channels = {int(axis) for axis in named.group(1).split(b",") if axis.strip()}
    axes = None
    if shape is not None:
        axes = tuple(axis for axis in range(len(shape)) if axis not in channels)
    return Normalization(
        node,
        "composed",
        view.ops[node],
        x,
        gamma,
        beta,
        mean,
        variance,
        leaves(view, mean),
        leaves(view, variance),
        float(named.group(2)),
        _layout(view, x, axes),
        "training",
        axes,
    )


# ---------------------------------------------------------------------------- composed


def _composed(view, node):
    is_root = view.ops[node] == "Sqrt"
    if not view.inputs[node]:
        return None
    if view.ops[node] == "Pow":
        exponents = scalars(view, view.inputs[node][-1])
        if exponents not in ({0.5}, {-0.5}):
            return None
        is_root = exponents == {0.5}
    variance, epsilon = _without_epsilon(view, view.inputs[node][0])
    variance_leaves = _statistic(view, variance)
    if variance_leaves is None:
        return None
    match = _normalised_by(view, _Scale(node, is_root, None))
    if match is None:
        return None
    x, mean, gamma, last = match
    mean_leaves = _statistic(view, mean)
    if mean_leaves is None or _is_same(mean_leaves, variance_leaves):
        return None
    gamma, beta, last = _affine(view, gamma, last, mean)
    axes = _axes(view, mean_leaves) or _axes(view, variance_leaves)
    return Normalization(
        last,
        "composed",
        view.ops[node],
        x,
        gamma,
        beta,
        mean,
        variance,
        mean_leaves,
        variance_leaves,
        epsilon,
        _layout(view, x, axes),
        _mode(variance_leaves, mean_leaves),
        axes,
    )


def _without_epsilon(view, reference):
    """The variance and the number that is added to it, 0 where there is none."""
    current = reference
    for _ in range(8):
        node = node_of(current)
        if (
            view.ops[node] in ("Add", "AddV2", "Maximum")
            and len(view.inputs[node]) == 2
        ):
            left, right = view.inputs[node]
            for variance, epsilon in ((left, right), (right, left)):
                numbers = scalars(view, epsilon)
                if len(numbers) == 1:
                    return variance, next(iter(numbers))
        earlier = same_values(view, current)
        if len(earlier) != 1:
            break
        current = earlier[0]
    return reference, 0.0


def _statistic(view, reference):
    """The leaves of a mean or variance of a batch norm; None if it is no such thing."""
    found = leaves(view, reference)
    if found.others or not any(found):
        return None
    for node in found.reductions:
        if not _reduces_the_batch(view, node):
            return None
    for node in found.variables | found.constants:
        if not _is_per_channel(view, node):
            return None
    return found


def _reduces_the_batch(view, node):
    axes = _reduced_axes(view, node)
    if axes is None:
        # tf.range(tf.rank(x) - 1) begins with 0, whatever the rank.
        source = node_of(origin(view, view.inputs[node][-1]))
        if view.ops[source] != "Range":
            return False
        return scalars(view, view.inputs[source][0]) == {0.0}
    return 0 in axes


def _reduced_axes(view, node):
    if len(view.inputs[node]) < 2:
        return None
    axes = integers(view, view.inputs[node][1])
    if axes and min(axes) < 0:
        shape = static_shape(view, view.inputs[node][0])
        if shape is not None:
            axes = tuple(axis % len(shape) if shape else axis for axis in axes)
    return axes


def _is_per_channel(view, node):
    """Whether at most one size of a variable or constant is other than 1."""
    shape = static_shape(view, reference_to(node))
    return shape is not None and sum(size != 1 for size in shape) <= 1


def _is_same(mean, variance):
    """No mean and variance: the same variable or constant is in both places."""
    if mean.reductions or variance.reductions:
        return False
    return bool(mean.variables & variance.variables) or bool(
        mean.constants & variance.constants
    )


def _normalised_by(view, scale):
    """(x, mean, gamma, last node) of what is scaled by `scale`, or None."""
    products = _Products([], [])
    seen, pending = {scale.node}, [scale]
    while pending and len(seen) < _SEARCH_STEPS:
        scale = pending.pop(0)
        for consumer in view.consumers(scale.node)[:_SEARCH_STEPS]:
            if consumer in seen:
                continue
            seen.add(consumer)
            following = _follow(view, scale, consumer, products)
            if isinstance(following, _Scale):
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
    """A match, the next `_Scale`, or None; products are noted down."""
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
    numbers = scalars(view, other)
    found = leaves(view, other)
    is_data = bool(found.others) or not all(
        _is_per_channel(view, node) for node in found.variables | found.constants
    )
    if is_data and not numbers:
        products.data.append((other, scale.gamma, consumer))
        return None
    if _is_subtracted(view, consumer) or view.ops[node_of(other)] == "Neg":
        products.means.append((other, consumer))
        return None
    gamma = scale.gamma if numbers else other
    return _Scale(consumer, False, gamma)


def _centered(view, reference):
    """(x, mean) where `reference` is x - mean, else None."""
    node = node_of(_through_casts(view, reference))
    if view.ops[node] != "Sub" or len(view.inputs[node]) != 2:
        return None
    x, mean = view.inputs[node]
    found = _statistic(view, mean)
    if found is None or not any(found) or _is_statistic_like(view, x):
        return None
    return x, mean


def _is_statistic_like(view, reference):
    found = leaves(view, reference)
    return not found.others and all(
        _is_per_channel(view, node) for node in found.variables | found.constants
    )


def _through_casts(view, reference):
    for _ in range(8):
        if view.ops[node_of(reference)] not in ("Identity", "Cast", "Reshape"):
            break
        reference = view.inputs[node_of(reference)][0]
    return reference


def _is_subtracted(view, node):
    """Whether `node` is what a Sub subtracts, by way of reshapes or not."""
    for _ in range(4):
        consumers = view.consumers(node)[:8]
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
    for consumer in view.consumers(product)[:8]:
        if view.ops[consumer] not in ("Add", "AddV2", "Sub", "BiasAdd"):
            continue
        for reference in view.inputs[consumer]:
            other = node_of(_through_casts(view, reference))
            reached = {other} | {node_of(source) for source in view.inputs[other]}
            reached |= {
                node_of(_through_casts(view, source)) for source in view.inputs[other]
            }
            if mean[1] in reached:
                return x, _without_sign(view, mean[0]), gamma, consumer
    return None


def _without_sign(view, reference):
    node = node_of(reference)
    return view.inputs[node][0] if view.ops[node] == "Neg" else reference


def _affine(view, gamma, last, mean):
    """(gamma, beta, last node), where they follow the normalisation or are in it."""
    beta = None
    if view.ops[last] in _ADDITIONS:  # x * inverse + (beta - mean * inverse)
        beta = _offset(view, last)
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
        node = node_of(_through_casts(view, reference))
        if view.ops[node] == "Sub" and not leaves(view, view.inputs[node][0]).others:
            return view.inputs[node][0]
        if view.ops[node] in ("Add", "AddV2"):
            for operand in view.inputs[node]:
                source = origin(view, operand)
                if (
                    variables_of(view, operand)
                    or constant(view, node_of(source)) is not None
                ):
                    return operand
    return None


def _only_scaled(view, node):
    """(consumer, parameter) where a node's result meets a vector of parameters."""
    for consumer in view.consumers(node)[:8]:
        op, inputs = view.ops[consumer], view.inputs[consumer]
        if op != "Mul" and op not in _ADDITIONS or len(inputs) != 2:
            continue
        other = inputs[1] if node_of(inputs[0]) == node else inputs[0]
        if variables_of(view, other) and _is_statistic_like(view, other):
            return consumer, other
        source = node_of(origin(view, other))
        is_vector = view.ops[source] == "Const" and constant_size(view, source) != 1
        if is_vector and _is_per_channel(view, source):
            return consumer, other
    return None


def _axes(view, found):
    for node in found.reductions:
        axes = _reduced_axes(view, node)
        if axes:
            return tuple(sorted(axes))
    return None


def _layout(view, x, axes):
    shape = static_shape(view, x)
    if axes is None or shape is None or len(shape) not in (4, 5):
        return ""
    channels = set(range(len(shape))) - set(axes)
    if len(channels) != 1:
        return ""
    return {1: "NCHW", len(shape) - 1: "NHWC"}.get(min(channels), "")


def _mode(variance, mean):
    from_batch = variance.reductions or variance.statistics or mean.reductions
    from_moving = variance.variables or variance.constants
    if from_batch and from_moving:
        return "switched"
    return "training" if from_batch else "inference"
