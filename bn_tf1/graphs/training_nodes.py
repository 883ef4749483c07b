"""What a graph trains, what a training step runs, and under which conditions.

A train op is whatever applies gradients: the optimizers' Apply operations, gradients
that are handed to an accumulator, and assignments written by hand whose value comes from
gradients. A training step runs all that comes before an operation that runs after one
of them: `tf.group(train_op, *update_ops)` runs the updates, and so does a train op that
waits for them.

In a condition of control flow v1, nodes of a branch that is not taken are dead, and so
is every node that takes something of them or waits for them, up to a Merge. With
control flow v2 branches are functions.
"""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple

from bn_tf1.graphs.node_values import (
    ASSIGNMENTS,
    LOCKED_AVERAGES,
    REDUCTIONS,
    constant,
    leaves,
    only_origin,
    origin,
    variables_of,
    written_value,
)
from bn_tf1.graphs.reading.partial_parsing import GraphTooLargeError
from bn_tf1.graphs.view import (
    BRANCHES,
    LOOPS,
    GraphView,
    ancestors,
    descendants,
    node_of,
    port_of,
    reached,
)

_APPLY = re.compile(r"(Resource)?(Sparse)?Apply[A-Z]|ResourceSparseApply[A-Z]")
_ACCUMULATE = re.compile(r"(Resource|Sparse)?AccumulatorApplyGradient$")
_GRADIENT = re.compile(r"(^|/)gradients(_\d+)?/|_grad(_\d+)?/")
_GRADIENT_OP = re.compile(r"Grad(V\d+)?$|Backprop")
_TRANSPOSED = re.compile(
    r"(Conv[23]DBackpropInput(V\d+)?|DepthwiseConv2dNativeBackpropInput)$"
)
_DEFAULT = "PlaceholderWithDefault"
_NEXT = ("NextIteration", "RefNextIteration")
_STEPS = 300
# Conditions that are nested or joined have sets as the square of their number.
MAX_CONDITIONS = 4_000_000

# (reference to the predicate, branch 0 or 1)
Condition = tuple


class Training(NamedTuple):
    """The training steps of a graph.

    Attributes:
        applies: the nodes that apply gradients.
        runs: 1 for each node that a training step runs, 0 for others.
        trained: the variables that gradients are applied to.
    """

    applies: tuple[int, ...]
    runs: bytearray
    trained: frozenset[int]


def find_training(view: GraphView) -> Training:
    """The training steps of `view`; without `applies` where it has none."""
    applies = [
        node for node in range(len(view)) if view.inputs[node] and _applies(view, node)
    ]
    if not applies:
        return Training((), bytearray(len(view)), frozenset())
    # A train op may be any group of what applies gradients and of updates beside it.
    after = descendants(view, applies)
    runs = ancestors(view, [node for node in range(len(view)) if after[node]])
    # The operations of a function that change something run whenever it is called.
    for body, callers in view.callers.items():
        if any(runs[caller] for caller in callers):
            for node in _run_by_a_call(view, view.bodies[body], runs):
                runs[node] = 1
    trained = set()
    for node in applies:
        trained.update(variables_of(view, view.inputs[node][0]))
    return Training(tuple(applies), runs, frozenset(trained))


def _applies(view, node):
    op = view.ops[node]
    is_average = op in LOCKED_AVERAGES  # by its name it would be an optimizer's
    if not is_average and (_APPLY.match(op) or _ACCUMULATE.match(op)):
        return True
    written = written_value(view, node)
    if written is None:
        return False
    value = leaves(view, written)
    return any(is_gradient(view, leaf) for leaf in value.others | value.reductions)


def is_gradient(view: GraphView, node: int) -> bool:
    """Whether `node` is part of what tf.gradients made."""
    if _GRADIENT.search(view.names[node]) is not None:
        return True
    for _ in range(_STEPS):
        op = view.ops[node]
        if not _TRANSPOSED.match(op) or len(view.inputs[node]) < 3:
            break
        # A transposed convolution of a network is the gradient of one that is not there:
        # it counts where what it takes is a gradient.
        node = node_of(origin(view, view.inputs[node][2]))
    # A reduction that is called a gradient may be a sum by channel of `bn_tf1`.
    is_named = _GRADIENT_OP.search(op) and not _TRANSPOSED.match(op)
    return op not in REDUCTIONS and bool(is_named)


