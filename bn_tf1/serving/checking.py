"""What must hold of a model before it is written, on examples.

    as before       the outputs are those of the graph before, in inference mode
    repeatable      two runs give the same
    by itself       a prediction does not depend on the rest of its batch
    folded          folding changed nothing but the rounding

Differences are shares of the largest absolute value of an output.
"""

from __future__ import annotations

import os
from typing import Any, Mapping, NamedTuple, Sequence
from zipfile import BadZipFile

import numpy as np

from bn_tf1.graphs.rewriting.editable_graph import EditableGraph, canonical
from bn_tf1.graphs.rewriting.graph_interface import Candidate
from bn_tf1.serving.isolated_run import Isolated, IsolatedError
from bn_tf1.serving.preparing import ExportError, Model

# What TensorFlow's own kernels differ by with another order of summation.
TOLERANCE = 1e-5
_FOLDED_TOLERANCE = 1e-4
_BATCH_TOLERANCE = 1e-4
_NO_ARRAYS = (OSError, ValueError, AttributeError, TypeError, EOFError, BadZipFile)
_ROUNDING = 2e-7
_AMPLIFIED = 30
_MOST_ALLOWED = 1e-2
_EXAMPLES = 4
_SINGLES = 2
_GUESSED_SIZES = {4: 64, 5: 16, 3: 16, 2: 16}


class Examples(NamedTuple):
    """What a model is checked on.

    Attributes:
        arrays: by name of the input, each with the examples on its first axis.
        are_random: whether nobody gave them.
    """

    arrays: Mapping[str, np.ndarray]
    are_random: bool

    def batch(self, size: int) -> dict[str, np.ndarray]:
        """The first `size` examples, from the beginning again where they are fewer."""
        return {
            name: array
            if array.ndim == 0
            else np.take(array, np.arange(size) % max(len(array), 1), axis=0)
            for name, array in self.arrays.items()
        }

    def single(self, index: int) -> dict[str, np.ndarray]:
        """One example, as a batch of its own."""
        return {
            name: array if array.ndim == 0 else array[index : index + 1]
            for name, array in self.batch(index + 1).items()
        }


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
        with np.load(os.fspath(given), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    # An array without names, or what is no archive at all.
    except _NO_ARRAYS as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise ExportError(f"{given} cannot be read as .npz: {reason}") from error


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
) -> Measured:
    """Runs a model, and what it was made of, and compares them.

    Args:
        model: the model.
        unfolded: its graph before folding, or None.
        examples: what it is given.
        isolated: runs them.

    Raises:
        ExportError: something does not hold.
    """
    size = model.batch_size or _EXAMPLES
    full = examples.batch(size)
    is_fixed = any(c.shape and c.shape[0] for c in model.inputs) or any(
        c.shape and c.shape[0] and c.shape[0] == model.batch_size for c in model.outputs
    )
    singles = [] if is_fixed else [examples.single(i) for i in range(_SINGLES)]
    _, outputs = model.names()
    feeds = [full, full, _nudged(full), *singles]
    isolated.run("frozen", _bytes(model.graph), feeds, outputs)
    if unfolded is not None:
        isolated.run("frozen", _bytes(unfolded), [full], outputs)
    if model.before is not None:
        isolated.run("frozen", _bytes(model.before), [full, full], outputs)
    try:
        own, *others = isolated.results()
    except IsolatedError as error:
        raise ExportError(str(error)) from error
    if isinstance(own, IsolatedError):
        raise ExportError(str(own)) from own
    notes = [_examples_note(examples, size), _repeatable(outputs, own)]
    # A network that amplifies the rounding of its input amplifies that of its layers.
    rounding = max(difference(a, b) for a, b in zip(own[2], own[0]))
    rounding = min(_AMPLIFIED * rounding, _MOST_ALLOWED)
    if model.before is not None:
        notes.append(_as_before(outputs, own[0], others.pop(), rounding))
    else:
        notes.append("the graph before had no inference mode: there is no comparison")
    if others:
        notes.append(_as_unfolded(outputs, own[0], others.pop(), rounding))
    if singles:
        notes.append(_by_itself(outputs, own[0], own[3:], size, rounding))
    return Measured(full, own[0], tuple(notes))


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


