"""Where a value of a graph comes from: variables, constants, reductions of data.

A gamma reaches its batch norm through reads, casts, reshapes, conditions and function
arguments; a moving variance through arithmetic too. These functions walk back along
such paths and say what lies at their ends.

Contract: every walk is bounded by a number of steps, not by the depth of the graph; one
that ends for want of steps says so, and is then taken for "unknown".
"""

from __future__ import annotations

import operator
import re
from typing import Any, Container, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.view import GraphView, node_of, port_of, reference_to

VARIABLES = frozenset(["Variable", "VariableV2", "VarHandleOp", "AutoReloadVariable"])
ASSIGNMENTS = frozenset(
    ["Assign", "AssignAdd", "AssignSub"]
    + ["AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"]
)
# One step of proximal gradient descent towards a value: `bn_tf1` takes it for an average that
# is read and written under one lock. The value is what it takes last.
LOCKED_AVERAGES = frozenset(
    ["ApplyProximalGradientDescent", "ResourceApplyProximalGradientDescent"]
)
# `bn_tf1` sums by channel with the gradients of a bias and of a depthwise convolution.
REDUCTIONS = frozenset(
    ["Mean", "Sum", "BiasAddGrad", "DepthwiseConv2dNativeBackpropFilter"]
)

# The first input with another shape, dtype or place, but the same numbers. An assignment
# gives its variable, for whoever takes a reference.
_SAME_AS_FIRST_NAMES = """
Identity ReadVariableOp Switch RefSwitch RefIdentity Enter RefEnter Exit RefExit
NextIteration RefNextIteration StopGradient PreventGradient CheckNumerics Snapshot
Cast Reshape Squeeze ExpandDims BroadcastTo EnsureShape Print Tile DeepCopy Assign
AssignAdd AssignSub PlaceholderWithDefault Copy CopyHost _Recv HorovodAllreduce
HorovodBroadcast CollectiveReduce CollectiveReduceV2 NcclAllReduce _MklToTf
ResourceGather GatherV2
"""
_SAME_AS_FIRST = frozenset(_SAME_AS_FIRST_NAMES.split())
# From one of several: of a condition, of all calls of a function.
_SAME_AS_ANY = frozenset(["Merge", "RefMerge", "_Arg", "_Ret", "RefSelect"])
_SELECTIONS = frozenset(["Select", "SelectV2"])
_ARITHMETIC_NAMES = """
Add AddV2 Sub Mul Div RealDiv DivNoNan Square SquaredDifference Neg Maximum Minimum
Pow Sqrt Rsqrt Relu Sign Reciprocal Inv AddN ConcatV2 Concat Pack ClipByValue Abs
AccumulateNV2 MulNoNan Xdivy StridedSlice Slice Split SplitV
"""
_ARITHMETIC = frozenset(_ARITHMETIC_NAMES.split())
# Numbers that say how much data there is, not what it is.
_SIZES = frozenset(
    ["Shape", "ShapeN", "Size", "Rank", "Prod", "Fill", "ZerosLike", "OnesLike"]
    + ["Range", "BroadcastGradientArgs", "NoOp"]
)
_FUSED = re.compile(
    r"(_?(Mkl)?(Native)?FusedBatchNorm(V\d+)?(Ex)?|BnTf1CompiledBatchNorm)$"
)
_BOOL = tf.bool.as_datatype_enum
_PARTITION = re.compile(r"/part_\d+$")
# What decides something is small; weights are not to be made arrays of.
_MAX_CONSTANT = 1 << 16
# Real walks take some ten steps. Many nodes that share one with many inputs would otherwise
# take the square of their number: hours for a file of some MB.
_STEPS = 300
_SCALAR_DEPTH = 12
_SCALAR_VALUES = 8


