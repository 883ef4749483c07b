"""What the drop-ins for `tf.layers` and for slim have in common.

Contract: how the originals take a mode, name their output, keep parts of a partitioned
variable apart and fill their collections, as TensorFlow 1.15 documents or shows it.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import check_keys, unfit
from bn_tf1.statistics import Renormalization

_CLIPPING = ("rmax", "rmin", "dmax")


def parts(variable):
    """The variable, or the parts of a partitioned one."""
    if tf.is_tensor(variable):
        return [variable]
    return list(variable)


def as_list(values):
    return list(values) if isinstance(values, (list, tuple)) else [values]


def add_to_collection(key, elements):
    collection = tf.get_collection_ref(key)
    # By identity: with TensorFlow 2's behaviour, `==` of tensors is one more operation.
    present = {id(element) for element in collection}
    collection += [element for element in elements if id(element) not in present]


def checked_mode(argument: str, value: Any) -> bool | tf.Tensor:
    """A mode as the originals take it: True, False or a scalar bool tensor.

    Args:
        argument: the name of the argument, for errors.
        value: a bool, 0, 1, None for False, or a bool tensor or variable; a tensor of
            known value counts as that value.
    """
    if value is None:
        return False
    if isinstance(value, (bool, np.bool_, numbers.Number)) and value in (0, 1):
        return bool(value)
    if (
        tf.is_tensor(value)
        and value.dtype.base_dtype == tf.bool
        and value.shape.is_compatible_with([])
    ):
        # As the original: one way is built, and not a cond whose other way nobody takes.
        if isinstance(value, tf.Tensor) and value.op.type == "Const":
            return bool(tf.make_ndarray(value.op.get_attr("value")))
        return tf.convert_to_tensor(value)
    must = "be a bool, 0, 1 or a scalar bool tensor"
    raise unfit(argument, value, must, TypeError)


def switched_or_not(trainable: Any) -> bool | tf.Tensor:
    """`trainable` as the originals take it: all but False and a bool tensor is True."""
    return trainable if tf.is_tensor(trainable) else trainable is not False


def with_original_name(
    y: tf.Tensor, mode: Any, *, fused: bool, kernel: str
) -> tf.Tensor:
    """`y` under the name that the original's output has in the layer's name scope.

    Frozen graphs and other code fetch outputs by name. Where the original's is that of
    a `tf.cond`, `y` is left as it is.
    """
    if not fused:
        if kernel == "recipe":
            return y  # of TensorFlow's own function, which names it so
        with tf.name_scope("batchnorm"):
            return tf.identity(y, name="add_1")
    if not isinstance(mode, bool):
        return y
    # What is foldable was made in the layer's scope, where it got the original's name.
    made = y.op.inputs[0].op if y.op.type == "Identity" else y.op
    if made.name.rpartition("/")[0] == tf.get_default_graph().get_name_scope():
        return y
    return tf.identity(y, name="FusedBatchNormV3")


class unpartitioned:
    """Within it, a variable scope has no partitioner: an update takes no parts."""

    def __init__(self, scope: tf.VariableScope):
        self._scope = scope
        self._partitioner = scope.partitioner if scope else None

    def __enter__(self):
        if self._scope:
            self._scope.set_partitioner(None)

    def __exit__(self, *exception):
        if self._scope:
            self._scope.set_partitioner(self._partitioner)


def renormalization(renorm, clipping, decay):
    """The `Renormalization` that the originals' three arguments mean; None for none."""
    if not renorm:
        return None
    check_keys("renorm_clipping", clipping or {}, _CLIPPING)
    return Renormalization(decay=decay, **(clipping or {}))
