"""Where in the control flow of a graph something is built, and a cheaper `tf.cond`."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Sequence

import tensorflow.compat.v1 as tf


def inside_of_control_flow(made_here: tf.Operation | None = None) -> bool:
    """Whether operations made now belong to a `tf.cond`, `tf.while_loop` or function.

    There, an operation never takes an outer tensor directly: TensorFlow puts a Switch, an
    Enter or a captured placeholder in between. No public function tells, but this does. An
    operation that was `made_here` just before, without inputs, spares it to make its own.
    """
    # `init_scope` leaves all bodies: what is made in it belongs to none.
    with tf.init_scope():
        outermost = tf.get_default_graph()
    # Most layers are built where one operation tells: in a body, even one that waits
    # for nothing of its own waits for the body to run.
    if made_here is None or made_here.inputs:
        made_here = tf.no_op()
    if tf.get_default_graph() is outermost and not made_here.control_inputs:
        return False
    # In a body of control flow v1, which is in the same graph, what is taken from outside
    # is taken by way of a Switch or an Enter; in one of v2 by way of an argument.
    with tf.init_scope():
        outer = tf.constant(0)
    return tf.identity(outer).op.inputs[0].op is not outer.op


def may_switch() -> bool:
    """Whether `switch` can take the place of `tf.cond` here.

    In a loop, a branch or a function, TensorFlow looks for control flow of its own
    making, as XLA does; with control flow v2, one `If` has one gradient already.
    """
    # TensorFlow 1.14 cannot be asked: both ways are right, this one is faster there.
    if getattr(tf, "control_flow_v2_enabled", lambda: False)():
        return False
    here = tf.no_op()
    is_compiled = "_xla_compile_id" in here.node_def.attr
    return not (is_compiled or inside_of_control_flow(made_here=here))


def switch(
    predicate: tf.Tensor,
    true_function: Callable,
    false_function: Callable,
    inputs: Sequence[Any],
) -> list[tf.Tensor]:
    """As `tf.cond`, for functions of tensors that both need a gradient for.

    Each tensor enters once, and goes one way or the other. `tf.cond` lets it enter once
    for each branch: its gradient is then the sum of that of the branch that was taken,
    and of a tensor of zeros of the same size, which costs a fifth of a whole layer.

    Args:
        predicate: scalar bool tensor.
        true_function, false_function: called with as many arguments as there are `inputs`;
            each returns as many tensors as the other, which must depend on them.
        inputs: tensors, or None for what is not there.
    """
    ways = [
        (None, None)
        if tensor is None
        else tf.raw_ops.Switch(data=tensor, pred=predicate)
        for tensor in inputs
    ]
    # With v1 control flow what takes a Switch's idle output is not run. Its gradient joins
    # the two ways of each tensor by a Merge, in the place of a sum with zeros.
    from_false = false_function(*(way[0] for way in ways))
    from_true = true_function(*(way[1] for way in ways))
    return [
        tf.raw_ops.Merge(inputs=[false, true]).output
        for false, true in zip(from_false, from_true)
    ]


def ancestors(
    operations: Iterable[tf.Operation], fed: Iterable[tf.Tensor] = ()
) -> set[tf.Operation]:
    """The operations, and all that run before them when the tensors `fed` are fed."""
    fed, found = {tensor.name for tensor in fed}, set(operations)
    pending = list(found)
    while pending:
        op = pending.pop()
        # Names are made anew each time that one asks: not where nothing is fed.
        inputs = {t.op for t in op.inputs if not fed or t.name not in fed}
        earlier = inputs.union(op.control_inputs) - found
        found |= earlier
        pending += earlier
    return found


def each(function, x, *others):
    """`function` of `x`, or of each tensor of a list, on that tensor's device.

    With `others`, lists as long, it is given what they have in the same place, too.
    """
    if not isinstance(x, list):
        return function(x, *others)
    results = []
    for tower, *rest in zip(x, *others):
        with tf.device(tower.device):
            results.append(function(tower, *rest))
    return results
