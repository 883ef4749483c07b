"""The train op: gradients applied after the batch-norm updates, or an error.

Updates of moving statistics that nobody runs are the most frequent fault of batch
normalization in TensorFlow 1 graphs: training looks healthy, and evaluation uses a mean
of 0 and a variance of 1. `make_train_op` runs them, and refuses to build a train op
that would leave one out.
"""

from __future__ import annotations

import collections
from typing import Any, Callable, Iterable, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION
from bn_tf1.records import COLLECTED_KEY, batch_norm_calls


def make_train_op(
    loss: tf.Tensor,
    optimizer: tf.train.Optimizer,
    *,
    global_step: Any = None,
    variables: Sequence[Any] | None = None,
    clip_norm: float | None = None,
    update_ops: Sequence[Any] | None = None,
    ignored_layers: Sequence[str] = (),
    lint: Callable[..., None] | None = None,
    workers: Any = None,
    num_examples: Any = None,
    penalty: Any = None,
) -> tf.Operation:
    """Minimises `loss` after the updates of the moving statistics.

    Args:
        loss: scalar float tensor.
        optimizer: a `tf.train.Optimizer`.
        global_step: integer variable that each step increments; None for none.
        variables: the variables to train, all trainable ones by default.
        clip_norm: positive bound of the global norm of the gradients, in the unit of
            the gradients; None for no bound.
        update_ops: operations or tensors that run before the gradients are applied,
            those of several calls of a layer in the order of the calls;
            by default what is in `UPDATE_OPS_COLLECTION` of the graph of `loss`. Of a
            layer that is called several times, as in towers, those of one call do.
        ignored_layers: variable scopes of batch-norm layers whose updates this train
            op leaves to another one.
        lint: called when the train op is made, with the graph, `ignored_layers` and
            whether `update_ops` were given: to warn of what else the graph's layers of
            any maker suffer from. `bn_tf1.make_train_op` logs what the doctor finds.
        workers: a `bn_tf1.Workers`: the step is that of the mean over the examples of
            all of them, by one reduce of all gradients. `loss` is then the mean of
            this worker's examples.
        num_examples: with `workers`, how many this worker has; a scalar, 1 by default,
            for as many on each.
        penalty: with `workers`, what is added to the loss once and not for each
            example, such as the L2 penalty; scalar float tensor.

    Returns:
        The operation of one training step.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: the step would not run an update that `batch_norm` made in the
            graph of `loss`, and the layer is not in `ignored_layers`; or an argument
            is outside of what is said above.
    """
    _check_arguments(loss, optimizer, clip_norm)
    if workers is None and not (num_examples is None and penalty is None):
        raise ValueError(
            f"`num_examples` is {num_examples!r} and `penalty` {penalty!r}, but without "
            "`workers` they must be None: add the penalty to `loss`"
        )
    graph = loss.graph
    are_chosen = update_ops is not None
    if not are_chosen:
        update_ops = graph.get_collection(UPDATE_OPS_COLLECTION)
    update_ops = [getattr(op, "op", op) for op in update_ops]
    for op in update_ops:
        if op.graph is not graph:
            raise ValueError(
                f"`update_ops` has {op.name!r}, which is not in the graph of `loss`"
            )
    roots = [loss.op] + update_ops
    _check_all_updates_run(roots, graph, ignored_layers, are_chosen)

    with graph.as_default():
        update_ops = _in_order(update_ops, graph)
        if workers is None:
            pairs = _gradients(loss, optimizer, variables)
        else:
            pairs = _joint_gradients(
                loss, optimizer, variables, workers, num_examples, penalty
            )
        gradients = _clipped(pairs, clip_norm)
        with tf.control_dependencies(update_ops):
            train_op = optimizer.apply_gradients(gradients, global_step=global_step)
    if lint is not None:
        lint(graph, ignored_layers=ignored_layers, are_chosen=are_chosen)
    return train_op


