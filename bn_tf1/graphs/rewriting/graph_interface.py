"""The inputs, labels and outputs of a graph, as far as the graph itself tells them.

input    a placeholder or a value of the input pipeline that meets trained weights
label    one that does not: only the loss and the metrics see it
output   what depends on inputs and not on labels, and whose users all depend on
         labels, or has none; what only updates, summaries and gradients take is none
"""

from __future__ import annotations

from typing import Any, Iterable, NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.graphs.node_values import (
    ASSIGNMENTS,
    VARIABLES,
    origins,
    static_shape,
    variables_of,
)
from bn_tf1.graphs.rewriting.inference_mode import PLACEHOLDERS
from bn_tf1.graphs.training_nodes import find_training, is_gradient
from bn_tf1.graphs.view import (
    GraphView,
    ancestors,
    node_of,
    port_of,
    reached,
    reference_to,
)

PIPELINES = frozenset(
    ["IteratorGetNext", "IteratorGetNextSync", "QueueDequeue", "QueueDequeueV2"]
    + ["QueueDequeueMany", "QueueDequeueManyV2", "QueueDequeueUpTo"]
    + ["QueueDequeueUpToV2", "Unstage", "ReaderRead", "ReaderReadV2"]
)
_WITH_WEIGHTS = frozenset(
    ["Conv2D", "DepthwiseConv2dNative", "Conv3D", "MatMul", "BatchMatMul", "Einsum"]
    + ["BatchMatMulV2", "BatchMatMulV3", "Conv2DBackpropInput", "GatherV2", "Gather"]
    + ["Conv3DBackpropInputV2", "Conv1D", "ResourceGather", "GatherNd", "BiasAdd"]
    + ["FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"]
)
# Who takes something only to look at it, or to store it.
_ONLOOKERS = frozenset(
    ["NoOp", "Assert", "Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"]
    + ["Print", "PrintV2", "SaveV2", "WriteFile", "StackPushV2", "IsFinite"]
    + ["QueueEnqueueV2", "QueueEnqueueManyV2", "BroadcastGradientArgs", "Range"]
    + ["BatchDatasetV2", "MakeIterator"]
)
# Parts of loops and branches, which no program calls its output.
_NO_OUTPUTS = frozenset(["LoopCond", "Enter", "NextIteration", "Const", "Switch"])
# The attributes that tell the dtype of an output, the first that a node has counting.
_NUMBERS = ("T", "dtype", "DstT", "out_type", "Tparams", "output_type")


class Candidate(NamedTuple):
    """A tensor that can be an input, a label or an output.

    Attributes:
        tensor: its name, with ":0".
        dtype: its dtype, or None where the graph does not say it.
        shape: its shape, None for an unknown size or rank.
    """

    tensor: str
    dtype: tf.DType | None
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        sizes = "unknown shape"
        if self.shape is not None:
            sizes = str(["?" if size is None else size for size in self.shape])
            sizes = sizes.replace("'", "")
        kind = self.dtype.name if self.dtype is not None else "unknown dtype"
        return f"{self.tensor.replace(':0', '')} {kind} {sizes}"


class Interface(NamedTuple):
    """What goes into a graph and what comes out of it."""

    inputs: tuple[Candidate, ...]
    labels: tuple[Candidate, ...]
    outputs: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = []
        for field in self._fields:
            found = getattr(self, field)
            lines.append(f"{field}:" + ("" if found else " none"))
            lines += [f"  {candidate}" for candidate in found]
        return "\n".join(lines)


def find_interface(view: GraphView, mode: Iterable[str] = ()) -> Interface:
    """The inputs, labels and outputs of a graph whose mode is set.

    Args:
        view: the graph, without functions.
        mode: names of nodes that are none of them.
    """
    forward = _Forward(view)
    sources = _sources(view, frozenset(mode))
    inputs = [s for s in sources if forward.meets_weights(s)]
    # A graph without weights is arithmetic: whatever comes from outside is its input.
    if not inputs and not forward.weights:
        inputs = sources
    others = [s for s in sources if s not in inputs]
    labels = [s for s in others if forward.meet(s, inputs)]
    outputs = [reference_to(node) for node in forward.ends(inputs, others)]
    found = (inputs, labels, outputs)
    return Interface(*(tuple(candidate_of(view, r) for r in group) for group in found))


def candidate_of(view: GraphView, reference: int) -> Candidate:
    """The tensor that a reference means."""
    node, port = node_of(reference), port_of(reference)
    return Candidate(
        f"{view.names[node]}:{port}",
        output_dtype(view, node, port),
        static_shape(view, reference),
    )


def output_dtype(view: GraphView, node: int, port: int) -> tf.DType | None:
    """The dtype of an output as the attributes of its node tell it, or None."""
    for key in ("output_types", "component_types", "dtypes"):
        types = view.attribute(node, key)
        if types is not None and port < len(types.list.type):
            return tf.as_dtype(types.list.type[port])
    for key in _NUMBERS:
        value = view.attribute(node, key)
        if value is not None and value.type:
            return tf.as_dtype(value.type)
    if view.ops[node] in ("ArgMax", "ArgMin"):
        return tf.int64
    if view.ops[node] == "DecodeJpeg":
        return tf.uint8
    return None


