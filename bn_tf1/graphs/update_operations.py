"""The operations of a graph that update moving statistics, and their decay.

An update is told by what it writes: a value computed, by arithmetic alone, from the
batch statistics of a normalisation. Whether somebody runs it is the question of
`training_nodes`.

    moving = moving - (1 - decay) * (moving - batch)

The decay is the factor of the old value in the new one, whatever the way it is written.
"""

from __future__ import annotations

from typing import Container, NamedTuple, Sequence

from bn_tf1.checkpoints.dialects import STATISTICS, find_slot
from bn_tf1.graphs.node_values import (
    LOCKED_AVERAGES,
    Leaves,
    leaves,
    only_origin,
    same_values,
    scalars,
    variable_name,
    variables_of,
    written_value,
)
from bn_tf1.graphs.recognition.normalizations import Normalization
from bn_tf1.graphs.view import GraphView, node_of, port_of, reference_to

# An update is some ten operations, and a decay one of a few numbers.
_DEPTH = 16
_VALUES = 8


class Update(NamedTuple):
    """One operation that writes a moving statistic.

    Attributes:
        node: the operation.
        variable: the node of the variable.
        role: "moving_mean" or "moving_variance".
        sources: the batch statistics that enter: nodes of reductions, and references to
            outputs of fused batch norms.
        decay: share of the old value that is kept; None where it is not known.
        debiased: whether the variable is the accumulator of a zero-debiased average.
    """

    node: int
    variable: int
    role: str
    sources: frozenset[int]
    decay: float | None
    debiased: bool


def statistics_of(
    view: GraphView, normalization: Normalization
) -> dict[str, frozenset[int]]:
    """The batch statistics of a normalisation by role, as `Update.sources` has them."""
    mean, variance = normalization.mean_leaves, normalization.variance_leaves
    if normalization.kind == "fused":
        outputs = (reference_to(normalization.node, port) for port in (1, 2))
        return {role: frozenset([output]) for role, output in zip(STATISTICS, outputs)}
    means = mean.reductions | mean.statistics
    # The variance is of differences to the mean, which is behind it, too.
    return {
        "moving_mean": means,
        "moving_variance": (variance.reductions | variance.statistics) - means,
    }


def find_updates(
    view: GraphView, normalizations: Sequence[Normalization]
) -> list[Update]:
    """The updates of moving statistics, in the order of their nodes."""
    roles: dict[int, str] = {}
    for normalization in normalizations:
        for role, sources in statistics_of(view, normalization).items():
            roles.update(dict.fromkeys(sources, role))
    found = []
    for node, value, (variable, *_) in _writes(view):
        sources = _known_sources(view, leaves(view, value), roles)
        if sources:
            # A biased variance in the form E[x^2] - E[x]^2 is made of both.
            is_mean = {roles[source] for source in sources} == {"moving_mean"}
            role = "moving_mean" if is_mean else "moving_variance"
            is_biased = variable_name(view, variable).rpartition("/")[2] == "biased"
            decay = decay_of(view, node, variable)
            found.append(Update(node, variable, role, sources, decay, is_biased))
    return found


def _writes(view):
    """(operation, reference to what it writes, variables) of all that write some."""
    for node in range(len(view)):
        value = written_value(view, node)
        if value is not None:
            variables = variables_of(view, view.inputs[node][0])
            if variables:
                yield node, value, variables


def _known_sources(view, written: Leaves, roles):
    sources = written.reductions | written.statistics
    for node in [node for node in written.reductions if node not in roles]:
        # Virtual batches: the mean of the means.
        sources |= leaves(view, view.inputs[node][0]).reductions
    return frozenset(source for source in sources if source in roles)


def debiased_variable(name: str, variables: Sequence[str]) -> str | None:
    """The moving statistic of the accumulator `name`, X/biased, or None."""
    slot = find_slot(name, variables)
    return slot.variable if slot is not None else None