def _check_arguments(loss, optimizer, clip_norm):
    if not hasattr(optimizer, "compute_gradients"):
        raise TypeError(
            f"`optimizer` is {optimizer!r}, but must be a tf.train.Optimizer, such as "
            "tf.compat.v1.train.AdamOptimizer(): one of Keras cannot train a graph"
        )
    is_scalar = isinstance(loss, tf.Tensor) and loss.shape.is_compatible_with([])
    if not is_scalar or not loss.dtype.is_floating:
        raise ValueError(f"`loss` is {loss!r}, but must be a scalar float tensor")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"`clip_norm` is {clip_norm!r}, but must be > 0")


def _check_all_updates_run(roots, graph, ignored_layers, are_chosen):
    calls = batch_norm_calls(graph)
    for layer in ignored_layers:
        if layer not in {call.name for call in calls}:
            raise ValueError(
                f"`ignored_layers` has {layer!r}, but the batch-norm layers of the "
                f"graph are {sorted({call.name for call in calls})}"
            )
    # An update in a loop body or function runs with that loop or function.
    awaited = {
        op: call.name
        for call in calls
        for op in call.updates
        if op.graph is graph and call.name not in ignored_layers
    }
    run = ancestors(roots)
    forgotten = set(awaited) - run
    if are_chosen:
        served = {c.name for c in calls if c.updates and run.issuperset(c.updates)}
        forgotten = {op for op in forgotten if awaited[op] not in served}
    if forgotten:
        layers = collections.Counter(awaited[op] for op in forgotten)
        raise ValueError(
            "the train op would never update the moving statistics of {}: neither "
            "`update_ops` nor `loss` depends on {}. Pass their collection as "
            "update_ops=tf.get_collection(...), or, if another train op runs them, "
            "name the layers in `ignored_layers`".format(
                ", ".join(repr(layer) for layer in sorted(layers)),
                ", ".join(sorted(repr(op.name) for op in forgotten)),
            )
        )


def _in_order(update_ops, graph):
    """`update_ops`; those of several calls of a layer one after the other.

    All at once, they would read the same old value, and N of them move it N times as far.
    They are made again: an operation cannot be told later what to wait for, and from the
    start, the update of one call must not wait for the input of another.
    """
    for calls in (graph.get_collection(COLLECTED_KEY) or [{}])[0].values():
        chosen = [
            call
            for call in calls
            if call.again is not None and set(call.operations) <= set(update_ops)
        ]
        if len(chosen) < 2:
            continue
        replaced = {operation for call in chosen for operation in call.operations}
        update_ops = [op for op in update_ops if op not in replaced]
        before = []
        for call in chosen:
            with tf.control_dependencies(before):
                before = list(call.again())
        update_ops += before
    return update_ops


def ancestors(operations: Iterable[tf.Operation]) -> set:
    """The operations and all that run before them."""
    found = set(operations)
    pending = list(found)
    while pending:
        op = pending.pop()
        for earlier in [tensor.op for tensor in op.inputs] + op.control_inputs:
            if earlier not in found:
                found.add(earlier)
                pending.append(earlier)
    return found


def _gradients(loss, optimizer, variables):
    pairs = optimizer.compute_gradients(loss, var_list=variables)
    pairs = [
        (gradient, variable) for gradient, variable in pairs if gradient is not None
    ]
    if not pairs:
        raise ValueError("`loss` depends on none of `variables`: no gradient to apply")
    return pairs


def _joint_gradients(loss, optimizer, variables, workers, num_examples, penalty):
    """Those of the mean loss over the examples of all workers, plus the penalty."""
    count = tf.cast(1 if num_examples is None else num_examples, loss.dtype)
    # Of sums: a batch norm with joint statistics has a part in every worker's loss.
    pairs = _gradients(loss * count, optimizer, variables)
    once = [None] * len(pairs)
    if penalty is not None:
        once = tf.gradients(penalty, [variable for _, variable in pairs])
    return workers.mean_gradients(pairs, once, count)


def _clipped(pairs, clip_norm):
    if clip_norm is None:
        return pairs
    gradients, trained = zip(*pairs)
    clipped, _ = tf.clip_by_global_norm(gradients, clip_norm)
    return list(zip(clipped, trained))
