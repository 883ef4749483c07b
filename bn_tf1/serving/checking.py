"""What must hold of a model before it is written, on examples.

    as before       the outputs are those of the graph before, in inference mode
    repeatable      two runs give the same
    by itself       a prediction does not depend on the rest of its batch
    folded          folding changed nothing but the rounding

Differences are shares of the largest absolute value of an output.
"""

from __future__ import annotations

import os
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from bn_tf1.formats.array_files import read_arrays
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, canonical
from bn_tf1.graphs.rewriting.graph_interface import Candidate
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.isolated_run import Isolated, IsolatedError
from bn_tf1.serving.partwise_comparison import differences_by_part
from bn_tf1.serving.preparing import Model, Reference

# What TensorFlow's own kernels differ by with another order of summation.
TOLERANCE = 1e-5
# Folded weights are rounded once more, before the sum.
_FOLDED_TOLERANCE = 1e-4
# Kernels sum in another order, or are others, for another batch size.
_BATCH_TOLERANCE = 1e-4
# The effect of the inputs' rounding (2^-23, and some) stands for that of one layer; the
# layers of a deep network are many, but what makes a hundredth is no rounding any more.
_ROUNDING = 2e-7
_AMPLIFIED = 30
_MOST_ALLOWED = 1e-2
_EXAMPLES = 4
_ALONE = 2
# By rank: 64 pixels outlast the strides of most networks for images.
_GUESSED_SIZES = {4: 64, 5: 16, 3: 16, 2: 16}


class Examples(NamedTuple):
    """What a model is checked on.

    Attributes:
        arrays: by name of the input, each with the examples on its first axis.
        are_random: whether nobody gave them.
    """

    arrays: Mapping[str, np.ndarray]
    are_random: bool

    def count(self) -> int:
        """How many there are; 0 where no input has a first axis."""
        return max((len(a) for a in self.arrays.values() if a.ndim), default=0)

    def batch(self, size: int) -> dict[str, np.ndarray]:
        """The first `size` examples, from the beginning again where they are fewer."""
        return self._each(lambda array: np.resize(array, [size, *array.shape[1:]]))

    def varied(self, size: int) -> dict[str, np.ndarray]:
        """A batch, with others made of the example where there is only one.

        What is normalised with the batch gives the same in a batch of equal examples as
        it gives for one.
        """
        batch = self.batch(size)
        return {
            name: _variants(array, size)
            if array.ndim and len(array) == 1 and array.dtype.kind in "biuf"
            else batch[name]
            for name, array in self.arrays.items()
        }

    def alone(self, index: int, size: int) -> dict[str, np.ndarray]:
        """One of those of `varied` in a batch without others: `size` times the same."""
        taken = Examples(self.varied(index + 1), self.are_random)
        return taken._each(lambda a: np.repeat(a[index : index + 1], size, axis=0))

    def _each(self, change):
        return {n: change(a) if a.ndim else a for n, a in self.arrays.items()}


def _variants(example, size):
    """One example, and others whose values are its own.

    Each value becomes a smaller one of the example: those of another range would be no
    input of the model's, such as ids past an embedding or probabilities above 1.
    """
    flat = example.reshape(-1)
    # Not in another order only: the statistics would be those of the example.
    rows = [np.minimum(flat, np.roll(flat, turn)) for turn in range(size)]
    return np.stack(rows).reshape([size, *example.shape[1:]])


def read_examples(
    given: str | Mapping[str, Any] | np.ndarray | None, inputs: Sequence[Candidate]
) -> Examples:
    """The examples for `inputs`, of a .npz file or of arrays by name; or random ones.

    Raises:
        ExportError: they do not fit.
    """
    if given is None:
        return Examples(_random_examples(inputs), True)
    if isinstance(given, np.ndarray):
        given = {candidate.tensor: given for candidate in inputs}
    arrays = {canonical(name): np.asarray(a) for name, a in _arrays(given).items()}
    by_name = {canonical(c.tensor): c for c in inputs}
    found = {}
    for name, candidate in by_name.items():
        if name not in arrays:
            raise ExportError(
                f"`--examples` has {', '.join(sorted(arrays)) or 'nothing'}, but nothing "
                f"for the input {candidate}"
            )
        found[name] = _fitting(arrays[name], candidate)
    return Examples(found, False)


def _arrays(given):
    if isinstance(given, Mapping):
        return given
    try:
        return read_arrays(os.fspath(given), "`--examples`")
    except ValueError as error:
        raise ExportError(str(error)) from error