def _run_by_a_call(view, body, runs):
    inside = range(body.first, body.end)

    def is_new(node):
        return node in inside and not runs[node]

    changing = [n for n in inside if view.ops[n] in ASSIGNMENTS and is_new(n)]
    return reached(changing, lambda node: filter(is_new, view.runs_before(node)))


class Conditions:
    """Under which conditions each node of a graph runs."""

    def __init__(self, view: GraphView):
        self._view = view
        # A node that waits for something in a branch is not built there for that: only the
        # pivot says so. Yet it is dead with what it waits for (`misleading`).
        self._of = _dead_branches(view, _is_pivot)
        self._dead: dict[int, frozenset] | None = None
        self._bodies = _conditional_bodies(view)

    def of(self, node: int) -> frozenset[Condition]:
        """The branches of control flow v1 that `node` was built in."""
        return self._of.get(node, frozenset())

    def of_value(self, reference: int) -> frozenset[Condition]:
        """The branches of control flow v1 in which there is a value at `reference`."""
        return _condition_of_input(self._view, reference, self._of)

    def misleading(self, update: int, nodes: Iterable[int]) -> frozenset[Condition]:
        """The branches of `update` that make `nodes` outside of them dead."""
        own = self.of(update)
        if not own:
            return own
        if self._dead is None:
            self._dead = _dead_branches(self._view, lambda view, control: True)
        none: frozenset = frozenset()
        return none.union(
            *((own & self._dead.get(node, none)) - self.of(node) for node in nodes)
        )

    def is_never(self, node: int) -> bool:
        """Whether a predicate is constant such that `node` never runs."""
        return any(flag not in (None, branch) for flag, branch in self._flags(node))

    def is_conditional(self, node: int) -> bool:
        """Whether a predicate that is not constant decides if `node` runs."""
        if self._view.body_of(node) in self._bodies:
            return True
        return any(flag is None for flag, _ in self._flags(node))

    def by_default(self, reference: int) -> bool | None:
        """Whether a value is there when nobody feeds a predicate; None: not known, or always.

        A `tf.placeholder_with_default` of a constant has a default.
        """
        conditions = list(self.of_value(reference))
        conditions += self._called_for(node_of(reference))
        flags = [
            (_default_flag(self._view, predicate), bool(branch))
            for predicate, branch in conditions
        ]
        if any(flag not in (None, branch) for flag, branch in flags):
            return False
        return True if flags and all(f is not None for f, _ in flags) else None

    def _called_for(self, node):
        """(predicate, branch) of the `If` that the body of `node` is a branch of."""
        body = self._view.body_of(node)
        name = self._view.bodies[body].name
        # Of a Case or a loop no one bool decides.
        for caller in self._view.callers.get(body, ()):
            chosen = self._view.attribute(caller, "then_branch")
            if chosen is not None and self._view.ops[caller] in BRANCHES:
                branch = int(chosen.func.name == name)
                yield self._view.inputs[caller][0], branch

    def in_called_body(self, node: int) -> bool:
        """Whether `node` is in a branch or a loop of control flow v2."""
        body = self._view.body_of(node)
        callers = self._view.callers.get(body, ())
        return body in self._bodies or any(self._view.ops[c] in LOOPS for c in callers)

    def _flags(self, node):
        for predicate, branch in self.of(node):
            yield constant_flag(self._view, predicate), bool(branch)


def constant_flag(view: GraphView, reference: int) -> bool | None:
    """The value of a constant bool; None if it can be fed or is computed."""
    value = constant(view, node_of(_predicate(view, reference)))
    return bool(value) if value is not None and value.size == 1 else None


