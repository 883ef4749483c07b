"""Restores a checkpoint into a session and tells what was restored and what was not.

A `tf.train.Saver` over the wrong variables says nothing of the statistics that it left
out, and evaluation then normalises with a mean of 0 and a variance of 1. `restore`
takes everything that matches by name, reports the rest, and refuses to leave a moving
statistic behind unless it is told to.

Contract: everything is checked before anything is changed. No operation is added to the
graph, so that it works on a finalized one. Tensors are read one at a time.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import check_session
from bn_tf1.built_layers import batch_norm_calls
from bn_tf1.checkpoints import dialects
from bn_tf1.checkpoints.dialects import Shape
from bn_tf1.checkpoints.reader_writer import open_checkpoint


class WrongShape(NamedTuple):
    """A variable that was left alone since the checkpoint has it in another shape."""

    name: str
    variable_shape: Shape
    checkpoint_shape: Shape


class RestoreReport(NamedTuple):
    """What `restore` did; its str() says it in lines.

    Attributes:
        restored: names of the variables that were restored.
        missing: names of variables that the checkpoint does not have.
        unused: names in the checkpoint that no variable took.
        wrong_shape: variables that were left alone for their shape.
        initial_statistics: names of moving means that are 0 and moving variances that
            are 1 in every channel after the restore: probably never updated.
    """

    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    wrong_shape: tuple[WrongShape, ...]
    initial_statistics: tuple[str, ...]

    def __str__(self) -> str:
        shapes = [
            f"{w.name} {list(w.variable_shape)} (checkpoint: {list(w.checkpoint_shape)})"
            for w in self.wrong_shape
        ]
        lines = [f"restored: {len(self.restored)} variables"]
        for title, found in [
            ("missing in the checkpoint", self.missing),
            ("unused in the checkpoint", self.unused),
            ("not restored, wrong shape", shapes),
            ("statistics at their initial values", self.initial_statistics),
        ]:
            if found:
                lines.append(f"{title}: {', '.join(found)}")
        return "\n".join(lines)


class _Target(NamedTuple):
    """A variable, or a part of one, and where it lies in a tensor of the checkpoint."""

    variable: Any
    name: str
    shape: Shape
    slices: tuple[slice, ...]


def restore(
    session: tf.Session,
    checkpoint: str,
    *,
    variables: Sequence[Any] | None = None,
    name_map: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_wrong_shape: Sequence[str] = (),
    ema: str | None = None,
) -> RestoreReport:
    """Restores what matches by name, and reports.

    Args:
        session: a session on the graph of the variables. Variables that are not
            restored keep their values, or stay uninitialized.
        checkpoint: prefix or directory of a name-based checkpoint.
        variables: the variables to restore, by reference or by resource, parts of
            partitioned ones among them; all global variables by default.
        name_map: name of the variable by name in the checkpoint, of variables or of
            whole scopes: {"backbone": "encoder"}.
        allow_missing: patterns of names (`*` stands for anything, "/" included) of
            moving statistics, and of the numbers of their updates, that the checkpoint
            may lack. Other variables may always be missing; they are reported.
        allow_wrong_shape: patterns of names of variables that are left alone if the
            checkpoint has them in another shape.
        ema: the name of a `tf.train.ExponentialMovingAverage`, such as
            `dialects.AVERAGE`: a variable that has a shadow in the checkpoint takes its
            value. (Moving statistics belong to the weights that they were gathered
            with: without shadows of their own they are those of the others.)

    Returns:
        The `RestoreReport`.

    Raises:
        ValueError: moving statistics are missing, or a shape is wrong, without being
            allowed; a dtype is wrong; a pattern or a name in `name_map` fits nothing;
            two tensors are mapped to one name; `ema` is given, but no variable of the
            checkpoint has a shadow, or one has two.
        TypeError: `session` is none, `checkpoint` is no path, or a string is given
            instead of a list of patterns.
        CheckpointError: the checkpoint is missing, damaged or object-based.
    """
    check_session(session)
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(
            f"`checkpoint` is {checkpoint!r}, but must be the path of a checkpoint or "
            "of its directory; tf.train.latest_checkpoint gives None where there is none"
        )
    source = open_checkpoint(checkpoint)
    if variables is None:
        variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    statistics = _statistics(variables, session.graph)
    targets = [_target(variable) for variable in variables]
    old_names = _names_in_checkpoint(source, name_map or {}, ema)
    _check_patterns("allow_missing", allow_missing, targets)
    _check_patterns("allow_wrong_shape", allow_wrong_shape, targets)

    missing = [t for t in targets if t.name not in old_names]
    forbidden = [t for t in missing if not _matches(t.name, allow_missing)]
    _check_missing(forbidden, statistics, source.prefix)
    _check_counters(forbidden, statistics, source.prefix)
    found = [t for t in targets if t.name in old_names]
    wrong = [t for t in found if source.shapes[old_names[t.name]] != t.shape]
    _check_fit(found, wrong, old_names, allow_wrong_shape, source)

    restored = [t for t in found if t not in wrong]
    for target in restored:
        # One at a time: a checkpoint may be larger than what is left of the memory.
        value = source.read(old_names[target.name])[target.slices]
        # The variable's own initializer takes the value without a new operation.
        initializer = target.variable.initializer
        session.run(initializer, {initializer.inputs[1]: value})
    used = {old_names[target.name] for target in found}
    return RestoreReport(
        restored=_names(restored),
        missing=_names(missing),
        unused=_sorted(set(source.shapes) - used),
        wrong_shape=tuple(
            WrongShape(t.name, t.shape, source.shapes[old_names[t.name]]) for t in wrong
        ),
        initial_statistics=_at_initial_values(session, targets, statistics),
    )


def _target(variable):
    shape = tuple(variable.shape.as_list())
    # The slice is in a private attribute, and in the public message.
    definition = variable.to_proto()
    if not definition.HasField("save_slice_info_def"):
        return _Target(variable, variable.op.name, shape, (Ellipsis,))
    # A partitioned variable is saved as one tensor, under the name without "part_0".
    part = definition.save_slice_info_def
    slices = tuple(
        slice(start, start + size)
        for start, size in zip(part.var_offset, part.var_shape)
    )
    return _Target(variable, part.full_name, tuple(part.full_shape), slices)


def _statistics(variables, graph):
    """Role by variable name of the moving statistics among `variables`."""
    statistics = {}
    # Those of our own layers are known, however a custom getter called them.
    for call in batch_norm_calls(graph):
        for role in dialects.STATISTICS:
            statistics[getattr(call, role).op.name] = role
    for variable in variables:
        role = dialects.statistic_role(variable.op.name)
        if role is not None:
            statistics[variable.op.name] = role
    return statistics


def _names_in_checkpoint(source, name_map, ema):
    """Name in the checkpoint by name in the graph."""
    dialects.check_name_map(name_map, source.shapes, f"in {source.prefix}")
    old_names = {}
    for old in sorted(source.shapes):
        new = dialects.rename(old, name_map)
        if new in old_names:
            raise ValueError(
                f"`name_map` gives {old_names[new]!r} and {old!r} one name: {new!r}"
            )
        old_names[new] = old
    if ema is None:
        return old_names
    try:
        shadows = dialects.find_shadows(source.shapes, ema)
    except ValueError as error:
        raise ValueError(f"`ema` is {ema!r}, but in {source.prefix} {error}") from error
    # Last: a shadow takes the place of the variable's own value.
    for variable, shadow in shadows.items():
        old_names[dialects.rename(variable, name_map)] = shadow
    return old_names


def _check_patterns(argument, patterns, targets):
    # A string is a list of patterns, too: one of each letter.
    if isinstance(patterns, str):
        raise TypeError(f"`{argument}` is {patterns!r}, but must be a list of patterns")
    for pattern in patterns:
        if not any(_matches(target.name, [pattern]) for target in targets):
            raise ValueError(f"`{argument}` has {pattern!r}, which fits no variable")


def _matches(name, patterns):
    # fnmatch by itself takes upper for lower case on some systems.
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_missing(missing, statistics, prefix):
    # A part of a partitioned statistic is known by its own name.
    lost = [t.name for t in missing if t.variable.op.name in statistics]
    if lost:
        translate = "translate it with `python -m bn_tf1 convert`"
        if any(dialects.bank_of(name.rpartition("/")[0])[1] for name in lost):
            translate = "spread its one set over all banks with `python -m bn_tf1 convert --banks`"
        raise ValueError(
            f"{prefix} lacks the moving statistics {', '.join(_sorted(lost))}: "
            f"map them with `name_map`, {translate}, or allow them in `allow_missing`"
        )


def _check_counters(missing, statistics, prefix):
    """Where averages are restored without the number of updates that weighs them."""
    scopes = {name.rpartition("/")[0] for name in statistics}
    lost = []
    for target in missing:
        name = target.variable.op.name
        scope, _, leaf = name.rpartition("/")
        is_counter = leaf == dialects.COUNTER and scope in scopes
        if leaf in dialects.ZERO_DEBIAS:
            is_counter = dialects.find_slot(name, statistics) is not None
        if is_counter:
            lost.append(target.name)
    if lost:
        raise ValueError(
            f"{prefix} lacks {', '.join(_sorted(lost))}, by which an average weighs "
            "what it has: from 0 on, the first update would replace the statistics. Allow "
            'it in `allow_missing`, such as ["*/num_updates"], to begin the averages anew, '
            "or build the layers with the decay, and zero_debias, that they were trained with"
        )


def _check_fit(found, wrong, old_names, allowed, source):
    for target in wrong:
        if not _matches(target.name, allowed):
            raise ValueError(
                f"{target.name} has shape {list(target.shape)}, but in {source.prefix} "
                f"{list(source.shapes[old_names[target.name]])}: translate it with "
                "`python -m bn_tf1 convert`, or allow it in `allow_wrong_shape`"
            )
    # A feed would be cast without a word: float64 weights would lose half their digits.
    for target in found:
        dtype = source.dtypes[old_names[target.name]]
        if dtype != target.variable.dtype.base_dtype:
            raise ValueError(
                f"{target.name} has dtype {target.variable.dtype.base_dtype.name}, but "
                f"in {source.prefix} {dtype.name}"
            )


def _at_initial_values(session, targets, statistics):
    found = []
    for target in targets:
        role = statistics.get(target.variable.op.name)
        if role is None:
            continue
        # One that is missing, which was allowed, may not be initialized.
        with contextlib.suppress(tf.errors.FailedPreconditionError):
            value = session.run(target.variable)
            if np.all(value == dialects.INITIAL_VALUES[role]):
                found.append(target)
    return _names(found)


def _names(targets):
    return _sorted({target.name for target in targets})


def _sorted(found):
    return tuple(sorted(found, key=dialects.natural_key))
