"""One update of a layer by several batches: those of several calls, or of several steps.

    N = sum(count_i),  mean and variance of all values together (`statistics.joint_batches`)
    moving = moving - (1 - decay) * (moving - joint)

Contract: batches count by their numbers of values, or the sums of their weights, and are
combined in float64, whatever they were computed in. A batch that must not count, since
`is_training` or `trainable` is false at run time, or since it is not finite
(`skip_nonfinite`), counts 0; where all do, nothing changes. "unbiased" is N / (N - 1) of
all of them. What follows ghost batches stays the mean of their statistics, by count.

Source: that of `statistics.joint_batches`.
"""

from __future__ import annotations

from typing import Callable, Iterable, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.built_layers import COLLECTED_KEY, MERGED_KEY, CallUpdates
from bn_tf1.normalization import conditions_of, updates_again
from bn_tf1.statistics import Moments

# What the calls of one update must have in common, as it is one.
_COMMON = ("decay", "ema_variance", "skip_nonfinite", "renorm", "zero_debias")


class Joined(NamedTuple):
    """The calls of a layer that make one update.

    Attributes:
        calls: the calls: one, or, with `update="merged"`, all of them.
        is_merged: which of the two it is.
    """

    calls: Sequence[CallUpdates]
    is_merged: bool


def updates_of_layers(
    graph: tf.Graph,
    chosen: Iterable[tf.Operation],
    ignored_layers: Iterable[str],
) -> list[list[Joined]]:
    """For each layer the updates that a train op makes, in the order of the calls.

    Args:
        graph: that of the layers.
        chosen: operations; an update counts whose operations are all among them, or that
            is merged and has none.
        ignored_layers: layers whose merged update is left out.

    Raises:
        ValueError: calls that are to make one update differ in what they ask of it.
    """
    # Each update by all of its operations: one of two would move the mean alone.
    chosen, layers = set(chosen), []
    for calls in collected_calls(graph):
        updates = []
        merged = [
            call
            for call in calls
            if call.arguments.update == "merged" and call.layer not in ignored_layers
        ]
        if merged:
            _check_alike(merged)
            graph.add_to_collection(MERGED_KEY, merged[0].layer)
            updates.append(Joined(merged, is_merged=True))
        updates += [
            Joined([call], is_merged=False)
            for call in calls
            if call.operations and chosen.issuperset(call.operations)
        ]
        if updates:
            layers.append(updates)
    return layers


def collected_calls(graph: tf.Graph) -> list[list[CallUpdates]]:
    """For each layer its calls that have an update for a train op, oldest first."""
    return [
        [call for call in calls if not call.updating.in_place]
        for calls in (graph.get_collection(COLLECTED_KEY) or [{}])[0].values()
    ]


def in_order(
    updates: Sequence[Joined],
    make: Callable[[Joined], Sequence[tf.Operation]],
) -> list[tf.Operation]:
    """What `make` makes for each of them, one after the other; those of the last.

    All at once, they would read the same old value, and N of them move it N times as far.
    """
    before = []
    for joined in updates:
        with tf.control_dependencies(before):
            before = list(make(joined))
    return before


def merged_update(joined: Joined) -> Sequence[tf.Operation]:
    """The update by the batches of all its calls; of a single one, as that asked for it."""
    if not joined.is_merged:
        return updates_again(joined.calls[0])
    with tf.name_scope("merged_update"):
        moments = joint_of_batches(moments_of(joined), joined)
    return update_by(moments, joined)


def moments_of(joined: Joined) -> list[Moments]:
    """The moments of the batch of each call, float64, with counts of 0 as said above."""
    return [_moments(call) for call in joined.calls]


def joint_of_batches(parts: Sequence[Moments], joined: Joined) -> Moments:
    """The moments of all together; for ghost batches the means of those."""
    joint = statistics.joint_of(parts)
    if joined.calls[0].arguments.ghost_batch_size is None:
        return joint
    # No spread between the batches enters: what a mean of means is, of the variances.
    variances = [part._replace(mean=part.variance) for part in parts]
    return joint._replace(variance=statistics.joint_of(variances).mean)


def update_by(moments: Moments, joined: Joined) -> Sequence[tf.Operation]:
    """The operations of one update, which does nothing where `moments` count 0."""
    call = joined.calls[0]
    if _is_unbiased(call.arguments):
        moments = moments._replace(variance=statistics.unbiased_variance(moments))
    dtype = call.arguments.plan.dtype
    moments = Moments(*(tf.cast(tensor, dtype) for tensor in moments))
    return updates_again(call, moments)


def _check_alike(calls):
    first = calls[0].arguments
    ghosts = first.ghost_batch_size is None
    for call in calls[1:]:
        other = call.arguments
        for name in _COMMON:
            # Tensors are equal in a graph where they are the same one.
            own, others = repr(getattr(first, name)), repr(getattr(other, name))
            if own != others:
                raise ValueError(
                    f'`update` is "merged" for the calls of the layer {call.layer!r}, '
                    f"but `{name}` is {own} in one of them and {others} in another: they "
                    "make one update, so give all of them the same"
                )
        if (other.ghost_batch_size is None) != ghosts:
            raise ValueError(
                f'`update` is "merged" for the calls of the layer {call.layer!r}, but '
                "some have `ghost_batch_size` and some have not: the mean of ghost "
                "batches' variances and the variance of a batch do not mix"
            )


def _moments(call):
    arguments = call.arguments
    _, mean, variance, count = call.batch
    # The layers that cannot lack values have not made their count.
    if count is None:
        count = statistics.count_of(call.x, arguments.plan.axes)
    conditions = conditions_of(call)
    # Of 30 batches, each rounding of a joint float32 mean would be left in it.
    mean, variance, count = (
        tf.cast(value, tf.float64) for value in (mean, variance, count)
    )
    # Joined are the biased ones, by N; what is joined is made unbiased as a whole.
    if _is_unbiased(arguments):
        below = statistics.degrees_of_freedom(count)
        variance *= tf.math.divide_no_nan(below, count)
    for condition in conditions:
        count = tf.where_v2(condition, count, tf.zeros_like(count))
    # NaN times a share of 0 would be NaN.
    mean, variance = (
        tf.where_v2(count > 0, statistic, tf.zeros_like(statistic))
        for statistic in (mean, variance)
    )
    return Moments(mean, variance, count)


def _is_unbiased(arguments):
    """Whether the variance of the batch has N - 1 in it; in ghost batches it stays."""
    is_whole = arguments.ghost_batch_size is None
    return arguments.ema_variance == "unbiased" and is_whole
