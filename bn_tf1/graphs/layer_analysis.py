"""The batch-norm layers of a graph, whoever made them.

A layer is all normalisations that share a variable: the two branches of a condition, the
towers of several devices, a generator's discriminator that is called twice. Its moving
statistics are those it normalises with in inference, those that its updates write, or,
where neither is in the graph, the variables of their usual names beside gamma and beta.

In a frozen graph constants stand in the place of the variables, under their names. A
layer that was folded into the convolution before it has left a bias behind, under its
name, and nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bn_tf1.checkpoints.dialects import DIALECTS, ROLES, STATISTICS, bank_of, join
from bn_tf1.graphs.node_values import (
    VARIABLES,
    constant,
    constant_size,
    leaves,
    origins,
    variable_name,
)
from bn_tf1.graphs.recognition.normalizations import Normalization, find_normalizations
from bn_tf1.graphs.recognition.rectified import is_rectified
from bn_tf1.graphs.training_nodes import Conditions, is_gradient
from bn_tf1.graphs.update_operations import (
    Update,
    debiased_variable,
    find_updates,
    other_writes,
    statistics_of,
)
from bn_tf1.graphs.view import GraphView, node_of, reached

# Scopes that TensorFlow's own functions make, below the name of the layer.
_INNER_SCOPE = re.compile(
    r"(cond(_\d+)?|batchnorm(_\d+)?|FusedBatchNorm(V\d)?(_\d+)?|moments(_\d+)?|"
    r"Switch.*|switch_.*)$"
)
# What nobody named: then the values have to tell (`_is_named`).
_UNNAMED = re.compile(
    r"(Const|(ones|zeros)(_like)?|Variable|Reshape|ReadVariableOp|mul|add)(_\d+)?$"
)
# What optimize_for_inference and contrib.quantize call the bias that is left of a layer;
# others keep the name of its kernel.
_FOLDED = re.compile(
    r"_bn_offset$|(^|/)(FusedBatchNorm(V\d)?|batchnorm|BatchNorm_Fold)\b"
)
# What TensorFlow 2 calls the constant in the place of a variable: after who reads it.
_FROZEN_READ = re.compile(r"ReadVariableOp(_\d+)?/resource(_\d+)?$")
_AUXILIARY = ("biased", "local_step", "moving_stddev")
_FOLDED_OPS = ("BiasAdd", "Add", "AddV2", "Sub")


class GraphLayer(NamedTuple):
    """A batch-norm layer of a graph, with all calls that share its variables.

    Attributes:
        name: the scope of its variables, or of its nodes where it has none.
        kind: "fused", "composed" or "folded".
        op: the operation that normalises, such as "FusedBatchNormV3"; of a composed
            one that of the deviation, such as "Rsqrt".
        gamma, beta, moving_mean, moving_variance: names of variables, or of constants
            of a frozen graph; None where there is none.
        decay: decay of the moving statistics; None where it is not known.
        epsilon: the number added to the variance; None where it is not known.
        layout: "NHWC", "NCHW" or "" where it is not known.
        mode: "training" (batch statistics), "inference" (moving statistics),
            "switched" (both, by a condition or by separate calls) or "unknown".
        node: name of the node that normalises.
        is_rectified: whether a ReLU takes the output, and nothing else does.
        channels: the size of its variables; None where the graph does not tell.
    """

    name: str
    kind: str
    op: str
    gamma: str | None = None
    beta: str | None = None
    moving_mean: str | None = None
    moving_variance: str | None = None
    decay: float | None = None
    epsilon: float | None = None
    layout: str = ""
    mode: str = "unknown"
    node: str = ""
    is_rectified: bool = False
    channels: int | None = None


class Analysis(NamedTuple):
    """A layer with what the checks need to know of it.

    Attributes:
        layer: the layer.
        calls: its normalisations that can run.
        variables: the nodes of its variables by role, one for each part.
        updates: the operations that write its moving statistics.
        writes: other operations that change them, by node of the variable.
    """

    layer: GraphLayer
    calls: tuple[Normalization, ...]
    variables: dict
    updates: tuple[Update, ...]
    writes: dict


def find_layers(view: GraphView) -> list[GraphLayer]:
    """The layers of `view`, in the order of their nodes."""
    return [found.layer for found in analyse(view, Conditions(view))] + find_folded(
        view
    )


def analyse(view: GraphView, conditions: Conditions) -> list[Analysis]:
    """The layers of `view` that still normalise, in the order of their nodes."""
    calls = [
        call for call in find_normalizations(view) if not conditions.is_never(call.node)
    ]
    updates: dict[int, list[Update]] = {}
    for update in find_updates(view, calls):
        for source in update.sources:
            updates.setdefault(source, []).append(update)
    by_name: dict[str, list[int]] = {}
    for node, op in enumerate(view.ops):
        if op in VARIABLES:
            by_name.setdefault(variable_name(view, node), []).append(node)
    resolved = [_roles(view, call, updates, by_name) for call in calls]
    statistics = {n for roles in resolved for r in STATISTICS for n in roles[r]}
    # One pass over the graph for all layers.
    writes = other_writes(view, statistics)
    found = []
    for members in _groups(view, calls, resolved):
        analysis = _analysis(
            view,
            [calls[i] for i in members],
            [resolved[i] for i in members],
            updates,
            writes,
        )
        if analysis is not None:
            found.append(analysis)
    return found


# -------------------------------------------------------------------- variables of a call


def _roles(view, call, updates, by_name):
    """The nodes that hold gamma, beta and the moving statistics of one call, by role."""
    found = {
        "gamma": _parameter(view, call.gamma),
        "beta": _parameter(view, call.beta),
        "moving_mean": _moving(view, call.mean, call.mean_leaves),
        "moving_variance": _moving(view, call.variance, call.variance_leaves),
    }
    # Batch renormalization mixes gamma into the offset.
    gammas = set(found["gamma"])
    found["beta"] = [node for node in found["beta"] if node not in gammas]
    means = set(found["moving_mean"])
    found["moving_variance"] = [n for n in found["moving_variance"] if n not in means]
    sources = statistics_of(view, call)
    # A layer built for training alone shows its moving statistics only where it writes them,
    # or, where its updates were left out of the file, by their names.
    for role in STATISTICS:
        if not found[role]:
            found[role] = _updated(view, sources, role, updates, by_name)
    for role in STATISTICS:
        if not found[role]:
            found[role] = _beside(view, found, role, by_name)
    return found


def _parameter(view, reference):
    """The variables, or the constant, that a gamma or beta is."""
    if reference is None:
        return []
    ends = leaves(view, reference)
    if ends.variables:
        return sorted(n for n in ends.variables if not _is_auxiliary(view, n))
    # A frozen graph.
    return [node for node in sorted(ends.constants) if _is_named(view, node)]


def _moving(view, reference, ends):
    if reference is None:
        return []
    variables = [n for n in ends.variables if not _is_auxiliary(view, n)]
    if variables:
        return sorted(variables)
    # Beside the batch's statistics a constant is a factor or a size.
    if ends.reductions or ends.statistics:
        return []
    direct = {node_of(source) for source in origins(view, reference)}
    return [node for node in sorted(ends.constants) if node in direct]


def _is_auxiliary(view, node):
    leaf = variable_name(view, node).rpartition("/")[2]
    # Batch renormalization in tf.layers averages the deviation and squares it;
    # `bn_tf1.train_step.accumulation` keeps sums of gradients, and of batches.
    return leaf in _AUXILIARY or leaf.startswith(("renorm_", "accumulated"))


def _is_named(view, node):
    """A constant that was a variable has its name; one that was made on the way has not."""
    leaf = view.names[node].rpartition("/")[2]
    if not _UNNAMED.match(leaf):
        return True
    value = constant(view, node)
    return value is not None and value.size > 0 and value.min() != value.max()


def _updated(view, sources, role, updates, by_name):
    """The variables that the updates from the batch statistics of a call write."""
    found = []
    for update in _of_sources(updates, sources[role]):
        if update.role != role:
            continue
        name = variable_name(view, update.variable)
        if update.debiased:  # what is written is X/biased, what is read is X
            found += by_name.get(debiased_variable(name, by_name) or name, [])
        elif not _is_auxiliary(view, update.variable):
            found.append(update.variable)
    return sorted(set(found))


def _of_sources(updates, sources):
    """The updates that any of `sources` enters, in the order of their nodes."""
    found = {update for source in sources for update in updates.get(source, ())}
    return sorted(found, key=lambda update: update.node)


def _beside(view, found, role, by_name):
    """The variables of the usual names in the scope of gamma or beta."""
    for parameter in found["gamma"] + found["beta"]:
        if view.ops[parameter] not in VARIABLES:
            continue
        scope, _, leaf = variable_name(view, parameter).rpartition("/")
        if leaf not in ("gamma", "beta"):
            continue
        for dialect in DIALECTS.values():
            beside = by_name.get(join(scope, dialect.leaves[role]))
            if beside:
                return list(beside)
    return []


# ---------------------------------------------------------------------- calls of a layer


def _groups(view, calls, resolved):
    """Lists of indices of calls that share a variable, or a scope without variables."""
    first: dict[object, int] = {}
    joined: list[set[int]] = [set() for _ in calls]

    def share(i, keys):
        for key in keys:
            other = first.setdefault(key, i)
            joined[i].add(other)
            joined[other].add(i)

    statistics = [roles["moving_mean"] + roles["moving_variance"] for roles in resolved]
    parameters = [roles["gamma"] + roles["beta"] for roles in resolved]
    for i, keys in enumerate(statistics):
        share(i, keys)
    # A gamma alone joins no two layers whose statistics differ, as those of two domains.
    for i, keys in enumerate(parameters):
        for key in keys if statistics[i] else ():
            first.setdefault(key, i)
    for i, keys in enumerate(parameters):
        if not statistics[i]:
            share(i, keys or [_scope_of_node(view, calls[i].node)])
    seen: set[int] = set()
    for i in range(len(calls)):
        if i not in seen:
            group = reached([i], joined.__getitem__)
            seen |= group
            yield sorted(group)


def _analysis(view, calls, resolved, updates, writes):
    variables = {
        role: sorted({node for roles in resolved for node in roles[role]})
        for role in ROLES
    }
    # Arithmetic alone, without any variable, may be some other standardisation.
    if not any(variables.values()) and all(call.kind != "fused" for call in calls):
        return None
    nodes = set(variables["moving_mean"] + variables["moving_variance"])
    sources = frozenset().union(
        *(s for call in calls for s in statistics_of(view, call).values())
    )
    own = tuple(
        update
        for update in _of_sources(updates, sources)
        if update.variable in nodes or update.debiased
    )
    names = {
        role: variable_name(view, nodes[0]) if nodes else None
        for role, nodes in variables.items()
    }
    # A locked average does not tell its decay; those of other calls do.
    decays = [update.decay for update in own if update.decay is not None]
    modes = {call.mode for call in calls}
    # Those that compute statistics say more of a layer than those that take them.
    first = next((call for call in calls if call.mode != "inference"), calls[0])
    layer = GraphLayer(
        name=_layer_name(view, names, first.node),
        kind=first.kind,
        op=first.op,
        decay=decays[0] if decays else None,
        epsilon=first.epsilon,
        layout=next((call.layout for call in calls if call.layout), ""),
        mode=modes.pop() if len(modes) == 1 else "switched",
        node=view.names[first.node],
        # What computes a gradient may look like the layer, and is none of its calls.
        is_rectified=all(
            is_rectified(view, call) or is_gradient(view, call.node) for call in calls
        ),
        channels=_channels(view, variables),
        **names,
    )
    own_writes = {node: writes[node] for node in sorted(nodes) if node in writes}
    return Analysis(layer, tuple(calls), variables, own, own_writes)


def _channels(view, variables):
    """The number of values of a variable, its parts together."""
    for nodes in filter(None, variables.values()):
        name = variable_name(view, nodes[0])
        # Those of another bank, or of another layer that shares a gamma, do not add up.
        parts = [node for node in nodes if variable_name(view, node) == name]
        sizes = [_size_of(view, node) for node in parts]
        if None not in sizes:
            return sum(sizes)
    return None


def _size_of(view, node):
    if view.ops[node] not in VARIABLES:
        return constant_size(view, node)
    shape = view.attribute(node, "shape")  # that of a handle's values, too
    if shape is None or shape.shape.unknown_rank:
        return None
    count = 1
    for size in shape.shape.dim:
        count *= size.size
    return count if count >= 0 else None


def _layer_name(view, names, node):
    """The scope that the variables share; without one, that of the node."""
    if any(name and _FROZEN_READ.search(name) for name in names.values()):
        return _scope_of_node(view, node) or view.names[node]
    # Banks of one layer share gamma and beta, and are told apart by their statistics.
    in_bank = bank_of((names["moving_mean"] or "").rpartition("/")[0])[1]
    for roles in (STATISTICS,) if in_bank else (("gamma", "beta"), STATISTICS):
        known = [names[role] for role in roles if names[role]]
        scopes = [name.rpartition("/")[0] for name in known]
        if scopes and all(scopes):
            # Without what an average adds: tensorpack's bn/mean/EMA, bn/moments/Squeeze/...
            scope = re.sub(r"/(mean|variance)$", "", scopes[0])
            return re.sub(r"/moments(_\d+)?/\w+$", "", scope) or scope
    known = [name for name in names.values() if name]
    return _scope_of_node(view, node) or (known or [view.names[node]])[0]


def _scope_of_node(view, node):
    parts = view.names[node].rpartition(":")[2].split("/")[:-1]
    while parts and _INNER_SCOPE.match(parts[-1]):
        parts.pop()
    return "/".join(parts)


# -------------------------------------------------------------------------------- folded


def find_folded(view: GraphView) -> list[GraphLayer]:
    """What batch norms that were folded into a convolution left behind."""
    found = []
    for node, op in enumerate(view.ops):
        if op not in _FOLDED_OPS or len(view.inputs[node]) != 2:
            continue
        bias = node_of(view.inputs[node][1])
        name, beta = view.names[node], view.names[bias]
        # Nothing but a name tells a folded layer from any other bias.
        if not any(map(_FOLDED.search, (name, beta))) or view.ops[bias] != "Const":
            continue
        if constant_size(view, bias) not in (1, None):
            scope = _scope_of_node(view, node) or name
            layer = GraphLayer(scope, "folded", op, beta=beta, node=name)
            found.append(layer._replace(mode="inference"))
    return found
