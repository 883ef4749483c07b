"""What `batch_norm` built in a graph: one record for each call.

Collections of operations tell which updates exist, but not to which layer they belong
nor which batch statistics fed them. The records do; the train op checks them, and
summaries and diagnoses read them. They live as long as their graph and are not
serialised with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow.compat.v1 as tf

# A tuple, as TensorFlow's own per-graph Python state uses: `export_meta_graph` writes
# only collections whose key is a string, and warns of what it cannot write.
CALLS_KEY = ("bn_tf1_batch_norm_calls",)
# One dict: by the name of a moving mean, the `CallUpdates` of each call.
COLLECTED_KEY = ("bn_tf1_collected_updates",)
# The layers whose merged update a train op has made: a later call would be left out.
MERGED_KEY = ("bn_tf1_merged_layers",)


class Bank(NamedTuple):
    """A bank of a layer that a call may update; `is_chosen` as in a `BatchNormCall`."""

    number: int
    variables: Any
    is_chosen: Any = None


class CallUpdates(NamedTuple):
    """The update by one call, which a train op must run or make, or which runs with the output.

    Attributes:
        layer: the layer's variable scope.
        bank: the `Bank` that is updated.
        x: the tensor, or the list of them, that was normalised.
        batch: its `statistics.BatchOutput`.
        arguments: those of the call.
        updating: its `moving_averages.Updating`; in place, it runs with the output.
        scope: the `tf.VariableScope` that it was made in.
        operations: the operations; none where the update is merged with that of others.
    """

    layer: str
    bank: Bank
    x: Any
    batch: Any
    arguments: Any
    updating: Any
    scope: Any
    operations: tuple[tf.Operation, ...] = ()


class BatchNormCall(NamedTuple):
    """One call of `batch_norm`; of one that chooses a bank at run time, one of its banks.

    Attributes:
        name: the layer's variable scope.
        gamma, beta: variables of shape [channels], or None where the layer has none.
        moving_mean, moving_variance: variables of shape [channels].
        batch_mean, batch_variance: tensors of shape [channels] as they enter the
            moving average; None for a layer built with `is_training=False`. With a
            tensor `is_training` they are the moving statistics when it is false.
        updates: the operations that update the moving statistics; may be empty.
        x: the tensor that the layer normalises.
        arguments: what it was asked for, checked: `arguments.Arguments`.
        bank: which of the layer's banks the variables are; 0 where there is one.
        is_chosen: a scalar bool tensor, whether a run takes this bank; None where it is
            always this one.
    """

    name: str
    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any
    batch_mean: Any
    batch_variance: Any
    updates: tuple[tf.Operation, ...]
    x: Any = None
    arguments: Any = None
    bank: int = 0
    is_chosen: Any = None

    @property
    def bank_name(self) -> str:
        """The scope of the moving statistics: the layer's, or below it that of a bank."""
        return f"{self.name}/bank_{self.bank}" if self.bank else self.name


def batch_norm_calls(graph: tf.Graph | None = None) -> tuple[BatchNormCall, ...]:
    """The calls of `batch_norm` in `graph` (the default graph), oldest first."""
    graph = tf.get_default_graph() if graph is None else graph
    return tuple(graph.get_collection(CALLS_KEY))