class Leaves(NamedTuple):
    """The ends of the walk from a value through arithmetic.

    Attributes:
        reductions: nodes that reduce a tensor (Mean, Sum, ...).
        variables: nodes of variables.
        constants: nodes of constants with more than one number.
        statistics: references to the statistics that fused batch norms give.
        others: nodes of everything else: placeholders, convolutions, ...
    """

    reductions: frozenset[int]
    variables: frozenset[int]
    constants: frozenset[int]
    statistics: frozenset[int]
    others: frozenset[int]


def is_fused(op: str) -> bool:
    """Whether `op` is a fused batch norm, of any version and rewriting."""
    return _FUSED.match(op) is not None


def written_value(view: GraphView, node: int) -> int | None:
    """The reference to what an assignment or a locked average writes; None for others."""
    op, inputs = view.ops[node], view.inputs[node]
    if op in ASSIGNMENTS and len(inputs) > 1:
        return inputs[1]
    return inputs[-1] if op in LOCKED_AVERAGES and len(inputs) > 1 else None


def same_values(view: GraphView, reference: int) -> tuple[int, ...]:
    """References to where the numbers of `reference` come from, one node further."""
    node = node_of(reference)
    op = view.ops[node]
    inputs = view.inputs[node]
    if op in _SAME_AS_FIRST:
        return inputs[:1]
    if op in _SAME_AS_ANY:
        return inputs
    if op in _SELECTIONS:
        return inputs[1:3]
    if op == "IdentityN":
        return inputs[port_of(reference) : port_of(reference) + 1]
    return tuple(
        reference_to(view.bodies[body].returns[port_of(reference)])
        for body in view.called.get(node, ())[:_STEPS]
        if port_of(reference) < len(view.bodies[body].returns)
    )


def origins(view: GraphView, reference: int) -> list[int]:
    """References to the first places that are more than a copy of another value."""
    found, seen, pending = [], {reference}, [reference]
    while pending and len(seen) < _STEPS:
        current = pending.pop()
        earlier = same_values(view, current)
        if not earlier:
            found.append(current)
        for source in earlier[:_STEPS]:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


def ways_to(view: GraphView, reference: int, ends: frozenset[str]) -> frozenset[int]:
    """References to the copies on the ways to `reference`, but from operations `ends`."""
    found: set[int] = set()
    pending: list[tuple[int, tuple[int, ...]]] = [(reference, ())]
    for _ in range(_STEPS):
        if not pending:
            break
        current, passed = pending.pop()
        earlier = [r for r in same_values(view, current) if r not in passed]
        if not earlier and view.ops[node_of(current)] not in ends:
            found.update(passed)
        pending += [(source, (*passed, current)) for source in earlier]
    return frozenset(found)


def origin(view: GraphView, reference: int) -> int:
    """As `origins`, following the first way only, and not out of copies."""
    for _ in range(_STEPS):
        earlier = same_values(view, reference)
        if not earlier:
            break
        reference = earlier[0]
    return reference


def only_origin(view: GraphView, reference: int, but: Container[str] = ()) -> int:
    """As `origin`, up to where ways part or an operation of `but` stands."""
    for _ in range(_STEPS):
        earlier = same_values(view, reference)
        if len(earlier) != 1 or view.ops[node_of(reference)] in but:
            break
        reference = earlier[0]
    return reference


def leaves(view: GraphView, reference: int) -> Leaves:
    """What `reference` is computed from by arithmetic on each number by itself."""
    found: dict[str, set[int]] = {field: set() for field in Leaves._fields}
    seen, pending = {reference}, [reference]
    while pending:
        current = pending.pop()
        node = node_of(current)
        earlier = operands_of(view, current)
        if not earlier:
            _sort_leaf(view, current, found)
        for source in earlier[:_STEPS]:
            if source not in seen:
                seen.add(source)
                pending.append(source)
        if len(seen) > _STEPS or len(earlier) > _STEPS:
            found["others"].add(node)  # unknown, which may be anything
            break
    return Leaves(*(frozenset(found[field]) for field in Leaves._fields))