def other_writes(view: GraphView, variables: Container[int]) -> dict[int, list[int]]:
    """By variable, operations that change it, in this or any other way."""
    found: dict[int, list[int]] = {}
    for node, value, written in _writes(view):
        for variable in written:
            if variable in variables and _is_update(view, node, value):
                found.setdefault(variable, []).append(node)
    return found


def _is_update(view, node, value):
    """Initial values and restored ones are no updates."""
    if "Add" in view.ops[node] or "Sub" in view.ops[node]:
        return True
    # A Saver restores by an Assign of what it reads, an initializer of numbers.
    written = leaves(view, value)
    return bool(written.variables or written.reductions or written.statistics)


def decay_of(view: GraphView, node: int, variable: int) -> float | None:
    """The share of the old value of `variable` that the assignment `node` keeps."""
    if view.ops[node] in LOCKED_AVERAGES:
        return None  # it has no difference to the old value; other calls tell the decay
    value = view.inputs[node][1]
    factors = _factors(view, value, variable, _DEPTH, {})
    if factors is None:  # not linear in it, as far as can be seen
        return _fused_decay(view, value)
    if "Add" in view.ops[node]:
        factors = {1 + factor for factor in factors}
    elif "Sub" in view.ops[node]:
        factors = {1 - factor for factor in factors}
    else:
        fused = _fused_decay(view, value)
        if fused is not None:
            return fused
    # float32 has seven digits: 1 - 0.01 and 0.99 are one decay.
    decays = sorted({round(factor, 7) for factor in factors})
    # A guard keeps the old value as it is, which is a decay of 1, but not the layer's.
    guarded = [decay for decay in decays if decay != 1.0]
    decays = guarded or decays
    return decays[0] if len(decays) == 1 else None


def _fused_decay(view, reference):
    """The kernel's own average: its output is what is assigned."""
    reference = only_origin(view, reference)
    factor = view.attribute(node_of(reference), "exponential_avg_factor")
    if (
        factor is None or not port_of(reference) or factor.f == 1.0
    ):  # it averages nothing
        return None
    return round(1.0 - float(f"{factor.f:.7g}"), 7)


def _factors(view, reference, variable, depth, known):
    """The factors of `variable` in a linear expression; None where it is not known."""
    if reference in known:
        return known[reference]
    if depth == 0:
        return None
    known[reference] = {0.0}  # a cycle gives the old value no further share
    node = node_of(reference)
    op, inputs = view.ops[node], view.inputs[node]

    def operand(i):
        return _factors(view, inputs[i], variable, depth - 1, known)

    if node == variable:
        found = {1.0}
    elif op in ("Add", "AddV2", "Sub") and len(inputs) == 2:
        sign = -1 if op == "Sub" else 1
        found = _combined(operand(0), operand(1), lambda a, b: a + sign * b)
    elif op in ("Mul", "MulNoNan", "RealDiv", "Div") and len(inputs) == 2:
        found = _scaled(view, op, inputs, operand)
    elif op == "Neg":
        found = _combined(operand(0), {0.0}, lambda a, b: -a)
    else:
        earlier = same_values(view, reference)[:_VALUES]
        parts = [_factors(view, r, variable, depth - 1, known) for r in earlier]
        found = {0.0} if not parts else _union(parts)
    known[reference] = found
    return found


def _scaled(view, op, inputs, operand):
    left = operand(0)
    right = operand(1)
    # Nothing of the old value is in it, whatever the numbers are.
    if left == {0.0} and right == {0.0}:
        return {0.0}
    is_product = op in ("Mul", "MulNoNan")
    if is_product and left == {0.0}:
        return _combined(scalars(view, inputs[0]) or None, right, lambda a, b: a * b)
    if right != {0.0}:  # not linear: a square, or a division by it
        return None
    numbers = scalars(view, inputs[1]) or None
    if is_product:
        return _combined(left, numbers, lambda a, b: a * b)
    return _combined(left, numbers, lambda a, b: a / b if b else 0.0)


def _combined(left, right, join):
    if left is None or right is None:
        return None
    return set(sorted({join(a, b) for a in left for b in right})[:_VALUES])


def _union(parts):
    if any(part is None for part in parts):
        return None
    return set().union(*parts)
