"""Translates a checkpoint from the names and shapes of one library to another's.

What changes is the variables of batch-norm layers, and with them what an optimizer or
an average keeps for them (see `dialects.find_slot`); all other tensors pass through bit
for bit. Nothing is written over anything, and the result is compared with its source.

A gamma that the source lacks becomes 1 and a missing beta 0, where a layer of the
target has one: as `like` tells, or else by the target's default. No slots are made for
them. A gamma of 1 or a beta of 0 that the layer of `like` lacks is left out. Whatever
else the target cannot hold, and what could be meant in two ways, is an error that lists
the names.

`like` also settles drifting numbers (`batch_normalization_3` against `_5`). Layers whose
scopes differ in such numbers only are matched in the order of the numbers, if they are
as many on both sides and have the same channels one by one. Any other layer needs a
counterpart that is the only one with its channels, or an entry in `name_map`.

A layer written by hand has names that no library knows: `name_map` gives each of its
variables the name that it has in the target (`bn/pop_mean` -> `bn/moving_mean`). With
`ema` the variables take the values of their weight average; their own are left out, and
all shadows stay.
"""

from __future__ import annotations

import collections
import fnmatch
import os
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from bn_tf1.checkpoints import bank_names, dialects, reader_writer
from bn_tf1.checkpoints.dialects import (
    DIALECTS,
    HAND_WRITTEN,
    INITIAL_VALUES,
    NO_DIALECTS,
    Layer,
    Shape,
)
from bn_tf1.checkpoints.reader_writer import Checkpoint, Entry


class ConversionError(ValueError):
    """A conversion that would be ambiguous, would lose something or is impossible."""