def operands_of(view: GraphView, reference: int) -> tuple[int, ...]:
    """References to what `reference` is a copy of, or the result of arithmetic on."""
    if view.ops[node_of(reference)] in _ARITHMETIC:
        return view.inputs[node_of(reference)]
    return same_values(view, reference)


def _sort_leaf(view, reference, found):
    node = node_of(reference)
    op = view.ops[node]
    if op in REDUCTIONS:
        found["reductions"].add(node)
    elif op in VARIABLES:
        found["variables"].add(node)
    elif op == "Const":
        if constant_size(view, node) != 1:
            found["constants"].add(node)
    elif is_fused(op) and port_of(reference):
        found["statistics"].add(reference)
    # A rate or a flag that is fed says nothing of the data.
    elif op not in _SIZES and not _is_scalar_placeholder(view, node):
        found["others"].add(node)


def _is_scalar_placeholder(view, node):
    if view.ops[node] not in ("Placeholder", "PlaceholderV2"):
        return False
    shape = view.attribute(node, "shape")
    return shape is not None and not shape.shape.unknown_rank and not shape.shape.dim


def variables_of(view: GraphView, reference: int) -> tuple[int, ...]:
    """The variables that `reference` is a copy of, those of a partition in order."""
    found = []
    for source in origins(view, reference):
        node = node_of(source)
        if view.ops[node] in ("ConcatV2", "Concat"):  # how a partitioned one is read
            parts = [origin(view, part) for part in view.inputs[node]]
            found += [node_of(part) for part in parts]
        else:
            found.append(node)
    return tuple(sorted({n for n in found if view.ops[n] in VARIABLES}))


def variable_name(view: GraphView, node: int) -> str:
    """The name of the variable at `node`, without the part of a partition."""
    return _PARTITION.sub("", view.names[node].rpartition(":")[2])


def constant_size(view: GraphView, node: int) -> int | None:
    """The number of elements of a Const; None if its shape is absurd."""
    if node not in view.constant_sizes:
        view.constant_sizes[node] = _stated_size(view, node)
    return view.constant_sizes[node]


def _stated_size(view, node):
    value = view.attribute(node, "value")
    if value is None:
        return None
    size = 1
    for dimension in value.tensor.tensor_shape.dim:
        size *= dimension.size
        # Python's integers have no limit: a hostile shape would make one of a million digits.
        if not 0 <= size < 1 << 40:
            return None
    return size


def constant(view: GraphView, node: int) -> Any:
    """The array of a small Const; None for another node, or a large or damaged one."""
    if view.ops[node] not in ("Const", "HostConst"):
        return None
    size = constant_size(view, node)
    if size is None or size > _MAX_CONSTANT:
        return None
    try:
        return tf.make_ndarray(view.attribute(node, "value").tensor)
    except (TypeError, ValueError, KeyError):
        return None  # contents that do not fit the shape, or an unknown dtype


def constant_at(view: GraphView, reference: int) -> Any:
    """As `constant`, of what `reference` is a copy of."""
    return constant(view, node_of(origin(view, reference)))


def integers(view: GraphView, reference: int) -> tuple[int, ...] | None:
    """The constant integers that `reference` stands for, or None."""
    array = constant_at(view, reference)
    if array is None or array.dtype.kind not in "iu" or array.size > 64:
        return None
    return tuple(int(number) for number in np.ravel(array))


def scalars(view: GraphView, reference: int) -> frozenset[float]:
    """The numbers that a scalar may be, by constants and arithmetic; empty: unknown."""
    return _scalars(view, reference, _SCALAR_DEPTH, {})


