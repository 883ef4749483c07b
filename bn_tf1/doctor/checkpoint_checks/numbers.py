"""Checks of the numbers that the batch-norm layers of one checkpoint hold.

Each check takes one `LayerValues`, the `CheckpointValues` that it is of, and yields
`Finding`s. A figure is compared only where it was read: what is missing is the matter of
`presence`.
"""

from __future__ import annotations

import os
from typing import Iterator

import numpy as np

from bn_tf1.checkpoints.dialects import COUNTER
from bn_tf1.checkpoints.found_layers import STATISTICS
from bn_tf1.checkpoints.layer_values import CheckpointValues, LayerValues
from bn_tf1.doctor.findings import Finding
from bn_tf1.doctor.register import found_by

# What tells that a checkpoint is of a run of train.py, which has its own examples.
_RUN_FILE = "config.json"
# The smallest epsilon in use; a variance below it is dead in every library.
_SMALLEST_EPSILON = 1e-5
# A variance beyond that of any data: of values of a billion.
_LARGEST = 1e18
# Deviations between a mean and 0. Float32 moments begin to lose digits here, and a shift
# of one part in a hundred moves the output by more than its range.
_FAR_MEAN = 100.0
_VERY_FAR_MEAN = 1e4
# Deviations above its mean that a normalised channel hardly ever is.
_SILENT = 3.0
# Share of the initial values in a moving statistic that is worth a word.
_RESIDUAL = 0.05
# The default decay of tf.layers, Keras and bn_tf1, where no graph tells the decay.
_USUAL_DECAY = 0.99
# Relative; float32 numbers that were written by two operations.
_DEBIAS_TOLERANCE = 1e-2


def check_layer(layer: LayerValues, checkpoint: CheckpointValues) -> list[Finding]:
    """All findings on the numbers of one layer."""
    return [
        finding
        for check in (
            _check_finite,
            _check_updated,
            _check_variance,
            _check_size,
            _check_dead,
            _check_silent,
            _check_mean,
            _check_debias,
            _check_count,
            _check_residual,
        )
        for finding in check(layer, checkpoint)
    ]


def _finding(check, layer, checkpoint, role, certainty, what, gravity=None):
    name = layer.layer.names.get(role, "")
    return found_by(
        check,
        certainty,
        f"{checkpoint.prefix}: {name}" if name else checkpoint.prefix,
        what,
        gravity=gravity,
        layer=layer.layer.scope,
        source=to_recalibrate(checkpoint.prefix),
    )


def to_recalibrate(prefix: str) -> str:
    """What python -m bn_tf1 recalibrate takes for the checkpoint `prefix`."""
    folder = os.path.dirname(prefix) or "."
    if os.path.exists(os.path.join(folder, _RUN_FILE)):
        return f"{folder} NEW --checkpoint {prefix}"
    return f"{prefix}.meta NEW --checkpoint {prefix} --examples X.npz"


def _check_finite(layer, checkpoint) -> Iterator[Finding]:
    for role, values in layer.values.items():
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            what = f"{bad} of {values.size} values of {role} are NaN or infinite."
            yield _finding("not-finite", layer, checkpoint, role, "certain", what)


def _check_updated(layer, checkpoint):
    untouched = _untouched(layer)
    if not untouched:
        return
    mean, variance = (_range(layer.values[role]) for role in STATISTICS)
    gravity, certainty, evidence = _evidence_of_training(layer, checkpoint)
    what = (
        f"{' and '.join(untouched)} {'are' if len(untouched) > 1 else 'is'} at the "
        f"initial value in every channel (mean {mean}, variance {variance}); {evidence}."
    )
    role = untouched[0]
    yield _finding("never-updated", layer, checkpoint, role, certainty, what, gravity)


def _untouched(layer):
    """The statistics that are as they were initialised."""
    if not layer.has_statistics or layer.values["moving_mean"].size == 0:
        return []
    mean, variance = (layer.values[role] for role in STATISTICS)
    if layer.is_initial:
        return list(STATISTICS)
    if np.all(variance == 1):
        return ["moving_variance"]
    # A mean of 0 alone is also that of a layer whose input is 0, with no variance.
    return [] if mean.any() or not np.any(variance > 0) else ["moving_mean"]