def _sources(view, mode):
    """References to what comes from outside."""
    found = []
    for node, op in enumerate(view.ops):
        if view.names[node] in mode:
            continue
        if op in PLACEHOLDERS:
            if op != "PlaceholderWithDefault" or not _has_own_default(view, node):
                found.append(reference_to(node))
        elif op in PIPELINES:
            taken = {r for user in view.consumers(node) for r in view.inputs[user]}
            found += sorted(r for r in taken if node_of(r) == node)
    # What stands behind a placeholder with a default is its default.
    hidden = {
        source
        for node, op in enumerate(view.ops)
        if op == "PlaceholderWithDefault"
        for source in origins(view, view.inputs[node][0])
        if node_of(source) != node
    }
    return [reference for reference in found if reference not in hidden]


def _has_own_default(view, node):
    """Whether the default needs nothing from outside: no batch that the pipeline made."""
    needed = ancestors(view, [node_of(reference) for reference in view.inputs[node]])
    return not any(
        needed[other]
        for other, op in enumerate(view.ops)
        if op in PIPELINES or op in ("Placeholder", "PlaceholderV2")
    )


class _Forward:
    """The nodes of a graph that compute predictions and losses."""

    def __init__(self, view: GraphView):
        self._view = view
        # A counter or a moving average is a variable, too, but no weight. Where nothing is
        # trained, as in a frozen graph's source, all variables have to do.
        trained = find_training(view).trained
        self.weights = trained or frozenset(
            node for node, op in enumerate(view.ops) if op in VARIABLES
        )
        self._left_out = bytearray(
            is_gradient(view, node) or op in ASSIGNMENTS
            for node, op in enumerate(view.ops)
        )

    def meets_weights(self, source: int) -> bool:
        """Whether an operation with weights takes something that depends on `source`."""
        view = self._view
        return any(
            self.weights.intersection(variables_of(view, reference))
            for node in self._depending([source])
            if view.ops[node] in _WITH_WEIGHTS
            for reference in view.inputs[node]
        )

    def meet(self, source: int, inputs: list) -> bool:
        """Whether something depends on `source` and on one of `inputs`."""
        return not self._depending([source]).isdisjoint(self._depending(inputs))

    def _depending(self, references):
        """The nodes of the forward pass that depend on one of `references`."""

        def further(node):
            return (c for c in self._view.consumers(node) if not self._left_out[c])

        # Of a pipeline one output is the images, another the labels.
        wanted = set(references)
        takers = {
            taker for node in set(map(node_of, wanted)) for taker in further(node)
        }
        inputs = self._view.inputs
        return reached((t for t in takers if wanted.intersection(inputs[t])), further)

    def ends(self, inputs: list, labels: list) -> list[int]:
        """The nodes that are outputs, in the order of the graph."""
        view = self._view
        of_inputs, of_labels = self._depending(inputs), self._depending(labels)
        idle = self._idle(of_inputs, of_labels)

        def ends(node, but=-1):
            return all(
                user in of_labels
                or idle[user]
                or self._left_out[user]
                or user == but
                or self._is_hit(user, of_labels)
                for user in view.consumers(node)
            )

        found = [
            node
            for node in sorted(of_inputs - of_labels)
            if not idle[node]
            and ends(node)
            and view.ops[node] not in _NO_OUTPUTS
            # A loss or an accuracy without labels, such as a penalty.
            and not self._is_scalar(node)
            and not self._is_hit(node, of_labels)
        ]
        return list(dict.fromkeys(self._named(node, ends) for node in found))

    def _is_hit(self, node, of_labels):
        """Whether it is the class that metrics compare with the label."""
        # Without a metric it may be what is asked for.
        users = self._view.consumers(node)
        is_compared = bool(users) and of_labels.issuperset(users)
        return self._view.ops[node] in ("ArgMax", "TopKV2") and is_compared

    def _named(self, node, ends):
        """What the loss only gave another shape, such as logits, by its own name."""
        while self._view.ops[node] == "Reshape":
            earlier = node_of(self._view.inputs[node][0])
            if not ends(earlier, but=node):
                break
            node = earlier
        return node

    def _is_scalar(self, node):
        return static_shape(self._view, reference_to(node)) == ()

    def _idle(self, of_inputs, of_labels):
        """1 for each node that only updates, summaries and shapes take.

        What gradients pass through is none.
        """
        view = self._view
        idle = bytearray(
            op in _ONLOOKERS or op in ASSIGNMENTS or "Summary" in op for op in view.ops
        )
        waiting = {
            node: sum(not self._is_gradient(u) for u in set(view.consumers(node)))
            for node in of_inputs - of_labels
            if not idle[node]
            and not any(map(self._is_gradient, view.consumers(node)))
            and not self._is_scalar(node)  # a loss, though a summary takes it
        }
        # Back from those that only look, as long as nobody else takes a node.
        takers = [n for n in range(len(view)) if idle[n] and not self._is_gradient(n)]
        while takers:
            for node in set(map(node_of, view.inputs[takers.pop()])):
                if node in waiting:
                    waiting[node] -= 1
                    if waiting[node] == 0:
                        idle[node] = 1
                        takers.append(node)
        return idle

    def _is_gradient(self, node: int) -> Any:
        return self._left_out[node] and self._view.ops[node] not in ASSIGNMENTS