def _fitting(array, candidate):
    shape = candidate.shape
    if shape is not None:
        is_alike = array.ndim == len(shape) and all(
            size is None or axis == 0 or size == own
            for axis, (size, own) in enumerate(zip(shape, array.shape))
        )
        if not is_alike or (array.ndim and not len(array)):
            raise ExportError(
                f"`--examples` has an array of shape {list(array.shape)} for the input "
                f"{candidate}"
            )
    dtype = candidate.dtype.as_numpy_dtype
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ExportError(
            f"`--examples` has an array of {array.dtype} for the input {candidate}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ExportError(
            f"`--examples` has values that are not finite for the input {candidate}"
        )
    return array.astype(dtype)


def _random_examples(inputs):
    random = np.random.RandomState(0)
    found = {}
    for candidate in inputs:
        if candidate.shape is None or candidate.dtype.as_numpy_dtype == object:
            raise ExportError(
                f"no examples can be made up for the input {candidate}: give them with "
                "`--examples X.npz`"
            )
        guess = _GUESSED_SIZES.get(len(candidate.shape), 4)
        rest = [size or guess for size in candidate.shape[1:]]
        shape = [_EXAMPLES, *rest] if candidate.shape else []
        dtype = np.dtype(candidate.dtype.as_numpy_dtype)
        if dtype.kind == "f":
            values = random.uniform(0, 1, shape)
        else:
            values = random.randint(0, 256 if dtype == np.uint8 else 2, shape)
        found[canonical(candidate.tensor)] = np.asarray(values).astype(dtype)
    return found


class Measured(NamedTuple):
    """A model that was run.

    Attributes:
        feed: what was given to it.
        outputs: what it gave.
        notes: what was checked, a sentence each.
    """

    feed: Mapping[str, np.ndarray]
    outputs: Sequence[np.ndarray]
    notes: tuple[str, ...]


def measure(
    model: Model,
    unfolded: EditableGraph | None,
    examples: Examples,
    isolated: Isolated,
    *,
    is_whole: bool = False,
) -> Measured:
    """Runs a model, and what it was made of, and compares them.

    Args:
        model: the model.
        unfolded: its graph before folding, or None.
        examples: what it is given.
        isolated: runs them.
        is_whole: whether a batch is one example in all.

    Raises:
        ExportError: something does not hold.
    """
    _, outputs = model.names()
    size = model.batch_size or _EXAMPLES
    full = examples.batch(size)
    is_fixed = any(c.shape and c.shape[0] for c in model.inputs) or any(
        c.shape and c.shape[0] and c.shape[0] == model.batch_size for c in model.outputs
    )
    # One example says nothing of a batch: what had batch size 1 gets a larger one, too.
    count = size if size > 1 or is_fixed else _ALONE
    # Of a fixed batch size, the others become the same as the one that is looked at.
    of_one = size if is_fixed else 1
    alone = [examples.alone(i, of_one) for i in range(min(_ALONE, count))]
    together = examples.varied(count)
    feeds = [full, full, _nudged(full), together, *alone]
    own, *further = isolated.run(model.graph, feeds, outputs)
    _check_numbers(outputs, own)
    notes = [_examples_note(examples, size), "two runs give the same"]
    compare(zip(outputs, further[0], own), TOLERANCE, "two runs on the same examples")
    # A network that amplifies the rounding of its input amplifies that of its layers.
    rounding = max(difference(a, b) for a, b in zip(further[1], own))
    compared = _Comparison(
        outputs, full, min(_AMPLIFIED * rounding, _MOST_ALLOWED), isolated
    )
    plain = _Ran(model.graph, own)
    if unfolded is not None:
        plain = _Ran(unfolded, isolated.run(unfolded, [full], outputs)[0])
    notes.append(
        compared.as_before(plain, model.references)
        if model.references
        else f"{model.unknown}: there is no comparison with the graph before"
    )
    if unfolded is not None:
        notes.append(compared.as_unfolded(_Ran(model.graph, own), plain))
    allowed = max(_BATCH_TOLERANCE, compared.rounding)
    notes.append(
        "a batch is one example in all: whether its parts depend on each other was not "
        "looked at"
        if is_whole
        else _by_itself(outputs, count, further[2], further[3:], allowed)
        + _likeness_note(together)
    )
    return Measured(full, own, tuple(notes))


class _Ran(NamedTuple):
    """A graph, and what its outputs are for the examples."""

    graph: EditableGraph
    values: Sequence[np.ndarray]