def _evidence_of_training(layer, checkpoint):
    """(gravity, certainty, what tells it) of statistics at their initial values."""
    # A constant gamma or beta can be its initial value: 0 in the last layer of a block.
    trained = [
        role
        for role in ("gamma", "beta")
        if role in layer.values and np.unique(layer.values[role]).size > 1
    ]
    if trained:
        certainty = "likely" if layer.mode == "inference" else "certain"
        return "error", certainty, f"but its {' and '.join(trained)} was trained"
    if checkpoint.step:
        return "error", "likely", f"but the global step is {checkpoint.step}"
    if not layer.is_initial:
        return "error", "likely", "but the other statistic was updated"
    updated = [o for o in checkpoint.layers if o.has_statistics and not o.is_initial]
    if updated and checkpoint.step is None:
        return "error", "likely", f"but those of {len(updated)} other layers are not"
    step = "is 0" if checkpoint.step == 0 else "is not in the checkpoint"
    return "note", "possible", f"nothing tells of training, the global step {step}"


def _check_variance(layer, checkpoint):
    for role in ("moving_variance", "renorm_stddev"):
        values = layer.values.get(role, np.zeros(0))
        # A NaN, which has a finding of its own, is not below 0.
        negative = np.nan_to_num(values) < 0
        if negative.any():
            what = (
                f"{np.count_nonzero(negative)} of {values.size} channels have a "
                f"negative {role}, down to {values[negative].min():.4g}."
            )
            yield _finding(
                "negative-variance", layer, checkpoint, role, "certain", what
            )


def _check_size(layer, checkpoint):
    # Of a mean the square is of the order of a variance.
    for role, limit in zip(STATISTICS, (_LARGEST**0.5, _LARGEST)):
        values = layer.values.get(role, np.zeros(0))
        largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
        if largest > limit:
            what = f"The largest {role} is {largest:.3g} in size."
            yield _finding(
                "statistics-diverged", layer, checkpoint, role, "likely", what
            )


def _check_dead(layer, checkpoint):
    variance = layer.values.get("moving_variance")
    if variance is None or layer.is_initial:
        return
    epsilon = layer.epsilon or _SMALLEST_EPSILON
    with np.errstate(invalid="ignore"):  # NaN has a finding of its own
        small = (variance >= 0) & (variance < epsilon)
    if not small.any():
        return
    zero, count = np.count_nonzero(variance == 0), np.count_nonzero(small)
    source = "of the layer" if layer.epsilon else "the smallest one in use"
    what = (
        f"{count} of {variance.size} channels ({count / variance.size:.1%}) have a "
        f"variance below {epsilon:.3g} (epsilon, {source}), {zero} of them exactly 0."
    )
    certainty = "certain" if layer.epsilon or zero else "likely"
    role = "moving_variance"
    yield _finding("dead-channels", layer, checkpoint, role, certainty, what)


def _check_silent(layer, checkpoint):
    """What a ReLU makes of a normalised channel can be read off gamma and beta."""
    beta = layer.values.get("beta")
    if beta is None or layer.is_rectified is False:
        return
    gamma = layer.values.get("gamma", np.ones(1))
    if gamma.size not in (1, beta.size):
        return  # it has a finding of its own
    known = layer.is_rectified is not None
    with np.errstate(invalid="ignore"):  # NaN has a finding of its own
        silent = beta < -_SILENT * np.abs(gamma)
    if known:  # else it may be a residual branch that begins as nothing
        silent |= (beta == 0) & (gamma == 0)
    if not silent.any():
        return
    count = np.count_nonzero(silent)
    told = "nothing but a ReLU takes the output"
    if not known:
        told = "whether a ReLU follows, no graph tells"
    what = (
        f"{count} of {beta.size} channels ({count / beta.size:.1%}) have a beta "
        f"below -{_SILENT:g} |gamma|, down to {beta[silent].min():.4g}; {told}."
    )
    grade = ("certain", what, "warning") if known else ("possible", what, "note")
    yield _finding("silent-channels", layer, checkpoint, "beta", *grade)


def _check_mean(layer, checkpoint):
    if not layer.has_statistics or layer.is_initial:
        return
    mean, variance = (layer.values[role] for role in STATISTICS)
    epsilon = layer.epsilon or _SMALLEST_EPSILON
    # Dead channels, and numbers that are none, have findings of their own.
    alive = (
        np.isfinite(mean) & np.isfinite(variance) & (np.nan_to_num(variance) >= epsilon)
    )
    distance = np.zeros(mean.size)
    distance[alive] = np.abs(mean[alive]) / np.sqrt(variance[alive] + epsilon)
    far = np.count_nonzero(distance > _FAR_MEAN)
    if not far:
        return
    channel = int(np.argmax(distance))
    what = (
        f"The mean of {far} of {mean.size} channels is more than "
        f"{_FAR_MEAN:g} deviations from 0; in channel {channel} the mean is "
        f"{mean[channel]:.4g} and the deviation {variance[channel] ** 0.5:.4g}."
    )
    certainty = "likely" if distance[channel] > _VERY_FAR_MEAN else "possible"
    role = "moving_mean"
    yield _finding("mean-far-outside", layer, checkpoint, role, certainty, what)


