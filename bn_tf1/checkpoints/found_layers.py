"""Batch-norm layers among the names of a checkpoint, whoever wrote it.

`dialects.find_layers` wants the dialect and whole layers, since a conversion must not
guess. Here a checkpoint comes from anybody and may be broken, so that half a layer is
one too. A layer is a scope with a moving mean or a moving variance, under one of these
names:

    moving_mean, moving_variance                   tf.layers, slim, Keras, Sonnet, bn_tf1
    mean/EMA, variance/EMA                         tensorpack
    moments/*/ExponentialMovingAverage             hand-written, tf.train's average of
                                                   what tf.nn.moments gives
    pop_mean, running_mean, ema_mean, ...          hand-written
    mean, variance                                 converted from Caffe; only beside a
                                                   gamma or beta, or scale or offset

or what a graph says. tf.train.Checkpoint appends `/.ATTRIBUTES/VARIABLE_VALUE` to the
names, TensorFlow numbers to the second and later hand-written ones (`pop_mean_1`).
"""

from __future__ import annotations

import collections
import re
from typing import Any, Iterable, Mapping, NamedTuple

from bn_tf1.checkpoints.dialects import (
    AVERAGE,
    ROLES,
    STATISTICS,
    Shape,
    join,
    natural_key,
)

# What tf.train.Checkpoint and Keras 3 append to the name of a variable.
_OBJECT_SUFFIX = re.compile(r"(/_value)?/\.ATTRIBUTES/VARIABLE_VALUE$")
# Where an optimizer keeps what is no variable of the model.
_SLOT = re.compile(r"/\.OPTIMIZER_SLOT/|(^|/)optimizer/")

# The leaves of a mean and its variance; @ stands for tf.train's average.
_PAIRS = (
    ("moving_mean", "moving_variance"),
    ("moving_mean", "moving_var"),
    ("moving_avg", "moving_var"),
    ("mean/EMA", "variance/EMA"),
    ("moments/Squeeze/@", "moments/Squeeze_1/@"),
    ("moments/mean/@", "moments/variance/@"),
    ("moments/normalize/mean/@", "moments/normalize/variance/@"),
    ("batch_mean/@", "batch_variance/@"),
    ("batch_mean/@", "batch_var/@"),
    ("mean/@", "variance/@"),
    ("mean/@", "var/@"),
    ("average_mean", "average_variance"),
    ("avg_mean", "avg_var"),
    *(
        (f"{kind}_mean", f"{kind}_{variance}")
        for kind in ("pop", "population", "running", "mov", "ema", "global")
        for variance in ("variance", "var")
    ),
)
# Alone these are the names of much else, such as of a normalised input.
_BARE_PAIRS = (("mean", "variance"), ("mean", "var"))
_PARAMETERS = {"gamma": ("gamma", "scale"), "beta": ("beta", "offset", "shift")}
_NUMBER = r"(?P<number>(_\d+)?)"


