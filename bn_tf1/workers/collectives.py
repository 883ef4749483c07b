"""What workers compute together: joint statistics, sums, one set of variables.

    gathered        the rows of all workers, in one order
    total           a sum over all workers, such as that of all gradients, flat
    share           the chief's values for the variables of all workers, bit for bit

Contract: all workers build the same collectives in the same order; each gets a number that
TensorFlow knows it by (`listed` names them). Each `session.run` holds the same ones on all
workers (`reached` tells which). Results have the same bits everywhere.
"""

from __future__ import annotations

import weakref
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import tensorflow.compat.v1 as tf

# Not MultiWorkerMirroredStrategy's or Horovod's: these are in both versions, in graph mode.
_OPERATIONS = ("CollectiveReduce", "CollectiveGather")
# Of what is shared bit for bit: sums of integers, all but one of them 0, are exact.
_SAME_BITS = {1: tf.uint8, 2: tf.int16, 4: tf.int32, 8: tf.int64}
# The last number of each graph; not in one of its collections, which its file would keep.
_numbers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Group(NamedTuple):
    """Workers that compute something together.

    Attributes:
        size: how many.
        key: the number that TensorFlow knows the group by.
    """

    size: int
    key: int


def gathered(row: tf.Tensor, group: Group) -> tf.Tensor:
    """The rows of all workers, [workers, length], in one order everywhere."""
    if group.size == 1:
        return row[tf.newaxis]
    # Known when the graph is built: the operation has it as an attribute.
    length = row.shape.num_elements()
    # Of a few numbers: on the CPU, whatever has made them.
    with tf.device("/cpu:0"):
        flat = tf.raw_ops.CollectiveGather(
            input=row,
            group_size=group.size,
            group_key=group.key,
            instance_key=_next_number(),
            shape=[group.size * length],
        )
    return tf.reshape(flat, [group.size, length])


def total(tensor: tf.Tensor, group: Group) -> tf.Tensor:
    """The sum of `tensor`, a float32, float64, int32 or int64 vector, over the group."""
    if group.size == 1:
        return tensor
    with tf.device("/cpu:0"):
        return tf.raw_ops.CollectiveReduce(
            input=tensor,
            group_size=group.size,
            group_key=group.key,
            instance_key=_next_number(),
            merge_op="Add",
            final_op="Id",
            subdiv_offsets=[0],  # one ring over the whole vector
            # Whether one waits for another is known from what it needs: more would have
            # to be the same order on all workers, or they hang.
            wait_for=[],
            communication_hint="auto",
        )


def mean_gradients(
    pairs: Sequence[tuple],
    penalties: Sequence[Any],
    num_examples: tf.Tensor,
    group: Group,
) -> list[tuple]:
    """The gradients of the mean over all examples, by one reduce for each dtype.

    Args:
        pairs: (gradient, variable) of this worker's sum over its examples.
        penalties: for each of them the gradient of what counts once, or None.
        num_examples: how many this worker has; scalar.
    """
    # Each worker has rows of its own in a sparse gradient: what is flat has room for all.
    dense = [tf.convert_to_tensor(gradient) for gradient, _ in pairs]
    wide = [_at_least_float32(gradient) for gradient in dense]
    found: list[Any] = [None] * len(pairs)
    # In one order everywhere: each dtype is a collective.
    for dtype in sorted({gradient.dtype for gradient in wide}, key=str):
        members = [i for i, gradient in enumerate(wide) if gradient.dtype == dtype]
        count = tf.cast(num_examples, dtype)
        flat = _flat([wide[i] for i in members] + [count])
        # The mean loss of no examples is NaN, and so are its gradients.
        sums = total(tf.where_v2(count > 0, flat, tf.zeros_like(flat)), group)
        parts = _parts_like([dense[i] for i in members] + [count], sums / sums[-1])
        for i, part in zip(members, parts):
            part.set_shape(dense[i].shape)
            found[i] = part
    result = []
    for i, (gradient, penalty) in enumerate(zip(found, penalties)):
        if penalty is not None:
            gradient += tf.cast(tf.convert_to_tensor(penalty), gradient.dtype)
        result.append((tf.cast(gradient, dense[i].dtype), pairs[i][1]))
    return result


def _flat(tensors):
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def _parts_like(tensors, flat):
    parts = tf.split(flat, [tf.size(tensor) for tensor in tensors], num=len(tensors))
    return [tf.reshape(part, tf.shape(like)) for part, like in zip(parts, tensors)]