def _check_debias(layer, checkpoint):
    for role in STATISTICS:
        short = role.split("_")[-1]
        values = layer.values.get(role)
        biased = layer.values.get(f"{short}_biased")
        steps = layer.values.get(f"{short}_steps")
        if values is None or biased is None or steps is None or steps.size != 1:
            continue
        what = _debias_problem(values, biased, float(steps[0]), layer.decay)
        if what:
            # All finite zeros: the first update replaces the statistic wholly.
            gravity = "error" if np.array_equal(biased * 0, biased) else "warning"
            yield _finding(
                "debias-counter", layer, checkpoint, role, "certain", what, gravity
            )


def _debias_problem(values, biased, steps, decay):
    """Why values = biased / (1 - decay^steps) cannot hold; None if it can."""
    if biased.size != values.size:
        return f"`biased` has {biased.size} values, the statistic {values.size}."
    if not (np.isfinite(values).all() and np.isfinite(biased).all()):
        return None  # it has a finding of its own
    if steps <= 0:
        if not values.any() or np.all(values == 1):
            return None
        return (
            f"`local_step` is {steps:g}, but the statistic is not at its initial value."
        )
    scale = np.abs(values).max()
    if not scale:
        return None if not biased.any() else "`biased` is not 0, but the statistic is."
    weight = float(np.dot(biased, values) / np.dot(values, values))
    # Without a decay, the weight that fits best must fit all channels.
    expected = weight if decay is None else 1 - decay**steps
    worst = float(
        np.abs(biased - expected * values).max() / (scale * max(expected, 1e-6))
    )
    if worst <= _DEBIAS_TOLERANCE and 0 < weight <= 1 + _DEBIAS_TOLERANCE:
        return None
    told = "some decay" if decay is None else f"decay {decay:g}"
    return (
        f"With `local_step` {steps:g} and {told}, the statistic should be `biased` / "
        f"{expected:.4g}, but differs from it by up to {worst:.1%} of the largest value."
    )


def _check_count(layer, checkpoint):
    count = layer.values.get(COUNTER, np.ones(1))
    is_lost = count.size == 1 and count[0] <= 0
    if is_lost and layer.has_statistics and not layer.is_initial:
        what = (
            f"`{COUNTER}` is {count[0]:g}, but the statistics are not at their "
            "initial values: the next update replaces them."
        )
        yield _finding(
            "debias-counter", layer, checkpoint, "", "certain", what, "warning"
        )


def _check_residual(layer, checkpoint):
    steps = layer.values.get("mean_steps", np.zeros(0))
    if steps.size == 1 or not checkpoint.step or not layer.has_statistics:
        return  # a zero-debiased average has no initial value
    if layer.values.get(COUNTER, np.zeros(1)).max() > 1:
        return  # two updates by their number leave less than 2 % of it
    if layer.is_initial or _untouched(layer):
        return  # it has a finding of its own
    decay = layer.decay or _USUAL_DECAY
    residual = decay**checkpoint.step
    # Where a variance is below what is left of an initial 1, it did not begin there.
    began_at_1 = layer.layer.variance_at_first == 1
    least = np.min(layer.values["moving_variance"])
    if residual < _RESIDUAL or (began_at_1 and least < 0.99 * residual):
        return
    known = layer.decay is not None
    is_sure = known and layer.layer.variance_at_first and not checkpoint.is_step_named
    what = (
        f"After {checkpoint.step} steps"
        + " (by the name of the file)" * checkpoint.is_step_named
        + f" with decay {decay:g}"
        + " (assumed: no graph tells it)" * (not known)
        + f", {residual:.1%} of the moving statistics is still their initial value."
    )
    yield _finding(
        "not-converged",
        layer,
        checkpoint,
        "moving_variance",
        "likely" if is_sure else "possible",
        what,
        "warning" if known else "note",
    )


def _range(values):
    low, high = values.min(), values.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