class _Comparison(NamedTuple):
    """How a graph is compared with another.

    The outputs may differ by what the network makes of rounding; its parts, each given
    the same values, by the rounding itself.
    """

    outputs: Sequence[str]
    feed: Mapping[str, np.ndarray]
    rounding: float
    isolated: Isolated

    def as_before(self, own: _Ran, references: Sequence[Reference]) -> str:
        for graph, what in references:
            try:
                runs = self.isolated.run(graph, [self.feed, self.feed], self.outputs)
            except IsolatedError as error:
                return f"{what} could not be run: there is no comparison ({error})"
            if all(difference(a, b) <= TOLERANCE for a, b in zip(*runs)):
                compared = f"the outputs and those of {what}"
                worst = self._worst(own, _Ran(graph, runs[0]), TOLERANCE, compared)
                return f"the outputs are those of {what}, to {worst:.1e} of their scale"
        return "the graph before draws random numbers: there is no comparison"

    def as_unfolded(self, own: _Ran, unfolded: _Ran) -> str:
        what = "the outputs of the folded graph"
        worst = self._worst(own, unfolded, _FOLDED_TOLERANCE, what)
        return f"folding changed the outputs by {worst:.1e} of their scale"

    def _worst(self, own, right, tolerance, what):
        parts = differences_by_part(
            right.graph, own.graph, self.feed, self.outputs, self.isolated
        )
        compare(parts, tolerance, f"{what}, each part given the same values,")
        whole = zip(self.outputs, own.values, right.values)
        return compare(whole, max(tolerance, self.rounding), what)


def _nudged(feed):
    """The examples, each number changed by about the rounding of float32."""
    random = np.random.RandomState(1)
    return {
        name: (array * (1 + _ROUNDING * random.choice([-1, 1], array.shape))).astype(
            array.dtype
        )
        if array.dtype.kind == "f"
        else array
        for name, array in feed.items()
    }


def _likeness_note(feed):
    """What is said where nothing in a batch could change a prediction."""
    batches = [array for array in feed.values() if array.ndim and len(array) > 1]
    if not batches or any((array != array[:1]).any() for array in batches):
        return ""
    return ", of examples that are all alike: others would say more"


def _examples_note(examples, size):
    if examples.are_random:
        return (
            f"on {size} random examples: give real ones with `--examples X.npz` for a "
            "check that means something"
        )
    return f"on {min(size, examples.count())} of the given examples"


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest absolute value."""
    if found.shape != expected.shape:
        return np.inf
    # Classes and strings are the same, or they are not.
    if found.dtype.kind not in "fc" or not found.size:
        return float(not np.array_equal(found, expected))
    # A subtraction would make NaN of two infinities, such as masked logits.
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(same, 0.0, np.abs(found.astype(float) - expected))
    finite = np.abs(expected[np.isfinite(expected)]).astype(float)
    scale = finite.max() if finite.size else 1.0
    worst = float(np.max(apart))
    return worst / (scale or 1.0) if np.isfinite(worst) else np.inf


def compare(
    triples: Iterable[tuple[str, np.ndarray, np.ndarray]], tolerance: float, what: str
) -> float:
    """The largest difference of (name, found, expected).

    Raises:
        ExportError: it is more than `tolerance`: `what`, in words, differ.
    """
    worst = 0.0
    for name, found, expected in triples:
        apart = difference(found, expected)
        if apart > tolerance:
            raise ExportError(
                f"{what} differ: {name} by {apart:.1e} of its scale, and {tolerance:.0e} "
                "is allowed"
            )
        worst = max(worst, apart)
    return worst


def _check_numbers(names, values):
    for name, value in zip(names, values):
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise ExportError(
                f"{name} is NaN for the examples: the checkpoint or the examples have "
                "values that are not finite; `python -m bn_tf1 doctor` names those of layers"
            )


def _by_itself(names, count, together, runs_alone, allowed):
    worst, checked = 0.0, 0
    for position, name in enumerate(names):
        output = together[position]
        if count < _ALONE or output.ndim == 0 or len(output) != count:
            continue
        checked += 1
        # An example that was made may give NaN, which is no scale.
        finite = (
            output[np.isfinite(output)] if output.dtype.kind in "fc" else np.ones(1)
        )
        scale = np.abs(finite).max() if finite.size else 1.0
        for index, run in enumerate(runs_alone):
            alone = run[position]
            if alone.shape[1:] != output.shape[1:] or len(alone) not in (1, count):
                raise BatchError(
                    f"{name} has shape {list(alone.shape)} for one example and "
                    f"{list(output.shape)} for {count}"
                )
            apart = difference(alone[0], output[index])
            if output.dtype.kind in "fc":
                own_scale = np.abs(output[index]).max() or 1.0
                apart = apart * own_scale / (scale or 1.0)
            if apart > allowed:
                raise ExportError(
                    f"the prediction for an example depends on the rest of its batch: "
                    f"{name} changes by {apart:.1e} of its scale when it is alone; a "
                    "layer still takes the statistics of the batch, or the batch is one "
                    "example in all, such as a sequence (`--batch whole`)"
                )
            worst = max(worst, float(apart))
    if not checked:
        return "no output has the batch on its first axis: it was not looked at"
    return f"a prediction depends on the rest of its batch by {worst:.1e} of the scale"


class BatchError(ExportError):
    """A model does not take every batch size."""