def _at_least_float32(tensor):
    # 1.15 has no collective for float16 and bfloat16, and a sum in them would be off.
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def share(variables: Iterable[Any], is_chief: bool, group: Group) -> tf.Operation:
    """An operation that gives `variables` the chief's values on all workers, bit for bit.

    Raises:
        ValueError: the values of a variable have no bits to share: strings, say.
    """
    by_size: dict[int, list] = {}
    for variable in variables:
        size = variable.dtype.base_dtype.size
        if size not in _SAME_BITS or variable.dtype.base_dtype == tf.string:
            raise ValueError(
                f"the variable {variable.op.name} has dtype {variable.dtype.name}, "
                "which workers cannot share: leave it out"
            )
        by_size.setdefault(size, []).append(variable)
    assigned = []
    for size, members in sorted(by_size.items()):
        bits = [_bits(tf.convert_to_tensor(v), _SAME_BITS[size]) for v in members]
        # There is no reduce for int16, nor for uint8.
        flat = _flat([tf.cast(b, tf.int64 if size == 8 else tf.int32) for b in bits])
        if not is_chief:
            flat = tf.zeros_like(flat)
        for variable, part in zip(members, _parts_like(bits, total(flat, group))):
            value = _bits(tf.cast(part, _SAME_BITS[size]), variable.dtype.base_dtype)
            assigned.append(variable.assign(value).op)
    return tf.group(*assigned, name="share_variables")


def _bits(tensor, dtype):
    if tensor.dtype == dtype:
        return tensor
    if tf.bool in (tensor.dtype, dtype):
        return tf.cast(tensor, dtype)
    return tf.bitcast(tensor, dtype)


def _next_number() -> int:
    """The number of a new collective of the graph: the same on all workers."""
    # A branch or a loop of control flow v2 is a graph of its own, but runs with this one.
    with tf.init_scope():
        graph = tf.get_default_graph()
    _numbers[graph] = _numbers.get(graph, 0) + 1
    return _numbers[graph]


# ------------------------------------------------------------------ which a graph holds


def listed(graph: tf.Graph) -> list[str]:
    """What each collective of `graph` and its functions is, by their numbers."""
    graph_def = graph.as_graph_def(add_shapes=False)
    nodes = list(graph_def.node)
    for function in graph_def.library.function:
        nodes += function.node_def
    found = {_described(node) for node in nodes if node.op in _OPERATIONS}
    return [text for _, text in sorted(found)]


def _described(node):
    attributes = node.attr
    number = attributes["instance_key"].i
    dtype = tf.as_dtype(attributes["T"].type).name
    sizes = [d.size for d in attributes["shape"].shape.dim]
    shape = f" {sizes}" if node.op == "CollectiveGather" else ""
    group = f"{attributes['group_size'].i} in group {attributes['group_key'].i}"
    return number, f"{node.op} {number} of {dtype}{shape}, {group}"


def reached(
    graph: tf.Graph, fetches: Iterable[Any], fed: Iterable[Any] = ()
) -> list[int]:
    """The numbers of the collectives that a run of `fetches` holds.

    Args:
        fetches: operations and tensors of `graph`.
        fed: tensors that are fed, behind which nothing runs.
    """
    # By hand and not by `extract_sub_graph`, which copies nodes and knows no fed tensors.
    in_functions = _collectives_of_functions(graph)
    stops = {tensor.name for tensor in fed}
    seen: set[tf.Operation] = set()
    pending = [getattr(f, "op", f) for f in fetches if f.name not in stops]
    found: set[int] = set()
    while pending:
        operation = pending.pop()
        if operation in seen:
            continue
        seen.add(operation)
        if operation.type in _OPERATIONS:
            found.add(operation.get_attr("instance_key"))
        found.update(_called_by(operation.node_def, in_functions))
        pending += [t.op for t in operation.inputs if t.name not in stops]
        pending += operation.control_inputs
    return sorted(found)


def _called_by(node, in_functions):
    found = set(in_functions.get(node.op, ()))
    for attribute in node.attr.values():
        for function in [attribute.func, *attribute.list.func]:
            found.update(in_functions.get(function.name, ()))
    return found


def _collectives_of_functions(graph) -> Mapping[str, set[int]]:
    """The numbers of the collectives by function, those that it calls among them."""
    functions = graph.as_graph_def().library.function
    found: dict[str, set[int]] = {f.signature.name: set() for f in functions}
    grows = bool(functions)
    # A function may call one that stands behind it: once more until none finds any.
    while grows:
        grows = False
        for function in functions:
            numbers = found[function.signature.name]
            before = len(numbers)
            for node in function.node_def:
                if node.op in _OPERATIONS:
                    numbers.add(node.attr["instance_key"].i)
                numbers.update(_called_by(node, found))
            grows = grows or len(numbers) > before
    return found
