"""The train op: gradients applied after the batch-norm updates, or an error.

Updates of moving statistics that nobody runs are the most frequent fault of batch
normalization in TensorFlow 1 graphs: training looks healthy, and evaluation uses a mean
of 0 and a variance of 1. `make_train_op` runs them, and refuses to build a train op
that would leave one out.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.arguments import is_int, unfit
from bn_tf1.built_layers import batch_norm_calls
from bn_tf1.control_flow import ancestors
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION
from bn_tf1.train_step import accumulation, joint_updates

# Tuples, as in `built_layers`. The names of layers of which a train op accumulates the
# batches:
_ACCUMULATED = ("bn_tf1_accumulated_layers",)
# One dict: the updates in order, by the moving mean and the operations that they stand for.
_MERGED_UPDATES = ("bn_tf1_merged_updates",)


def make_train_op(
    loss: tf.Tensor,
    optimizer: tf.train.Optimizer,
    *,
    global_step: Any = None,
    variables: Sequence[Any] | None = None,
    clip_norm: float | None = None,
    accumulate_steps: int = 1,
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
        accumulate_steps: k: the gradients of k steps are averaged, then clipped, before
            one update of the weights, the optimizer's slots and `global_step`; the
            moving statistics get one update by the k batches together. For the first
            layer that is what one batch with their examples gives; later layers see
            each batch normalised by itself. Steps count alike, so give all batches one
            size. A step with `is_training` false counts with its gradients, and not in
            the statistics. All that is kept meanwhile is in global variables: saved,
            it goes on in the middle. (`bn_tf1.train_step.accumulation`)
        update_ops: operations or tensors that run before the gradients are applied,
            those of several calls of a layer in the order of the calls;
            by default what is in `UPDATE_OPS_COLLECTION` of the graph of `loss`. Of a
            layer that is called several times, as in towers, those of one call do.
            The updates of layers with `update="merged"` are made here, whatever it is.
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
            graph of `loss`, or, with `accumulate_steps`, would run one in each step, and
            the layer is not in `ignored_layers`; calls to merge differ in what an update
            needs; there is no variable to train, or `loss` depends on none; or an
            argument is outside of what is said above.
    """
    _check_arguments(loss, optimizer, clip_norm)
    if workers is None and not (num_examples is None and penalty is None):
        raise ValueError(
            f"`num_examples` is {num_examples!r} and `penalty` {penalty!r}, but without "
            "`workers` they must be None: add the penalty to `loss`"
        )
    _check_can_accumulate(optimizer, accumulate_steps)
    graph, are_chosen = loss.graph, update_ops is not None
    update_ops = _operations(update_ops, graph)
    _check_all_updates_run([loss.op, *update_ops], graph, ignored_layers, are_chosen)
    update_ops = _without_ignored(update_ops, graph, ignored_layers)
    with graph.as_default():
        parts = loss, optimizer, variables
        if workers is None:
            pairs = _gradients(*parts)
        else:
            pairs = _joint_gradients(*parts, workers, num_examples, penalty)
        apply = functools.partial(_apply, optimizer, clip_norm, global_step)
        layers = joint_updates.updates_of_layers(graph, update_ops, ignored_layers)
        if accumulate_steps == 1:
            # After the updates: who fetches the train op has run them, and what fails in
            # one leaves the weights as they were.
            with tf.control_dependencies(_in_order(update_ops, layers, graph)):
                train_op = apply(pairs)
        else:
            others = _others(update_ops, layers)
            _check_accumulated(loss, others, ignored_layers)
            _check_accumulated_once(layers, graph)
            train_op = accumulation.apply_every(
                accumulate_steps, pairs, layers, others, apply
            )
    if lint is not None:
        lint(graph, ignored_layers=ignored_layers, are_chosen=are_chosen)
    return train_op


def _check_arguments(loss, optimizer, clip_norm):
    if not hasattr(optimizer, "compute_gradients"):
        must = "be a tf.train.Optimizer, such as tf.compat.v1.train.AdamOptimizer(): "
        must += "one of Keras cannot train a graph"
        raise unfit("optimizer", optimizer, must, TypeError)
    is_scalar = isinstance(loss, tf.Tensor) and loss.shape.is_compatible_with([])
    if not is_scalar or not loss.dtype.is_floating:
        raise unfit("loss", loss, "be a scalar float tensor")
    if clip_norm is not None and not clip_norm > 0:  # NaN is not, either
        raise unfit("clip_norm", clip_norm, "be > 0")


def _check_can_accumulate(optimizer, accumulate_steps):
    if not is_int(accumulate_steps):
        must = "be an int > 0: the number of steps for one update of the weights"
        raise unfit("accumulate_steps", accumulate_steps, must)
    if accumulate_steps == 1:
        return
    if isinstance(optimizer, tf.train.SyncReplicasOptimizer):
        obstacle = "a SyncReplicasOptimizer, which accumulates gradients by itself"
    elif tf.distribute.has_strategy():
        obstacle = (
            "a strategy of tf.distribute, which applies no gradients in a condition; use "
            "`workers`, or a list of tensors in batch_norm"
        )
    else:
        return
    raise unfit("accumulate_steps", accumulate_steps, f"be 1 with {obstacle}")


def _operations(update_ops, graph):
    """What was given, or is in the collection, as operations of `graph`."""
    if update_ops is None:
        update_ops = graph.get_collection(UPDATE_OPS_COLLECTION)
    update_ops = [getattr(op, "op", op) for op in update_ops]
    for op in update_ops:
        if op.graph is not graph:
            raise ValueError(
                f"`update_ops` has {op.name!r}, which is not in the graph of `loss`"
            )
    return update_ops


