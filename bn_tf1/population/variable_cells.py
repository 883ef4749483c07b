"""Variables of a graph as cells that are read, written and put back.

A `tf.Variable` object is not needed: in an imported graph there may be none. A value is
written by an assignment that the graph has already, such as that of the initial value,
whose input is fed; so no operation is added.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.control_flow import ancestors

_VARIABLES = ("Variable", "VariableV2", "VarHandleOp")
_COPIES = ("Identity", "ReadVariableOp", "Switch", "RefSwitch", "Enter", "RefEnter")
_ASSIGNMENTS = ("Assign", "AssignVariableOp")
# Assign, AssignSubVariableOp, ApplyAdam, ResourceSparseApplyAdagrad, ScatterAdd and so on.
_WRITES = re.compile(r"(Resource)?(Sparse)?(Assign|Apply|Scatter)")


class Cell(NamedTuple):
    """One variable.

    Attributes:
        name: its name.
        value: the tensor that reads it.
        assignment: an operation that writes it, without control inputs.
    """

    name: str
    value: tf.Tensor
    assignment: tf.Operation

    @property
    def shape(self) -> list[int]:
        """The shape of the variable."""
        return self.value.shape.as_list()

    @property
    def dtype(self) -> Any:
        """NumPy's dtype of its values."""
        return self.value.dtype.base_dtype.as_numpy_dtype


def write(session: tf.Session, values: Mapping[Cell, Any]) -> None:
    """Gives the variables values of the same number of elements, all in one run."""
    # Fed in the place of the initial value: what makes that, which may be random or read a
    # file, is not run.
    feed = {
        cell.assignment.inputs[1]: np.asarray(value, cell.dtype).reshape(cell.shape)
        for cell, value in values.items()
    }
    session.run([cell.assignment for cell in values], feed)


def cell_of(variable: Any) -> Cell:
    """The cell of a variable, of its operation, or of a tensor that reads it.

    Raises:
        ValueError: `variable` is none, or nothing in its graph assigns it.
    """
    op = _behind_copies(getattr(variable, "op", variable))
    if op.type not in _VARIABLES:
        raise ValueError(f"{op.name!r} is no variable, but a {op.type}")
    # An assignment that waits for something else would run that, too.
    consumers, graph = op.outputs[0].consumers(), op.graph
    free = [c for c in consumers if not c.control_inputs and graph.is_fetchable(c)]
    assignments = [c for c in free if c.type in _ASSIGNMENTS]
    assignments = [c for c in assignments if graph.is_feedable(c.inputs[1])]
    reads = [op] if op.type != "VarHandleOp" else []
    reads += [c for c in free if c.type == "ReadVariableOp"]
    if not (assignments and reads):
        what = "nothing in the graph assigns or reads the variable"
        raise ValueError(f"{what} {op.name!r}")
    # The first one was made with the variable: that of its initial value.
    return Cell(op.name, reads[0].outputs[0], assignments[0])


def _behind_copies(op):
    while op.type in _COPIES:
        op = op.inputs[0].op
    return op


def written_by(operations: Iterable[tf.Operation]) -> list[Cell]:
    """The variables that some of `operations` change."""
    found = {}
    for op in operations:
        if _WRITES.match(op.type) and op.inputs:
            variable = _behind_copies(op.inputs[0].op)
            if variable.type in _VARIABLES:
                found.setdefault(variable.name, variable)
    return [cell_of(variable) for variable in found.values()]


def runs_before(
    fetches: Iterable[tf.Tensor], fed: Iterable[tf.Tensor]
) -> set[tf.Operation]:
    """The operations that a run of `fetches` runs when `fed` are fed."""
    fed = {tensor.name: tensor for tensor in fed}
    return ancestors({t.op for t in fetches if t.name not in fed}, fed.values())


_UNINITIALIZED = re.compile(
    # of a variable by reference; of one by resource, on 1.15 and on 2.x
    r"uninitialized value (\S+)|reading resource variable (\S+)|find variable (\S+)\."
)


@contextlib.contextmanager
def lack_of_values_told() -> Iterator[None]:
    """Names the variable that a run in the `with` block found without a value.

    Raises:
        ValueError: in the place of TensorFlow's error, which is raised a long way from
            the program's own lines.
    """
    try:
        yield
    except tf.errors.FailedPreconditionError as error:
        # TensorFlow's error has the name in its words alone, and those by kind of variable.
        found = _UNINITIALIZED.search(error.message)
        if found is None:
            raise
        name = next(filter(None, found.groups()))
        raise ValueError(
            f"the variable {name!r} has no value yet: restore a checkpoint, or run "
            "tf.global_variables_initializer(), before"
        ) from error


@contextlib.contextmanager
def kept(
    session: tf.Session, cells: Iterable[Cell], *, after_an_error_only: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """The values of `cells` by name, which are put back at the end, come what may."""
    # In NumPy and not in copies in the graph, to which nothing is added.
    cells = list(cells)
    with lack_of_values_told():
        values = session.run([cell.value for cell in cells])
    saved = {cell.name: value for cell, value in zip(cells, values)}

    def put_back():
        write(session, {cell: saved[cell.name] for cell in cells})

    try:
        yield saved
    except BaseException:  # an interrupt, too: half a recalibration is worse than none
        put_back()
        raise
    if not after_an_error_only:
        put_back()
