"""One set of statistics as several banks of a layer, or one of several as the only one.

Contract: nothing is copied or changed; a checkpoint is given other names. The first bank is
called as a layer without banks, the others are below `bank_1`, `bank_2`, ... of it. To a
bank belong the moving statistics, what is kept beside and for them, and, where each bank
has its own, gamma and beta with their slots.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

import numpy as np

from bn_tf1.checkpoints import dialects
from bn_tf1.checkpoints.dialects import COUNTER, RENORM, STATISTICS, Layer, join
from bn_tf1.checkpoints.reader_writer import Checkpoint


class Renamed(NamedTuple):
    """A checkpoint under other names.

    Attributes:
        checkpoint: the checkpoint.
        sources: the name in the file by name in `checkpoint`.
        left_out: the names in the file that have none in `checkpoint`.
    """

    checkpoint: Checkpoint
    sources: Mapping[str, str]
    left_out: tuple[str, ...] = ()


class _RenamingReader(NamedTuple):
    reader: Any
    sources: Mapping[str, str]

    def get_tensor(self, name: str) -> np.ndarray:
        return self.reader.get_tensor(self.sources[name])


def spread_over_banks(
    checkpoint: Checkpoint, dialect: str, banks: int, *, bank_affine: bool
) -> Renamed:
    """`checkpoint` with the one set of each layer in the place of `banks` sets.

    Args:
        checkpoint: the checkpoint.
        dialect: key of `dialects.DIALECTS`: the library that wrote it.
        banks: how many.
        bank_affine: whether gamma and beta are among what is spread.

    Raises:
        ValueError: `banks` is less than 2, or a layer has several banks already.
    """
    if banks < 2:
        raise ValueError(f"`banks` is {banks}, but must be at least 2")
    owners = {}
    for layer in dialects.find_layers(checkpoint.shapes, dialect):
        if dialects.bank_of(layer.scope)[1]:
            raise ValueError(
                f"`banks` is {banks}, but {checkpoint.prefix} has {layer.scope!r} "
                "already: take one bank out first, with `bank`"
            )
        for name in _names_of_bank(layer, with_affine=bank_affine):
            owners[name] = layer.scope
    sources = {name: name for name in checkpoint.shapes}
    for name in checkpoint.shapes:
        prefix, variable, leaf = _owned(name, owners)
        if variable is not None:
            scope = owners[variable]
            rest = variable[len(scope) :].lstrip("/")
            for number in range(1, banks):
                own = join(prefix, scope, f"bank_{number}", rest, leaf)
                sources[own] = name
    return _renamed(checkpoint, sources)


def one_bank_of(checkpoint: Checkpoint, dialect: str, bank: int) -> Renamed:
    """`checkpoint` with one bank alone of each layer that has several.

    Raises:
        ValueError: there is no layer with several banks, or one has no such bank.
    """
    layers = {x.scope: x for x in dialects.find_layers(checkpoint.shapes, dialect)}
    numbers: dict[str, list[int]] = {}
    for scope in layers:
        base, number = dialects.bank_of(scope)
        if number and base in layers:
            numbers.setdefault(base, [0]).append(number)
    if not numbers:
        raise ValueError(
            f"`bank` is {bank}, but {checkpoint.prefix} has no layer of several banks"
        )
    owners = {}
    for base, known in numbers.items():
        if bank not in known:
            raise ValueError(
                f"`bank` is {bank}, but the layer {base!r} of {checkpoint.prefix} has the "
                f"banks {sorted(known)}"
            )
        with_affine = not {"gamma", "beta"}.isdisjoint(
            layers[join(base, f"bank_{max(known)}")].names
        )
        for number in known:
            scope = join(base, f"bank_{number}") if number else base
            for name in _names_of_bank(layers[scope], with_affine=with_affine):
                owners[name] = scope
    sources, left_out = {}, []
    for name in checkpoint.shapes:
        prefix, variable, leaf = _owned(name, owners)
        if variable is None:
            sources[name] = name
            continue
        base, number = dialects.bank_of(owners[variable])
        if number not in numbers.get(base, ()):
            base, number = owners[variable], 0
        if number != bank:
            left_out.append(name)
        else:
            rest = variable[len(owners[variable]) :].lstrip("/")
            sources[join(prefix, base, rest, leaf)] = name
    return _renamed(checkpoint, sources, left_out)


def _names_of_bank(layer: Layer, *, with_affine):
    roles = layer.names if with_affine else STATISTICS
    beside = [join(layer.scope, leaf) for leaf in (*RENORM, COUNTER)]
    return [layer.names[role] for role in roles] + beside


def _owned(name, owners):
    """(prefix, variable, leaf) of a variable of `owners` or its slot; else three None."""
    if name in owners:
        return "", name, ""
    slot = dialects.find_slot(name, owners)
    return (None, None, None) if slot is None else tuple(slot)


def _renamed(checkpoint, sources, left_out=()):
    named = checkpoint._replace(
        shapes={name: checkpoint.shapes[old] for name, old in sources.items()},
        dtypes={name: checkpoint.dtypes[old] for name, old in sources.items()},
        reader=_RenamingReader(checkpoint.reader, sources),
    )
    return Renamed(named, sources, tuple(left_out))
