"""Constants that the layers of a graph share, so that a deep network has few of them.

Contract: a constant of a certain value is made once for each graph and device, under
"bn_tf1_constants". What cannot take one from there gets one of its own: in a `tf.cond`,
`tf.while_loop` or function, TensorFlow would not know the value of a tensor that enters,
nor the shapes that follow from it; and a layer that is colocated with something keeps its
constants with it.
"""

from __future__ import annotations

from typing import Any, Callable

import tensorflow.compat.v1 as tf

from bn_tf1.control_flow import inside_of_control_flow
from bn_tf1.graph_state import graph_state

# constant(value, dtype) is a tensor; `tf.constant` makes one each time.
Constant = Callable[[Any, tf.DType], tf.Tensor]


def shared_constants(made_here: tf.Operation) -> Constant:
    """How to get the constants of a layer.

    Args:
        made_here: an operation that was just made for the layer. One that has inputs
            does not tell where it is, so that nothing is shared.
    """
    own_group = [b"loc:@" + made_here.name.encode()]
    if (
        made_here.inputs
        or made_here.colocation_groups() != own_group
        or inside_of_control_flow(made_here)
    ):
        return tf.constant

    def constant(value, dtype):
        key = made_here.device, repr(value), dtype
        made = graph_state("constants", dict)
        if key not in made:
            # What the first layer waits for must not hold up the others.
            with tf.name_scope("bn_tf1_constants/"), tf.control_dependencies(None):
                made[key] = tf.constant(value, dtype)
        return made[key]

    return constant