def _scalars(view, reference, depth, known):
    if reference in known or depth == 0:
        return known.get(reference, frozenset())
    known[reference] = frozenset()  # a cycle gives nothing new
    node = node_of(reference)
    if view.ops[node] == "Const":
        found = _scalar_constant(view, node)
    elif _is_switch(view, node):
        found = frozenset([1.0])  # what is scaled by it is told as it is when it is on
    elif view.ops[node] in _SCALAR_ARITHMETIC:
        found = _scalar_result(view, node, depth, known)
    else:
        sources = same_values(view, reference)[:_SCALAR_VALUES]
        parts = [_scalars(view, source, depth - 1, known) for source in sources]
        found = frozenset().union(*parts)
    known[reference] = frozenset(sorted(found)[:_SCALAR_VALUES])
    return known[reference]


def _is_switch(view, node):
    source = view.attribute(node, "SrcT") if view.ops[node] == "Cast" else None
    return source is not None and source.type == _BOOL


def _scalar_constant(view, node):
    if constant_size(view, node) != 1:
        return frozenset()
    array = constant(view, node)
    if (
        array is None
        or array.dtype.kind not in "fiu"
        and array.dtype.name != "bfloat16"
    ):
        return frozenset()
    # As it was written: float32 holds 0.99 as 0.9900000095.
    return frozenset([float(str(array.ravel()[0]))])


def _scalar_result(view, node, depth, known):
    operands = [
        _scalars(view, source, depth - 1, known) for source in view.inputs[node]
    ]
    op = view.ops[node]
    if len(operands) != 2:
        return frozenset()
    left, right = operands
    # ExponentialMovingAverage with num_updates=n takes min(decay, (1 + n) / (10 + n)).
    if op in ("Minimum", "Maximum") and not (left and right):
        return left or right
    return frozenset(
        _SCALAR_ARITHMETIC[op](a, b)
        for a in left
        for b in right
        if not (b == 0 and op in ("RealDiv", "Div"))
    )


_SCALAR_ARITHMETIC = {
    "Add": operator.add,
    "AddV2": operator.add,
    # 1 - 0.99 is to be the 0.01 that a program may have written as well.
    "Sub": lambda a, b: round(a - b, 12),
    "Mul": operator.mul,
    "RealDiv": operator.truediv,
    "Div": operator.truediv,
    "Minimum": min,
    "Maximum": max,
}


def static_shape(view: GraphView, reference: int) -> tuple[int | None, ...] | None:
    """The shape that the graph states for a tensor, None for an unknown size or rank.

    Stated are the shapes of placeholders, variables and constants, and, in a .meta file,
    of all outputs.
    """
    for _ in range(_STEPS):
        node, port = node_of(reference), port_of(reference)
        stated = view.attribute(node, "_output_shapes")
        shape = None
        if stated is not None and port < len(stated.list.shape):
            shape = stated.list.shape[port]
        elif view.ops[node] in VARIABLES or view.ops[node].startswith("Placeholder"):
            attribute = view.attribute(node, "shape")
            shape = attribute.shape if attribute is not None else None
        elif view.ops[node] == "Const":
            value = view.attribute(node, "value")
            shape = value.tensor.tensor_shape if value is not None else None
        if shape is not None and not shape.unknown_rank:
            return tuple(d.size if d.size >= 0 else None for d in shape.dim)
        # Frozen graphs have no notes on shapes, but a Reshape says where it leads.
        if view.ops[node] == "Reshape" and len(view.inputs[node]) > 1:
            target = integers(view, view.inputs[node][1])
            return target and tuple(size if size >= 0 else None for size in target)
        if view.ops[node] not in _SAME_SHAPE or not view.inputs[node]:
            return None
        reference = view.inputs[node][0]
    return None


_SAME_SHAPE_NAMES = """
Identity ReadVariableOp Switch RefSwitch Enter Merge BiasAdd Relu Relu6 Elu Selu
LeakyRelu Tanh Sigmoid Softplus _Arg _Ret Cast StopGradient CheckNumerics
FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3
"""
_SAME_SHAPE = frozenset(_SAME_SHAPE_NAMES.split())
