"""The moving statistics over the checkpoints of one run: do they move, do they jump?

One checkpoint cannot tell whether its statistics are still updated. Two of different
steps can: an average of batches is never the same to the bit.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from bn_tf1.checkpoints.found_layers import STATISTICS
from bn_tf1.checkpoints.layer_values import CheckpointValues, LayerValues
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by

_SMALLEST_EPSILON = 1e-5
# Deviations that a moving mean moves, and factor by which a moving variance changes,
# between two checkpoints of one run. Early in a run larger ones are usual.
_MEAN_JUMP = 20.0
_VARIANCE_JUMP = 1e3


def check_history(checkpoints: Sequence[CheckpointValues]) -> list[Finding]:
    """Findings on layers over the checkpoints of a run, the newest last."""
    states: dict[str, list] = {}
    for checkpoint in checkpoints:
        for layer in checkpoint.layers:
            # A layer may have come or gone between two checkpoints of a folder.
            if layer.has_statistics:
                states.setdefault(layer.layer.scope, []).append((checkpoint, layer))
    findings = []
    for found in states.values():
        channels = found[-1][1].values["moving_mean"].size
        # A folder may hold checkpoints of another network, too.
        found = [s for s in found if s[1].values["moving_mean"].size == channels]
        # A layer that the newest has no more is no part of what is examined.
        if found[-1][0] is checkpoints[-1]:
            findings += _check_still(found)
            findings += _check_jumps(found)
    return findings


def _check_still(states):
    """The newest statistics against those of the oldest checkpoint of another step."""
    checkpoint, newest = states[-1]
    earlier = [state for state in states if state[0].step != checkpoint.step]
    if not earlier or newest.is_initial:
        return  # at the initial values: the matter of "never-updated"
    still = [state for state in earlier if _is_equal(state[1], newest, STATISTICS)]
    # The last pair: they may have been updated before.
    if not still or still[-1][0] is not earlier[-1][0]:
        return
    first = still[0][0]
    parameters = [role for role in ("gamma", "beta") if role in newest.values]
    trained = parameters and not _is_equal(still[0][1], newest, parameters)
    is_updated = newest.mode in ("training", "switched")
    names = " and ".join(parameters)
    grade = ("note", "possible")
    moved = f"and so is its {names}: the layer is frozen, or does not train"
    if not parameters:
        moved = "and it has no gamma or beta"
    elif trained:
        # Only what a graph updates is surely not frozen on purpose.
        grade = ("error" if is_updated else "warning", "likely")
        moved = f"though its {names} was trained between"
    what = (
        f"The moving statistics are the same to the bit at steps {first.step} and "
        f"{checkpoint.step}, {moved}."
    )
    yield _found("statistics-stand-still", grade, first, checkpoint, newest, what)


def _found(check, grade, first, last, layer, what):
    gravity, certainty = grade
    where, scope = f"{first.prefix} to {last.prefix}", layer.layer.scope
    return found_by(check, certainty, where, what, gravity=gravity, layer=scope)


def _is_equal(one: LayerValues, other: LayerValues, roles):
    return all(
        role in one.values and np.array_equal(one.values[role], other.values[role])
        for role in roles
    )


def _check_jumps(states):
    pairs = [
        (before, after)
        for before, after in zip(states, states[1:])
        # From initial values the first batches are a jump by themselves.
        if before[0].step and not before[1].is_initial
    ]
    for (checkpoint, before), (following, after) in pairs:
        mean, variance = _jump(before, after)
        if after.is_initial:
            grade = ("error", "certain")
            what = (
                f"The moving statistics were trained at step {checkpoint.step}, and are "
                f"at their initial values at step {following.step}."
            )
        elif mean > _MEAN_JUMP or variance > _VARIANCE_JUMP:
            grade = ("warning", "likely")
            what = (
                f"Between steps {checkpoint.step} and {following.step} a moving mean "
                f"moved by {mean:.3g} deviations, and a moving variance changed by a "
                f"factor of {variance:.3g}."
            )
        else:
            continue
        yield _found("statistics-jump", grade, checkpoint, following, after, what)


def _jump(before, after):
    """(deviations that a mean moved, factor that a variance changed by), the largest."""
    epsilon = after.epsilon or _SMALLEST_EPSILON
    means = [state.values["moving_mean"] for state in (before, after)]
    variances = [state.values["moving_variance"] + epsilon for state in (before, after)]
    # What is negative or no number has a finding of its own, and gives NaN here.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        moved = np.abs(means[1] - means[0]) / np.sqrt(np.maximum(*variances))
        ratio = np.exp(np.abs(np.log(variances[1]) - np.log(variances[0])))
    finite = np.isfinite(moved) & np.isfinite(ratio)
    if not finite.any():
        return 0.0, 1.0
    return float(moved[finite].max()), float(ratio[finite].max())
