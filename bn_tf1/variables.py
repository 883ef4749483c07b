"""Which variables a layer has, how they are called and where they start.

Contract: `gamma`, `beta`, `moving_mean` and `moving_variance`, and with
renormalisation `moving_stddev`, `renorm_mean` and `renorm_stddev`: the names and the
order of `tf.layers`. How one is made (shape, collections, regularizer) is for the
layer to say.

`renorm_mean` and `renorm_stddev` are the moving statistics that training corrects with;
`moving_stddev`, the moving mean of sqrt(variance + epsilon), is what `moving_variance`
follows from.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.normalization import LayerVariables

INITIALIZERS = {
    "gamma": tf.ones_initializer,
    "beta": tf.zeros_initializer,
    "moving_mean": tf.zeros_initializer,
    "moving_variance": tf.ones_initializer,
}
LEARNED = ("gamma", "beta")


def make_variables(
    make: Callable[[str, Any], Any],
    *,
    center: bool,
    scale: bool,
    renorm: bool,
    initializers: Mapping[str, Any],
    order: Sequence[str] = tuple(INITIALIZERS),
) -> LayerVariables:
    """The variables of a layer.

    Args:
        make: make(name, initializer) creates or gets a variable.
        center, scale: whether there is a `beta` and a `gamma`.
        renorm: whether there are those of renormalisation.
        initializers: initializer by name; `INITIALIZERS` has the others.
        order: the names of `INITIALIZERS` in the order in which they are made.
    """
    made_once = {}
    initial = {
        key: _sharing(made_once, initializers.get(key) or default())
        for key, default in INITIALIZERS.items()
    }
    absent = {"gamma": not scale, "beta": not center}
    made = {key: None if absent.get(key) else make(key, initial[key]) for key in order}
    if renorm:
        stddev = _square_root_of(initial["moving_variance"])
        made["moving_stddev"] = make("moving_stddev", stddev)
        made["renorm_mean"] = make("renorm_mean", initial["moving_mean"])
        made["renorm_stddev"] = make("renorm_stddev", stddev)
    return LayerVariables(**made)


def _sharing(made_once, initializer):
    """`initializer`; all those of zeros, and all those of ones, make one constant."""
    kind = type(initializer)
    if kind not in (tf.zeros_initializer, tf.ones_initializer):
        return initializer

    def initial_value(shape, dtype=None, partition_info=None):
        sizes = tuple(tf.TensorShape(shape).as_list())
        key = kind, sizes, dtype, tf.get_default_graph()
        if key not in made_once:
            made_once[key] = initializer(shape, dtype, partition_info)
        return made_once[key]

    return initial_value


def _square_root_of(initializer):
    def initial_stddev(*arguments, **options):
        return tf.sqrt(initializer(*arguments, **options))

    return initial_stddev