def _without_ignored(update_ops, graph, ignored_layers):
    """`update_ops` without those that are left to another train op."""
    ignored = {
        operation
        for call in batch_norm_calls(graph)
        if call.name in ignored_layers
        for operation in call.updates
    }
    return [operation for operation in update_ops if operation not in ignored]


def _check_all_updates_run(roots, graph, ignored_layers, are_chosen):
    calls = batch_norm_calls(graph)
    known = sorted({call.name for call in calls})
    for layer in ignored_layers:
        if layer not in known:
            raise ValueError(
                f"`ignored_layers` has {layer!r}, but the batch-norm layers of the "
                f"graph are {known}"
            )
    # An update in a loop body or function runs with that loop or function.
    awaited = {
        op: call.bank_name
        for call in calls
        for op in call.updates
        if op.graph is graph and call.name not in ignored_layers
    }
    # What runs with the loss, in place or through a user's own dependencies, is not lost.
    run = ancestors(roots)
    forgotten = set(awaited) - run
    if are_chosen:
        # Towers share a layer, and one of them is enough to keep its statistics.
        served = {c.bank_name for c in calls if c.updates and run.issuperset(c.updates)}
        forgotten = {op for op in forgotten if awaited[op] not in served}
    if forgotten:
        raise ValueError(
            "the train op would never update the moving statistics of "
            f"{_names(awaited[op] for op in forgotten)}: neither `update_ops` nor `loss` "
            f"depends on {_names(op.name for op in forgotten)}. Pass their collection as "
            "update_ops=tf.get_collection(...), or, if another train op runs them, "
            "name the layers in `ignored_layers`"
        )


def _names(names):
    return ", ".join(map(repr, sorted(set(names))))


def _in_order(update_ops, layers, graph):
    """`update_ops`, with one after the other, or one for all, for several calls of a layer.

    They are made again: an operation cannot be told later what to wait for, and from the
    start, the update of one call must not wait for the input of another.
    """
    several = [layer for layer in layers if len(layer) > 1 or layer[0].is_merged]
    update_ops = _others(update_ops, several)
    made = graph.get_collection_ref(_MERGED_UPDATES)
    if not made:
        made.append({})
    for layer in several:
        # One for all train ops of a graph, as what is in the collection is.
        name = layer[0].calls[0].bank.variables.moving_mean.name
        key = name, tuple(call.operations for joined in layer for call in joined.calls)
        if key not in made[0]:
            made[0][key] = joint_updates.in_order(layer, joint_updates.merged_update)
        update_ops += made[0][key]
    return update_ops


def _others(update_ops, layers):
    """`update_ops` without those of the updates of `layers`."""
    replaced = {
        operation
        for layer in layers
        for joined in layer
        for call in joined.calls
        for operation in call.operations
    }
    return [op for op in update_ops if op not in replaced]


def _check_accumulated_once(layers, graph):
    names = {layer[0].calls[0].layer for layer in layers}
    twice = names.intersection(graph.get_collection(_ACCUMULATED))
    if twice:
        raise ValueError(
            "another train op of the graph accumulates the batches of "
            f"{_names(twice)}, and both would update the moving "
            "statistics: name the layers in `ignored_layers` of one of the two"
        )
    graph.get_collection_ref(_ACCUMULATED).extend(names)


def _check_accumulated(loss, others, ignored_layers):
    """Raises for a layer of ours that each step would update; warns of other makers'."""
    by_layer = joint_updates.collected_calls(loss.graph)
    collected = {op for calls in by_layer for call in calls for op in call.operations}
    run = ancestors([loss.op, *others])
    in_each_step = {
        call.name
        for call in batch_norm_calls(loss.graph)
        # What is not collected runs with the output, or with the loop that it is in.
        if not collected.issuperset(call.updates) or not run.isdisjoint(call.updates)
    } - set(ignored_layers)
    if in_each_step:
        raise ValueError(
            "with `accumulate_steps` the moving statistics get one update by all batches, "
            f"but those of {_names(in_each_step)} would get one in "
            'each step, as with update="in_place" or inside of a loop; use '
            'update="collection" and both operations of an update, or name the layers in '
            "`ignored_layers` to have it so"
        )
    # No error: they may be something else than statistics, and nobody's but the user's.
    if others:
        tf.logging.warning(
            "`accumulate_steps`: each step runs %d update operations that are of no "
            "layer of bn_tf1, %s the first: moving statistics of other makers get an "
            "update in each step, and not one by all batches",
            len(others),
            others[0].name,
        )


def _gradients(loss, optimizer, variables):
    try:
        pairs = optimizer.compute_gradients(loss, var_list=variables)
    except ValueError as error:
        # It says so, and not what to do. An optimizer may choose them by itself.
        if "No variables to optimize" not in str(error):
            raise
        if variables is not None:
            must = "name one or more, or be None for all that are trainable"
            raise unfit("variables", variables, must) from error
        raise ValueError(
            "there are no variables to train: no variable of the graph of `loss` is "
            "trainable. Make some with trainable=True (a layer of ours with "
            "`trainable=True`), or name those to train in `variables`"
        ) from error
    # Of a variable that the loss does not depend on; accumulation has no sum for these.
    pairs = [pair for pair in pairs if pair[0] is not None]
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
        # By itself, outside of the mean over examples, which it does not depend on.
        once = tf.gradients(penalty, [variable for _, variable in pairs])
    return workers.mean_gradients(pairs, once, count)


def _apply(optimizer, clip_norm, global_step, pairs):
    # After the mean over steps and workers: the bound is one of what is applied.
    if clip_norm is not None:
        gradients, trained = zip(*pairs)
        clipped, _ = tf.clip_by_global_norm(gradients, clip_norm)
        pairs = list(zip(clipped, trained))
    return optimizer.apply_gradients(pairs, global_step=global_step)