class Row(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        old: its name in the source, None for one that is made.
        new: its name in the result, None for one that is left out.
        shape: its shape in the result (in the source for one that is left out).
        note: what happens besides the renaming, or "".
    """

    old: str | None
    new: str | None
    shape: Shape
    note: str = ""


class Conversion(NamedTuple):
    """What `convert` did, or would do; its str() is a table.

    Attributes:
        rows: one `Row` for each tensor.
        unmatched: layers of `like` that the source has no layer for.
    """

    rows: tuple[Row, ...]
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("old name", "new name", "shape", "note")
        cells = [header] + [
            (row.old or "-", row.new or "-", str(list(row.shape)), row.note)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
            for line in cells
        ]
        lines += [f"not in the source: layer {scope}" for scope in self.unmatched]
        return "\n".join(lines)


class _Target(NamedTuple):
    """A batch-norm layer of the source, and as it shall be in the result."""

    layer: Layer
    names: Mapping[str, str]
    shape: Shape


def convert(
    source: str,
    destination: str,
    *,
    from_dialect: str,
    to_dialect: str,
    name_map: Mapping[str, str] | None = None,
    like: str | None = None,
    shape: str | None = None,
    drop: Sequence[str] = (),
    ema: str | None = None,
    banks: int | None = None,
    bank: int | None = None,
    bank_affine: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Writes the checkpoint `source` as `to_dialect` names and shapes it.

    Args:
        source: prefix or directory of a name-based checkpoint.
        destination: prefix of the checkpoint to write; nothing may be there.
        from_dialect: key of `dialects.DIALECTS`: the library that wrote `source`; or
            `HAND_WRITTEN`, where all layers are named in `name_map`.
        to_dialect: key of `dialects.DIALECTS`: the library that will read the result.
        name_map: new name by old name, of variables or of whole scopes. Variables that
            get the names of a moving mean and variance of `to_dialect` become a layer,
            with the gamma and beta that are named beside them.
        like: a checkpoint or a .meta file with the target's layers: gives their
            scopes, shapes and whether they have a gamma and a beta.
        shape: for `to_dialect="sonnet"`, such as "1,1,1,C": the shape of a layer's
            variables. Needed without `like`: [C] does not tell the rank of the input.
        drop: patterns of names to leave out (`*` stands for anything, "/" included),
            such as state that the target cannot hold.
        ema: the name of a `tf.train.ExponentialMovingAverage`, such as
            `dialects.AVERAGE`: each variable that has a shadow takes its value.
        banks: spreads the statistics of each layer over so many banks (`batch_norm`); a
            `like` must have them, too.
        bank: takes this bank out, in the place of all of a layer.
        bank_affine: with `banks`, whether each bank gets a gamma and a beta of its own.
        dry_run: plan everything, write nothing.

    Returns:
        The `Conversion`: one row for each tensor.

    Raises:
        ValueError: an argument is outside of what is said above.
        ConversionError: no layer of `from_dialect` is in `source`, or no shadow of
            `ema`; two tensors would get one name; a layer has no or several
            counterparts in `like`; a layer has state that the target does not have.
        CheckpointError: a file is missing, damaged, in the way, or not written right.
    """
    _check_arguments(from_dialect, to_dialect, shape)
    checkpoint = file = reader_writer.open_checkpoint(source)
    # What is in the way is told before the work, and again when it is written.
    reader_writer.check_new(destination)
    checkpoint, dropped = _without_dropped(checkpoint, drop)
    # From here on names are those among the banks; in the file they may be others.
    checkpoint, sources, others = _with_banks(
        checkpoint, from_dialect, banks, bank, bank_affine
    )
    shadows = _shadows(checkpoint, ema)
    moves = _checked_map(name_map or {}, checkpoint)
    layers = _source_layers(checkpoint, moves, from_dialect, to_dialect)
    reference, unmatched = None, ()
    if like is not None:
        reference = _reference_layers(like, to_dialect)
        scopes, unmatched = _match_layers(layers, moves, reference)
        moves.update(scopes)
    targets = [_target(x, moves, reference, to_dialect, shape) for x in layers]
    _check_dropped(checkpoint, sources, targets, shadows)
    rows = [_promoted(row, shadows) for row in _rows(checkpoint, targets, moves)]
    _check_unique(rows)
    rows = [row._replace(old=sources.get(row.old, row.old)) for row in rows]
    if not dry_run:
        entries = _entries(rows, file, checkpoint, targets)
        reader_writer.write_checkpoint(destination, file, entries)
    return Conversion((*rows, *dropped, *others), unmatched)


# ------------------------------------------------------------------------------ what is given


def _check_arguments(from_dialect, to_dialect, shape):
    for argument, dialect, known in [
        ("from_dialect", from_dialect, sorted([*DIALECTS, HAND_WRITTEN])),
        ("to_dialect", to_dialect, sorted(DIALECTS)),
    ]:
        if dialect not in known:
            reason = NO_DIALECTS.get(str(dialect).lower())
            raise ValueError(
                f"`{argument}` is {dialect!r}, but must be one of {known}"
                + (f": `convert` {reason}" if reason else "")
            )
    if shape is None:
        return
    if not DIALECTS[to_dialect].keeps_rank:
        raise ValueError(
            f"`shape` is {shape!r}, but is for `to_dialect` 'sonnet' only: "
            f"{to_dialect!r} has variables of shape [C]"
        )
    sizes = shape.split(",")
    if sizes.count("C") != 1 or set(sizes) - {"1", "C"}:
        raise ValueError(f"`shape` is {shape!r}, but must be 1s and one C: '1,1,1,C'")


def _without_dropped(checkpoint, patterns):
    """The checkpoint without the names in `drop`, and their rows."""
    dropped = []
    for pattern in patterns:
        # A misspelt pattern would keep what somebody meant to lose.
        matching = fnmatch.filter(checkpoint.shapes, pattern)
        if not matching:
            raise ValueError(
                f"`drop` has {pattern!r}, which fits no name in {checkpoint.prefix}"
            )
        dropped += matching
    rows = _left_out(checkpoint, set(dropped), "in `drop`")
    kept = {n: shape for n, shape in checkpoint.shapes.items() if n not in dropped}
    return checkpoint._replace(shapes=kept), rows


def _left_out(checkpoint, names, why):
    return [
        Row(name, None, checkpoint.shapes[name], f"left out: {why}")
        for name in sorted(names, key=dialects.natural_key)
    ]


def _with_banks(checkpoint, dialect, banks, bank, bank_affine):
    """The checkpoint with other names, its names in the file, and rows of what has none."""
    if (banks, bank, bank_affine) == (None, None, False):
        return checkpoint, {}, []
    if dialect == HAND_WRITTEN:
        raise ValueError(
            f"`from_dialect` is {HAND_WRITTEN!r}, but with `banks` or `bank` must be a "
            "library: convert to one first"
        )
    if (banks is None) == (bank is None) or (bank_affine and banks is None):
        raise ValueError(
            f"`banks` is {banks}, `bank` {bank} and `bank_affine` {bank_affine}, but either "
            "`banks` spreads one set, with `bank_affine` or without, or `bank` takes one out"
        )
    if bank is not None:
        sources = bank_names.one_bank_of(checkpoint, dialect, bank)
    else:
        sources = bank_names.spread_over_banks(
            checkpoint, dialect, banks, bank_affine=bank_affine
        )
    named = checkpoint._replace(
        shapes={name: checkpoint.shapes[old] for name, old in sources.items()},
        dtypes={name: checkpoint.dtypes[old] for name, old in sources.items()},
    )
    others = set(checkpoint.shapes).difference(sources.values())
    return named, sources, _left_out(checkpoint, others, "of another bank")


def _shadows(checkpoint, ema):
    """Name of the shadow by name of the variable that takes its value."""
    if ema is None:
        return {}
    try:
        return dialects.find_shadows(checkpoint.shapes, ema)
    except ValueError as error:
        raise ConversionError(
            f"`ema` is {ema!r}, but in {checkpoint.prefix} {error}"
        ) from error


def _checked_map(name_map, checkpoint):
    dialects.check_name_map(name_map, checkpoint.shapes, "of the checkpoint")
    for old, new in name_map.items():
        if not new:
            raise ValueError(f"`name_map` maps {old!r} to an empty name")
    return dict(name_map)


def _adopted_layers(checkpoint, moves, from_dialect, to_dialect):
    """The layers that `name_map` makes of variables with names of no library.

    Their scopes are the new ones, their names the old ones.
    """
    # A scope in `name_map` is moved, and makes no layer.
    named = {new: old for old, new in moves.items() if old in checkpoint.shapes}
    if from_dialect != HAND_WRITTEN:
        known = dialects.find_layers(checkpoint.shapes, from_dialect)
        taken = {name for layer in known for name in layer.names.values()}
        # A layer that the library's names make already is moved as a whole.
        named = {new: old for new, old in named.items() if old not in taken}
    shapes = {new: checkpoint.shapes[old] for new, old in named.items()}
    try:
        found = dialects.find_layers(shapes, to_dialect)
    except ValueError as error:
        raise ConversionError(
            f"with the names that `name_map` gives, {error}"
        ) from None
    return [
        layer._replace(names={role: named[new] for role, new in layer.names.items()})
        for layer in found
    ]


def _source_layers(checkpoint, moves, from_dialect, to_dialect):
    """The layers to be converted; the scopes of those that a map makes go to `moves`."""
    adopted = _adopted_layers(checkpoint, moves, from_dialect, to_dialect)
    if from_dialect == HAND_WRITTEN:
        own, keeps_rank = [], False
    else:
        own = dialects.find_layers(checkpoint.shapes, from_dialect)
        keeps_rank = DIALECTS[from_dialect].keeps_rank
    layers = own + adopted
    if not layers:
        raise ConversionError(_why_no_layer(checkpoint, from_dialect, to_dialect))
    # The names alone are also those of other libraries.
    flat = [layer.scope for layer in own if keeps_rank and len(layer.shape) < 2]
    if flat:
        raise ConversionError(
            f"`from_dialect` (--from) is {from_dialect!r}, but the variables of layers "
            f"{flat} in {checkpoint.prefix} have shape [C], as no layer of it has: say "
            "which library wrote it"
        )
    lost = dialects.lost_state(checkpoint.shapes, layers, to_dialect)
    if lost:
        raise ConversionError(
            f"layers of {to_dialect!r} cannot hold {', '.join(lost)} of "
            f"{checkpoint.prefix}; name them in `drop` to lose them"
        )
    # Their scopes are those of the target already.
    moves.update((layer.scope, layer.scope) for layer in adopted)
    return layers


def _why_no_layer(checkpoint, from_dialect, to_dialect):
    if from_dialect == HAND_WRITTEN:
        return (
            f"`from_dialect` is {HAND_WRITTEN!r}, but `name_map` (--map) names no "
            "layer: give each variable of one its name in the target, such as "
            + " ".join(f"OLD=bn/{n}" for n in DIALECTS[to_dialect].leaves.values())
        )
    # Most often the wrong library was named.
    found = [d for d in DIALECTS if dialects.find_layers(checkpoint.shapes, d)]
    others = f", but of {found}"
    if not found:
        others = (
            " nor of any other dialect; name the variables of layers that were written "
            "by hand in `name_map` (--map)"
        )
    return f"{checkpoint.prefix} has no batch-norm layer of {from_dialect!r}{others}"


def _reference_layers(like, dialect):
    # A graph is there before its first checkpoint, and tells of layers as much.
    if os.fspath(like).endswith(".meta"):
        meta = reader_writer.read_meta_graph(like)
        shapes = reader_writer.graph_variables(meta.graph_def)
    else:
        shapes = reader_writer.open_checkpoint(like).shapes
    layers = dialects.find_layers(shapes, dialect)
    if not layers:
        raise ConversionError(f"`like` {like} has no batch-norm layer of {dialect!r}")
    return {layer.scope: layer for layer in layers}


# ---------------------------------------------------------------- which layer becomes which


def _match_layers(layers, moves, reference):
    """New scope by old scope, and the scopes of `like` that are in no pair."""
    scopes = {}
    sources = {}
    targets = dict(reference)
    for layer in layers:
        moved = dialects.rename(layer.scope, moves)
        is_mapped = moved != layer.scope or layer.scope in moves
        # What somebody mapped comes first, and leaves less to be guessed.
        if is_mapped and moved in targets:
            _check_channels(layer, targets.pop(moved))
            scopes[layer.scope] = moved
        else:
            sources[layer.scope] = layer

    remaining = _match_by_order(sources, targets, scopes)
    for scope, layer in remaining.items():
        candidates = _with_channels(targets, layer.channels)
        rivals = _with_channels(remaining, layer.channels)
        if len(candidates) != 1 or len(rivals) != 1:
            raise ConversionError(
                f"layer {scope!r} with {layer.channels} channels has no single "
                f"counterpart in `like`: candidates are {candidates}, for the layers "
                f"{rivals}; say which in `name_map` (--map)"
            )
        (scopes[scope],) = candidates
    unmatched = sorted(set(targets) - set(scopes.values()), key=dialects.natural_key)
    return scopes, tuple(unmatched)


def _match_by_order(sources, targets, scopes):
    """Adds to `scopes`, takes from `targets`; returns the layers without a group."""
    remaining = {}
    target_groups = _groups(targets)
    for base, group in _groups(sources).items():
        # Numbers drift where other layers are built before these; the order stays.
        candidates = target_groups.get(base, [])
        if not candidates:
            remaining.update((scope, sources[scope]) for scope in group)
        elif len(candidates) != len(group):
            raise ConversionError(
                f"{len(group)} layers {group} cannot be matched by order with "
                f"{len(candidates)} layers of `like`: candidates are {candidates}; say "
                "which in `name_map` (--map)"
            )
        else:
            for scope, target in zip(group, candidates):
                _check_channels(sources[scope], targets.pop(target))
                scopes[scope] = target
    return remaining


def _groups(layers):
    groups = collections.defaultdict(list)
    # TensorFlow numbers layers as they are built: batch_normalization_10 after _9.
    for scope in sorted(layers, key=dialects.natural_key):
        groups[dialects.unnumbered(scope)].append(scope)
    return groups


def _with_channels(layers, channels):
    return [scope for scope, layer in layers.items() if layer.channels == channels]


def _check_channels(layer, target):
    if layer.channels != target.channels:
        raise ConversionError(
            f"layer {layer.scope!r} has {layer.channels} channels, but its counterpart "
            f"{target.scope!r} in `like` has {target.channels}; say in `name_map` (--map) which "
            "one is meant"
        )


# --------------------------------------------------------------------- what a layer becomes


def _target(layer, moves, reference, to_dialect, shape):
    dialect = DIALECTS[to_dialect]
    scope = dialects.rename(layer.scope, moves)
    model = None if reference is None else reference[scope]
    if model is None:
        # What the banks of a layer share is there once.
        is_further_bank = dialects.bank_of(layer.scope)[1] > 0
        roles = set(layer.names) | set(() if is_further_bank else dialect.defaults)
    else:
        roles = set(model.names)
    return _Target(
        layer,
        names={
            role: dialects.join(scope, dialect.leaves[role])
            for role in dialects.ROLES
            if role in roles
        },
        shape=_target_shape(layer, model, to_dialect, shape),
    )


def _target_shape(layer: Layer, model: Layer | None, to_dialect: str, shape) -> Shape:
    if model is not None:
        return model.shape
    if not DIALECTS[to_dialect].keeps_rank:
        return (layer.channels,)
    if shape is not None:
        return tuple(layer.channels if n == "C" else 1 for n in shape.split(","))
    if len(layer.shape) > 1:  # it keeps the rank, too
        return layer.shape
    raise ConversionError(
        f"layer {layer.scope!r} has shape {list(layer.shape)}, which does not tell the "
        f"rank that {to_dialect!r} keeps: give `shape`, such as '1,1,1,C', or `like`"
    )


def _check_dropped(checkpoint: Checkpoint, sources, targets, shadows):
    """A gamma of 1 and a beta of 0 say nothing; anything else would be lost."""
    lost = [
        (name, role)
        for target in targets
        for role, name in sorted(target.layer.names.items())
        if role not in target.names
    ]
    for name, role in lost:
        slots = [n for n in checkpoint.shapes if dialects.find_slot(n, [name])]
        taken = shadows.get(name, name)
        value = checkpoint.read(sources.get(taken, taken))
        if slots or np.any(value != INITIAL_VALUES[role]):
            raise ConversionError(
                f"the layer in `like` has no {role}, so that "
                f"{', '.join([name] + slots)} would be lost"
            )


# ------------------------------------------------------------------------- the whole table


def _rows(checkpoint, targets, moves):
    renamed = _new_names(checkpoint.shapes, targets, moves)
    reshaped = {
        name: target.shape for target in targets for name in target.layer.names.values()
    }
    rows = []
    for old in sorted(checkpoint.shapes, key=dialects.natural_key):
        shape, note = checkpoint.shapes[old], ""
        slot = dialects.find_slot(old, reshaped)
        owner = old if slot is None else slot.variable
        if renamed[old] is None:
            note = "left out: its initial value"
        # A slot of another shape than its variable's, such as a counter, keeps it.
        elif owner in reshaped and shape == checkpoint.shapes[owner]:
            if shape != reshaped[owner]:
                note = f"reshaped from {list(shape)}"
            shape = reshaped[owner]
        rows.append(Row(old, renamed[old], shape, note))
    for target, role, name in _filled(targets):
        note = f"filled with {INITIAL_VALUES[role]:g}"
        rows.append(Row(None, name, target.shape, note))
    return rows


def _filled(targets):
    """(target, role, new name) of each variable that the source lacks."""
    for target in targets:
        for role, name in target.names.items():
            if role not in target.layer.names:
                yield target, role, name


def _promoted(row, shadows):
    """The row of a variable that takes the value of its shadow."""
    if row.new is None or row.old not in shadows:
        return row
    note = ", ".join(filter(None, (f"the average of {row.old}", row.note)))
    return row._replace(old=shadows[row.old], note=note)


def _new_names(shapes, targets, moves):
    """New name by old name; None for a variable that is left out."""
    renamed = {
        name: target.names.get(role)
        for target in targets
        for role, name in target.layer.names.items()
    }

    def new_name(old):
        # Of any tensor, and so also of another slot: an average of a Momentum.
        slot = dialects.find_slot(old, shapes)
        if old in renamed:
            return renamed[old]
        # A slot follows its variable, unless it is mapped itself.
        if slot is None or old in moves or new_name(slot.variable) is None:
            return dialects.rename(old, moves)
        prefix = dialects.rename(slot.prefix, moves)
        return dialects.join(prefix, new_name(slot.variable), slot.leaf)

    return {name: new_name(name) for name in shapes}


def _check_unique(rows):
    old_names = collections.defaultdict(list)
    for row in rows:
        if row.new is not None:
            old_names[row.new].append(row.old or row.note)
    for new, old in old_names.items():
        if len(old) > 1:
            raise ConversionError(f"{', '.join(old)} would all be named {new}")


def _entries(rows, file, checkpoint, targets):
    entries = [
        Entry(row.new, row.shape, file.dtypes[row.old], row.old)
        for row in rows
        if row.new is not None and row.old is not None
    ]
    for target, role, name in _filled(targets):
        # In the dtype of the layer's own: a float64 network stays one.
        dtype = checkpoint.dtypes[target.layer.names["moving_mean"]]
        fill = INITIAL_VALUES[role]
        entries.append(Entry(name, target.shape, dtype, None, fill))
    return entries
