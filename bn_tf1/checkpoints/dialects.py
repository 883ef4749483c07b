"""How batch-norm layers are named and shaped in the checkpoints of each library.

    dialect             under the layer's scope                     shape
    bn_tf1, tf_layers,  gamma beta moving_mean moving_variance      [C]
    slim, keras,
    sonnet_v2
    sonnet              the same names                              [1, .., C, .., 1]
    tensorpack          gamma beta mean/EMA variance/EMA            [C]

`slim` is tf.contrib.layers and tf_slim; `sonnet` is Sonnet v1's `BatchNorm`,
`sonnet_v2` its `BatchNormV2`; `keras` is tf.keras saved by name, not by object.

A layer is recognised by its two moving statistics. What an optimizer or an average
keeps for a variable V is named V/slot (tf.train) or prefix/V/slot (tf.keras), with a
slot of one component; it is called a slot of V below. The slot of a weight average
(`tf.train.ExponentialMovingAverage`) is its shadow.

Sources: the libraries themselves, as tests/fixtures/README.md lists their versions.
"""

from __future__ import annotations

import re
from typing import Iterable, Mapping, NamedTuple, Tuple

Shape = Tuple[int, ...]

STATISTICS = ("moving_mean", "moving_variance")
# Beside them, where the decay follows from the number of updates: that number.
COUNTER = "num_updates"
ROLES = ("gamma", "beta", *STATISTICS)
# Where `bn_tf1` has the second and further banks of a layer.
_BANK = re.compile(r"((?P<layer>.+)/)?bank_(?P<number>\d+)$")
# What tf.train.ExponentialMovingAverage calls its shadows unless told otherwise.
AVERAGE = "ExponentialMovingAverage"
INITIAL_VALUES = {"gamma": 1.0, "beta": 0.0, "moving_mean": 0.0, "moving_variance": 1.0}

RENORM = (
    "moving_stddev",
    "renorm_mean",
    "renorm_mean_weight",
    "renorm_stddev",
    "renorm_stddev_weight",
)
ZERO_DEBIAS = ("biased", "local_step")


class Dialect(NamedTuple):
    """The names of one library.

    Attributes:
        leaves: the last part of a variable's name, by role (one of `ROLES`).
        defaults: which of gamma and beta a layer has unless told otherwise.
        keeps_rank: whether the variables have the rank of the layer's input.
        renorm: whether a layer can have the state of batch renormalization.
        zero_debias: whether it can have the state of a zero-debiased average.
        is_own: whether it can have the number of its updates, and several banks.
    """

    leaves: Mapping[str, str] = dict(zip(ROLES, ROLES))
    defaults: tuple[str, ...] = ("gamma", "beta")
    keeps_rank: bool = False
    renorm: bool = False
    zero_debias: bool = False
    is_own: bool = False


class Layer(NamedTuple):
    """A batch-norm layer found among the names of a checkpoint.

    Attributes:
        scope: the name of the layer; "" for one without a scope.
        names: the names of its variables by role; gamma and beta may be missing.
        shape: the shape that these variables share.
    """

    scope: str
    names: Mapping[str, str]
    shape: Shape

    @property
    def channels(self) -> int:
        """C, the one size that may be other than 1."""
        return max(self.shape)


class Slot(NamedTuple):
    """A name taken apart: [prefix/]variable/leaf."""

    prefix: str
    variable: str
    leaf: str


# What each library's layer has by default: slim's and Sonnet's have no gamma unless
# they are asked for one.
DIALECTS: Mapping[str, Dialect] = {
    "bn_tf1": Dialect(renorm=True, zero_debias=True, is_own=True),
    "tf_layers": Dialect(renorm=True),
    "slim": Dialect(defaults=("beta",), renorm=True, zero_debias=True),
    "sonnet": Dialect(defaults=("beta",), keeps_rank=True),
    "sonnet_v2": Dialect(),
    "tensorpack": Dialect(
        dict(zip(ROLES, ("gamma", "beta", "mean/EMA", "variance/EMA")))
    ),
    "keras": Dialect(renorm=True),
}
# In the place of a dialect that is read: all layers are those that a map names.
HAND_WRITTEN = "hand_written"
_PYTORCH = (
    "reads checkpoints of TensorFlow: in PyTorch, rename weight, bias, running_mean and "
    "running_var to gamma, beta, moving_mean and moving_variance (its momentum is "
    "1 - decay, its epsilon 1e-5), give convolutions [height, width, in, out] and dense "
    "layers [in, out], and save the arrays with a tf.train.Saver"
)
# What is no dialect, but asked for: why not, and what to do.
NO_DIALECTS = {"pytorch": _PYTORCH, "torch": _PYTORCH}