def _default_flag(view, reference):
    """The value of a bool that is constant, or what it is when nobody feeds it."""
    source = _predicate(view, reference)
    node = node_of(source)
    if view.ops[node] == _DEFAULT and view.inputs[node]:
        source = view.inputs[node][0]
    return constant_flag(view, source)


def _predicate(view, reference):
    """Where a bool comes from; what can be fed is no copy of its default."""
    return only_origin(view, reference, but=(_DEFAULT,))


def _conditional_bodies(view):
    """The functions that only run as a branch."""
    return view.called_from(
        body
        for node, called in view.called.items()
        if view.ops[node] in BRANCHES
        and constant_flag(view, view.inputs[node][0]) is None
        for body in called
    )


def _is_pivot(view, node):
    """What the nodes of a branch without inputs from outside wait for."""
    if view.ops[node] != "Identity" or not view.inputs[node]:
        return False
    switch = node_of(view.inputs[node][0])
    return view.ops[switch] in ("Switch", "RefSwitch")


def _dead_branches(view, counts) -> dict[int, frozenset]:
    """The conditions of each node that has any; a control counts if `counts` says so.

    Raises:
        GraphTooLargeError: they are too many to be told.
    """
    switches = [n for n, op in enumerate(view.ops) if op in ("Switch", "RefSwitch")]
    found: dict[int, frozenset] = {}
    if not switches:  # as in all graphs of control flow v2
        return found
    waiting = _waiting(view, switches)
    sets: dict[frozenset, frozenset] = {}
    held = 0
    # Each node when all that it depends on is known: one pass, however deep it is.
    ready = [node for node, count in waiting.items() if count == 0]
    while ready:
        node = ready.pop()
        conditions = _conditions_of(view, node, found, counts)
        if conditions:
            # Equal sets are one object: of nodes in one branch there are thousands.
            if conditions not in sets:
                sets[conditions] = conditions
                held += len(conditions)
                if held > MAX_CONDITIONS:
                    raise GraphTooLargeError(
                        f"{view.path}the conditions of the graph are nested or joined so "
                        f"often that its nodes depend on more than {MAX_CONDITIONS}"
                    )
            found[node] = sets[conditions]
        if view.ops[node] in _NEXT:
            continue
        for later in view.runs_after(node):
            if later in waiting:
                waiting[later] -= 1
                if waiting[later] == 0:
                    ready.append(later)
    return found


def _waiting(view, switches):
    """How many predecessors among them each descendant of a Switch has.

    What a loop gives to its next iteration does not count, or nothing would be ready.
    """
    after = descendants(view, switches)
    waiting = {}
    for node in range(len(view)):
        if after[node]:
            waiting[node] = sum(
                after[earlier] and view.ops[earlier] not in _NEXT
                for earlier in view.runs_before(node)
            )
    return waiting


def _conditions_of(view, node, found, counts):
    op = view.ops[node]
    none = frozenset()
    data = [_condition_of_input(view, r, found) for r in view.inputs[node]]
    awaited = [found.get(c, none) for c in view.controls[node] if counts(view, c)]
    if op in ("Merge", "RefMerge"):
        # One input that is alive is enough; what it waits for has all to be.
        return (data[0].intersection(*data[1:]) if data else none) | _joined(awaited)
    conditions = _joined(data + awaited)
    if op in ("Exit", "RefExit"):
        # A loop ends, however often it went round: what follows does not depend on that.
        loops = {c for c in conditions if view.ops[node_of(c[0])] == "LoopCond"}
        return conditions - loops
    return conditions


def _joined(parts):
    """The union; of a chain of nodes, the same set for each of them."""
    # By identity, which is quick: equal sets are one object (`_dead_branches`).
    distinct = list({id(part): part for part in parts if part}.values())
    return distinct[0] if len(distinct) == 1 else frozenset().union(*distinct)


def _condition_of_input(view, reference, found):
    node = node_of(reference)
    conditions = found.get(node, frozenset())
    if view.ops[node] in ("Switch", "RefSwitch") and len(view.inputs[node]) > 1:
        predicate = _predicate(view, view.inputs[node][1])
        return conditions | {(predicate, port_of(reference))}
    return conditions