class CheckpointLayer(NamedTuple):
    """A batch-norm layer of a checkpoint, whole or not.

    Attributes:
        scope: the name of the layer; that of its moving mean where a scope has several
            layers, or where there is none.
        names: the names of its variables in the checkpoint by role.
        variance_at_first: the initial value of its moving variance, 1 or 0.
    """

    scope: str
    names: Mapping[str, str]
    variance_at_first: float = 1.0


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the checkpoint by variable name; slots of an object are left out."""
    plain = {}
    for name in names:
        if _OBJECT_SUFFIX.search(name):
            if not _SLOT.search(name):
                plain[_OBJECT_SUFFIX.sub("", name)] = name
        else:
            plain[name] = name
    return plain


def find_checkpoint_layers(
    shapes: Mapping[str, Shape],
    graph_layers: Iterable[Any] = (),
    plain: Mapping[str, str] | None = None,
) -> list[CheckpointLayer]:
    """The layers among the names of a checkpoint, in natural order of their scopes.

    Args:
        shapes: shape by name of every tensor of the checkpoint.
        graph_layers: `GraphLayer`s of the graph that was saved: what they call their
            variables counts before what a name looks like.
        plain: name in the checkpoint by variable name, where it is known.
    """
    plain = plain_names(shapes) if plain is None else plain
    by_graph = [_layer_of_graph(layer, plain) for layer in graph_layers]
    layers = {layer.scope: layer for layer in by_graph if layer is not None}
    taken = {name for layer in layers.values() for name in layer.names.values()}
    free = {name: full for name, full in plain.items() if full not in taken}
    # Half a layer of the graph must not come back as another one by its names.
    for layer in _layers_by_name(free, shapes):
        layers.setdefault(layer.scope, layer)
    return [layers[scope] for scope in sorted(layers, key=natural_key)]


def _layer_of_graph(layer, plain):
    names = {role: getattr(layer, role) for role in ROLES}
    names = {role: plain[name] for role, name in names.items() if name in plain}
    if not set(STATISTICS) & set(names):
        return None
    return CheckpointLayer(layer.name, names, _variance_at_first(names))


def _variance_at_first(names):
    # tf.train's average of a tensor starts from zeros, everybody's variable from ones.
    is_average = any(AVERAGE in names.get(role, "") for role in STATISTICS)
    return 0.0 if is_average else 1.0


def _layers_by_name(plain, shapes):
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in plain:
        # A scalar is a summary's average of something else.
        found = _statistic(name) if shapes[plain[name]] else None
        if found is not None:
            role, *group = found
            groups.setdefault(tuple(group), {}).setdefault(role, name)
    for scope, number in _bare_groups(plain, shapes):
        groups.setdefault((scope, number), _bare_names(scope, number, plain))
    several = collections.Counter(scope for scope, _ in groups)
    for (scope, number), names in groups.items():
        names.update(_gamma_and_beta(scope, number, plain))
        label = scope
        # The scope alone would be the name of several layers, or of none.
        if several[scope] > 1 or not scope:
            label = names.get("moving_mean") or names["moving_variance"]
        names = {role: plain[name] for role, name in names.items()}
        yield CheckpointLayer(label, names, _variance_at_first(names))


def _patterns():
    """By the last part of a leaf, which is quick to look up: roles and patterns."""
    found: dict[str, list] = {}
    for pair in _PAIRS:
        for role, leaf in zip(STATISTICS, pair):
            leaf = leaf.replace("@", AVERAGE)
            # The second tf.nn.moments of a scope is moments_1.
            pattern = leaf.replace("moments", r"moments(_\d+)?")
            pattern = re.compile(rf"(?P<scope>(?:.*/)?){pattern}{_NUMBER}$")
            found.setdefault(leaf.split("/")[-1], []).append((role, pattern))
    return found


_PATTERNS = _patterns()


def _statistic(name):
    """(role, scope, number) of a name; None for that of no statistic."""
    # Most names end with none of these, and cost no pattern.
    last = re.sub(r"_\d+$", "", name.rpartition("/")[2])
    for role, pattern in _PATTERNS.get(last, ()):
        match = pattern.match(name)
        if match:
            return role, match["scope"].rstrip("/"), match["number"]
    return None


def _bare_groups(plain, shapes):
    """Scopes with a `mean` and a `variance`, that something was scaled or shifted by."""
    for name in plain:
        match = re.match(rf"(?P<scope>(?:.*/)?)mean{_NUMBER}$", name)
        if match and shapes[plain[name]]:
            scope, number = match["scope"].rstrip("/"), match["number"]
            is_pair = "moving_variance" in _bare_names(scope, number, plain)
            if is_pair and _gamma_and_beta(scope, number, plain):
                yield scope, number


def _bare_names(scope, number, plain):
    for pair in _BARE_PAIRS:
        names = [join(scope, leaf + number) for leaf in pair]
        if all(name in plain for name in names):
            return dict(zip(STATISTICS, names))
    return {}


def _gamma_and_beta(scope, number, plain):
    found = {}
    for role, leaves in _PARAMETERS.items():
        for leaf in leaves:
            name = join(scope, leaf + number)
            if name in plain:
                found.setdefault(role, name)
    return found
