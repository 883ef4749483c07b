"""Which variables a layer has, how they are called and where they start.

Contract: `gamma`, `beta`, `moving_mean` and `moving_variance`, and with
renormalisation `moving_stddev`, `renorm_mean` and `renorm_stddev`: the names and the
order of `tf.layers`; where the decay follows from it `num_updates`, a scalar. The first
of several banks has these names, too, the others have theirs below `bank_1`, `bank_2` and
so on: so whoever knows of one bank alone reads the first, and nobody's tools need to know
of more than vectors. How one is made (shape, collections, regularizer) is for the
layer to say.

`renorm_mean` and `renorm_stddev` are the moving statistics that training corrects with;
`moving_stddev`, the moving mean of sqrt(variance + epsilon), is what `moving_variance`
follows from.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.arguments import COUNTED, Arguments

INITIALIZERS = {
    "gamma": tf.ones_initializer,
    "beta": tf.zeros_initializer,
    "moving_mean": tf.zeros_initializer,
    "moving_variance": tf.ones_initializer,
}
LEARNED = ("gamma", "beta")
# The number of updates of the moving statistics, of their dtype: a float32 counts to 16
# million, when one more batch is no longer seen in an average of all.
COUNTER = "num_updates"
# Of statistics, under a strategy for several devices: each moves its own, and what is read
# and saved is their mean.
OF_STATISTICS = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.MEAN,
}


class LayerVariables(NamedTuple):
    """The variables of a layer: float32, or float64 for float64 inputs.

    But for the counter, their shape is [channels], or that with sizes of 1 for the axes in
    between, such as [1, 1, 1, channels].

    Attributes:
        gamma, beta: None for 1 and 0.
        moving_mean, moving_variance: never None.
        moving_stddev, renorm_mean, renorm_stddev: None without renormalisation.
        num_updates: a scalar; None where the decay does not follow from it.
        others: those of the further banks, whose own `others` are empty.
    """

    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any
    moving_stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None
    num_updates: Any = None
    others: tuple = ()


def make_variables(
    make: Callable[[str, Any], Any],
    asked: Arguments,
    center: bool,
    scale: bool,
    initializers: Mapping[str, Any] | None,
    *,
    order: Sequence[str] = tuple(INITIALIZERS),
    named_by: str = "name",
) -> LayerVariables:
    """Makes the variables of a layer, in the order in which they are written.

    Args:
        make: a function of a variable's name and its initializer that returns it.
        asked: which of them there are: its decay, renormalisation and banks.
        center, scale: whether there is a `beta` and a `gamma`.
        initializers: initializer by name; `INITIALIZERS` has the others.
        order: the names of `INITIALIZERS` in the order in which they are made.
        named_by: the argument that names the layer, for errors.

    Raises:
        ValueError: the scope has such variables and may not share them, or shall share
            and has none, or others; or an initializer raises it.
    """
    constants: dict = {}
    kinds = tf.zeros_initializer, tf.ones_initializer
    shared = {kind: _Sharing(kind, constants) for kind in kinds}
    given = initializers or {}
    initial = {key: given.get(key) or kind() for key, kind in INITIALIZERS.items()}
    initial = {key: shared.get(type(value), value) for key, value in initial.items()}
    absent = {"gamma": not scale, "beta": not center}
    # So that inference is the same before the first update with and without it.
    if asked.renorm is not None:
        stddev = _square_root_of(initial["moving_variance"])
        initial.update(moving_stddev=stddev, renorm_stddev=stddev)
        initial["renorm_mean"] = initial["moving_mean"]
        order = (*order, "moving_stddev", "renorm_mean", "renorm_stddev")
    if isinstance(asked.decay, COUNTED):
        initial[COUNTER] = tf.zeros_initializer()
        order = (*order, COUNTER)
    made: list = []
    try:
        for number in range(asked.banks or 1):
            bank = {}
            for key in order:
                if absent.get(key):
                    bank[key] = None
                # Weights are of the network, and statistics of the data: banks share those.
                elif made and key in LEARNED and not asked.bank_affine:
                    bank[key] = made[0][key]
                else:
                    name = f"bank_{number}/{key}" if made else key
                    bank[key] = make(name, initial[key])
            made.append(bank)
    except ValueError as error:
        problem = _problem_of_sharing(str(error), named_by)
        if problem is None:
            raise
        layer = tf.get_variable_scope().name
        raise ValueError(f"layer {layer!r}: {problem}") from error
    first, *others = made
    if others:
        first["others"] = tuple(LayerVariables(**bank) for bank in others)
    return LayerVariables(**first)


def _problem_of_sharing(message, named_by):
    """What TensorFlow's message about shared variables means; None for another."""
    # It raises a ValueError for all of them, and for what an initializer raises, too: only
    # its words, the same from 1.15 to 2.21, tell which it is.
    what, *_ = re.split(r",|\.\s", message)
    if what.endswith(" already exists"):
        return (
            f"{what}; give this layer another `{named_by}`, or reuse=True to share the "
            "variables of the first"
        )
    if what.endswith(" does not exist"):
        return (
            f"{what}, so that there is nothing to share with `reuse`; build the layer "
            f"without `reuse` first, or correct its `{named_by}`"
        )
    if what.startswith("Trying to share variable "):
        difference = message.splitlines()[0].rstrip(".")
        return (
            f"{difference}; `reuse` needs the channels and the dtype of the first call: "
            f"give this layer another `{named_by}`"
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Sharing:
    """An initializer of zeros, or of ones, that makes the same constant again."""

    # Four variables of a layer start as two constants: two nodes less in each layer.
    kind: Any
    made: dict

    def __call__(self, shape, dtype=None, partition_info=None):
        sizes = tuple(tf.TensorShape(shape).as_list())
        key = self.kind, sizes, dtype, tf.get_default_graph()
        if key not in self.made:
            self.made[key] = self.kind()(shape, dtype, partition_info)
        return self.made[key]


def _square_root_of(initializer):
    def initial_stddev(*arguments, **options):
        return tf.sqrt(initializer(*arguments, **options))

    return initial_stddev


def own_variable(
    name: str,
    initializer: Any,
    *,
    shape: Sequence[int],
    dtype: tf.DType,
    trainable: Any = True,
    collections: Sequence[str] | None = None,
    **by_role: Mapping | None,
) -> Any:
    """Gets a variable of the layer from the variable scope; a `make` for `make_variables`.

    Gamma and beta are trainable unless `trainable` is False; the counter is a scalar. Each
    of `by_role` is an argument of `tf.get_variable`, by what the variable is called in a
    layer of one bank.
    """
    role = name.rpartition("/")[2]
    return tf.get_variable(
        name,
        [] if role == COUNTER else shape,
        dtype,
        initializer,
        trainable=role in LEARNED and trainable is not False,
        collections=collections,
        **({} if role in LEARNED else OF_STATISTICS),
        **{option: (values or {}).get(role) for option, values in by_role.items()},
    )
