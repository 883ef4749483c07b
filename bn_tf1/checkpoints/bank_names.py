"""One set of statistics as several banks of a layer, or one of several as the only one.

Contract: nothing is copied or changed; what is answered is names: by name in the result,
the name in the file. The first bank is called as a layer without banks, the others are below
`bank_1`, `bank_2`, ... of it. To a bank belong the moving statistics, what is kept beside
and for them, and, where each bank has its own, gamma and beta with their slots.
"""

from __future__ import annotations

from bn_tf1.checkpoints import dialects
from bn_tf1.checkpoints.dialects import (
    COUNTER,
    RENORM,
    STATISTICS,
    Layer,
    Slot,
    join,
)
from bn_tf1.checkpoints.reader_writer import Checkpoint


def spread_over_banks(
    checkpoint: Checkpoint, dialect: str, banks: int, *, bank_affine: bool
) -> dict[str, str]:
    """Names with the one set of each layer in the place of `banks` sets.

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
        slot = _owned(name, owners)
        if slot is not None:
            scope = owners[slot.variable]
            # The first bank keeps the names of the one set.
            for number in range(1, banks):
                sources[_moved(slot, scope, join(scope, f"bank_{number}"))] = name
    return sources


def one_bank_of(checkpoint: Checkpoint, dialect: str, bank: int) -> dict[str, str]:
    """Names with one bank alone of each layer that has several.

    Raises:
        ValueError: there is no layer with several banks, or one has no such bank.
    """
    layers = {x.scope: x for x in dialects.find_layers(checkpoint.shapes, dialect)}
    numbers: dict[str, list[int]] = {}
    for scope in layers:
        base, number = dialects.bank_of(scope)
        # A scope bank_1 that is in no layer is a layer of that name.
        if number and base in layers:
            numbers.setdefault(base, [0]).append(number)
    if not numbers:
        raise ValueError(
            f"`bank` is {bank}, but {checkpoint.prefix} has no layer of several banks"
        )
    # The layer and the bank by the name of a variable of a bank.
    owners = {}
    for base, known in numbers.items():
        if bank not in known:
            raise ValueError(
                f"`bank` is {bank}, but the layer {base!r} of {checkpoint.prefix} has the "
                f"banks {sorted(known)}"
            )
        scopes = {n: join(base, f"bank_{n}") if n else base for n in known}
        # The first bank is where those that are shared stand: a further one tells.
        further = layers[scopes[max(known)]].names
        with_affine = "gamma" in further or "beta" in further
        for number, scope in scopes.items():
            for name in _names_of_bank(layers[scope], with_affine=with_affine):
                owners[name] = (base, scope, number)
    sources = {}
    for name in checkpoint.shapes:
        slot = _owned(name, owners)
        if slot is None:
            sources[name] = name
        else:
            base, scope, number = owners[slot.variable]
            if number == bank:
                sources[_moved(slot, scope, base)] = name
    return sources


def _names_of_bank(layer: Layer, *, with_affine):
    roles = layer.names if with_affine else STATISTICS
    # Whether the layer has them or not: names that are not there are nobody's.
    beside = [join(layer.scope, leaf) for leaf in (*RENORM, COUNTER)]
    return [layer.names[role] for role in roles] + beside


def _owned(name, owners):
    """A variable of `owners`, or its slot, taken apart; None for another name."""
    return Slot("", name, "") if name in owners else dialects.find_slot(name, owners)


def _moved(slot, scope, new_scope):
    rest = slot.variable[len(scope) :].lstrip("/")
    return join(slot.prefix, new_scope, rest, slot.leaf)