def join(*parts: str) -> str:
    """The parts that are not empty, joined by "/"."""
    return "/".join(part for part in parts if part)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts `layer` before `layer_2` before `layer_10`."""
    parts = re.findall(r"\d+|\D+", name)
    # Pairs of one kind: a number cannot be compared with a text.
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def unnumbered(scope: str) -> str:
    """`scope` without the numbers that TensorFlow appends to make names unique."""
    return "/".join(re.sub(r"_\d+$", "", part) for part in scope.split("/"))


def bank_of(scope: str) -> tuple[str, int]:
    """(the layer, the number) of a scope in which a bank may lie; 0 where it is none."""
    match = _BANK.match(scope)
    return (match["layer"] or "", int(match["number"])) if match else (scope, 0)


def statistic_role(name: str) -> str | None:
    """ "moving_mean" or "moving_variance" if `name` is one in any dialect, else None."""
    for dialect in DIALECTS.values():
        for role in STATISTICS:
            if _scope_of(name, dialect.leaves[role]) is not None:
                return role
    return None


def _scope_of(name, leaf):
    if name == leaf:
        return ""
    return name[: -len(leaf) - 1] if name.endswith("/" + leaf) else None


def find_layers(shapes: Mapping[str, Shape], dialect: str) -> list[Layer]:
    """The batch-norm layers among variables, in natural order of their scopes.

    Args:
        shapes: shape by name of every tensor of a checkpoint.
        dialect: a key of `DIALECTS`.

    Raises:
        ValueError: a layer has one moving statistic without the other, variables of
            different shapes, or more than one size other than 1.
    """
    leaves = DIALECTS[dialect].leaves
    scopes = set()
    for role in STATISTICS:
        for name, shape in shapes.items():
            scope = _scope_of(name, leaves[role])
            # A scalar is a summary's average of something else.
            if scope is not None and shape:
                scopes.add(scope)
    return [
        _layer(scope, leaves, shapes, dialect)
        for scope in sorted(scopes, key=natural_key)
    ]


def _layer(scope, leaves, shapes, dialect):
    names = {role: join(scope, leaf) for role, leaf in leaves.items()}
    names = {role: name for role, name in names.items() if name in shapes}
    for role in STATISTICS:
        if role not in names:
            (other,) = set(STATISTICS) & set(names)
            raise ValueError(
                f"{names[other]} has no {join(scope, leaves[role])} beside it: no whole "
                f"batch-norm layer of {dialect}"
            )
    found = {name: shapes[name] for name in names.values()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the variables of the batch-norm layer {scope!r} differ in shape: "
            + ", ".join(f"{name} {list(shape)}" for name, shape in found.items())
        )
    layer = Layer(scope, names, shapes[names["moving_mean"]])
    if sum(size != 1 for size in layer.shape) > 1:
        raise ValueError(
            f"{names['moving_mean']} has shape {list(layer.shape)}, but may have only "
            "one size other than 1: its statistics are not per channel"
        )
    return layer


def find_slot(name: str, variables: Iterable[str]) -> Slot | None:
    """Takes `name` apart if it is a slot of one of `variables`, else None."""
    # The longest first: `a/b/Momentum` is kept for `a/b`, though there is a `b`.
    *parts, leaf = name.split("/")
    for i in range(len(parts)):
        variable = "/".join(parts[i:])
        if variable in variables:
            return Slot("/".join(parts[:i]), variable, leaf)
    return None


def find_shadows(shapes: Mapping[str, Shape], average: str) -> dict[str, str]:
    """The name of its shadow by name of a variable.

    Args:
        shapes: shape by name of every tensor of a checkpoint.
        average: the name of the average, such as `AVERAGE`.

    Raises:
        ValueError: there is no shadow, or a variable has two, or one of another shape.
    """
    shadows: dict[str, str] = {}
    leaves = set()
    for name in sorted(shapes, key=natural_key):
        slot = find_slot(name, shapes)
        if slot is None:
            continue
        leaves.add(slot.leaf)
        # What else is kept for variables is told in the error: the average's name may
        # be there.
        if slot.leaf != average:
            continue
        variable = slot.variable
        if variable in shadows:
            raise ValueError(f"{variable} has two: {shadows[variable]} and {name}")
        if shapes[name] != shapes[variable]:
            raise ValueError(
                f"{name} has shape {list(shapes[name])}, but {variable} has "
                f"{list(shapes[variable])}"
            )
        shadows[variable] = name
    if not shadows:
        raise ValueError(
            f"no tensor is named VARIABLE/{average}; what is kept for variables is "
            f"named {sorted(leaves) or 'in no such way'}"
        )
    return shadows


def lost_state(
    shapes: Mapping[str, Shape], layers: Iterable[Layer], dialect: str
) -> list[str]:
    """The names of state of `layers` that layers of `dialect` do not have."""
    target = DIALECTS[dialect]
    scopes = {layer.scope for layer in layers}
    statistics = {layer.names[role] for layer in layers for role in STATISTICS}

    def is_lost(name):
        scope, _, leaf = name.rpartition("/")
        # A scope bank_1 in no layer is a layer of that name.
        base, bank = bank_of(scope)
        if leaf in ZERO_DEBIAS and find_slot(name, statistics) is not None:
            return not target.zero_debias
        if scope in scopes and leaf in RENORM and not target.renorm:
            return True
        is_own = leaf == COUNTER or (bank > 0 and base in scopes)
        return scope in scopes and is_own and not target.is_own

    return sorted(filter(is_lost, shapes), key=natural_key)


def check_name_map(
    name_map: Mapping[str, str], names: Iterable[str], where: str
) -> None:
    """Raises ValueError for what is neither a name nor a scope of `names`, `where`."""
    for old in name_map:
        if not any(name == old or name.startswith(old + "/") for name in names):
            raise ValueError(
                f"`name_map` has {old!r}, which is neither a name nor a scope {where}"
            )


def rename(name: str, moves: Mapping[str, str]) -> str:
    """`name` with the longest key of `moves` that is it, or a scope of it, replaced."""
    # From the longest on: a variable that is named itself leaves its scope.
    parts = name.split("/")
    for end in range(len(parts), 0, -1):
        old = "/".join(parts[:end])
        if old in moves:
            return join(moves[old], *parts[end:])
    return name
