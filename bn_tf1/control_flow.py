"""Where in the control flow of a graph something is being built."""

from __future__ import annotations

import tensorflow.compat.v1 as tf


def inside_of_control_flow() -> bool:
    """Whether operations made now belong to a `tf.cond`, `tf.while_loop` or function.

    There, an operation never takes an outer tensor directly: TensorFlow puts a Switch,
    an Enter or a captured placeholder in between. No public function tells, but this
    does.
    """
    with tf.init_scope():
        outermost = tf.get_default_graph()
    # Most layers are built where one operation tells: in a body, even one that waits
    # for nothing of its own waits for the body to run.
    if tf.get_default_graph() is outermost and not tf.no_op().control_inputs:
        return
    with tf.init_scope():
        outer = tf.constant(0)
    return tf.identity(outer).op.inputs[0].op is not outer.op


def check_outside_of_control_flow(layer):
    """Raises where a train op outside could not run an update made here."""
    if inside_of_control_flow():
        raise ValueError(
            f'`update` is "collection", but the layer {layer!r} is built inside of a '
            "tf.cond, tf.while_loop or function body: its update operations would "
            "belong to that body, where a train op outside cannot run them (it would "
            "silently do nothing when the branch is not taken). Use "
            'update="in_place", or call batch_norm outside of the body'
        )