def _bytes(graph):
    return graph.portable_graph_def().SerializeToString()


def _examples_note(examples, size):
    if examples.are_random:
        return (
            f"on {size} random examples: give real ones with `--examples X.npz` for a "
            "check that means something"
        )
    return f"on {size} of the given examples"


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest absolute value."""
    if found.shape != expected.shape:
        return np.inf
    if found.dtype.kind not in "fc" or not found.size:
        return float(not np.array_equal(found, expected))
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(same, 0.0, np.abs(found.astype(float) - expected))
    finite = np.abs(expected[np.isfinite(expected)]).astype(float)
    scale = finite.max() if finite.size else 1.0
    worst = float(np.max(apart))
    return worst / (scale or 1.0) if np.isfinite(worst) else np.inf


def _compared(names, found, expected, tolerance, what):
    worst = 0.0
    for name, a, b in zip(names, found, expected):
        apart = difference(a, b)
        if apart > tolerance:
            raise ExportError(
                f"{what} differ: {name} by {apart:.1e} of its scale, and {tolerance:.0e} "
                "is allowed"
            )
        worst = max(worst, apart)
    return worst


def _repeatable(names, own):
    for name, first, second in zip(names, own[0], own[1]):
        apart = difference(first, second)
        if apart > TOLERANCE:
            raise ExportError(
                f"two runs on the same examples differ: {name} by {apart:.1e} of its scale"
            )
    return "two runs give the same"


def _as_before(names, own, before, rounding):
    if isinstance(before, IsolatedError):
        return f"the graph before could not be run: there is no comparison ({before})"
    if any(difference(a, b) > TOLERANCE for a, b in zip(*before)):
        return "the graph before draws random numbers: there is no comparison"
    allowed = max(TOLERANCE, rounding)
    what = "the outputs and those of the graph before"
    worst = _compared(names, own, before[0], allowed, what)
    return f"the outputs are those of the graph before, to {worst:.1e} of their scale"


def _as_unfolded(names, own, unfolded, rounding):
    if isinstance(unfolded, IsolatedError):
        raise ExportError(str(unfolded)) from unfolded
    allowed = max(_FOLDED_TOLERANCE, rounding)
    worst = _compared(
        names, own, unfolded[0], allowed, "the outputs of the folded graph"
    )
    return f"folding changed the outputs by {worst:.1e} of their scale"


def _by_itself(names, full, singles, size, rounding):
    worst, checked = 0.0, 0
    for position, name in enumerate(names):
        output = full[position]
        if output.ndim == 0 or len(output) != size:
            continue
        checked += 1
        scale = np.abs(output).max() if output.dtype.kind in "fc" else 1.0
        for index, single in enumerate(singles):
            alone = single[position]
            if alone.shape[1:] != output.shape[1:] or len(alone) != 1:
                raise BatchError(
                    f"{name} has shape {list(alone.shape)} for one example and "
                    f"{list(output.shape)} for {size}"
                )
            apart = difference(alone[0], output[index])
            if output.dtype.kind in "fc":
                own_scale = np.abs(output[index]).max() or 1.0
                apart = apart * own_scale / (scale or 1.0)
            if apart > max(_BATCH_TOLERANCE, rounding):
                raise ExportError(
                    f"the prediction for an example depends on the rest of its batch: "
                    f"{name} changes by {apart:.1e} of its scale when it is alone; a "
                    "layer still takes the statistics of the batch"
                )
            worst = max(worst, float(apart))
    if not checked:
        return "no output has the batch on its first axis: it was not looked at"
    return f"a prediction depends on the rest of its batch by {worst:.1e} of the scale"


class BatchError(ExportError):
    """A model does not take every batch size."""
