"""What may be asked of a layer, checked once.

Contract: whoever builds a layer puts what it was asked for into `Arguments`, under the names
of `batch_norm`, and gives them to `check` before anything is added to the graph. What comes
back is what the rest of the library works with: it travels through unchanged.

An error names the argument as the caller calls it, the constraint and the value.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1 import compiled, statistics
from bn_tf1.statistics import Plan, Renormalization
from bn_tf1.statistics.channels import IS_TENSORFLOW_1

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_CHOICES = {
    "ema_variance": ("biased", "unbiased"),
    "update": ("collection", "merged", "in_place", "skip"),
    "kernel": (*statistics.KERNELS, "recipe"),
    "activation": (None, *statistics.ACTIVATIONS),
}
# What the libraries call one argument; a function is told its own name of it.
_ONE_ARGUMENT = (
    ("x", "inputs"),
    ("is_training", "training", "is_train", "phase_train"),
    ("decay", "momentum", "decay_rate"),
    ("epsilon", "eps", "variance_epsilon"),
    ("name", "scope"),
    ("weights", "batch_weights", "mask"),
    ("ghost_batch_size", "virtual_batch_size", "ghost_batches"),
    ("updates_collection", "updates_collections"),
    ("initializers", "param_initializers"),
    ("regularizers", "param_regularizers"),
    ("zero_debias", "zero_debias_moving_mean"),
    ("renorm_decay", "renorm_momentum"),
    ("kernel", "fused"),
    ("axis", "data_format"),
    ("activation", "activation_fn", "act"),
    ("residual", "shortcut", "side_input"),
    ("banks", "num_banks"),
)
# Where ours is not one name for another.
_SAYS_MORE = {
    ("kernel", "fused"): 'kernel="fused", or "composed"',
    ("axis", "data_format"): "axis=-1 for NHWC, axis=1 for NCHW",
    ("data_format", "axis"): 'data_format="NHWC" for axis -1, "NCHW" for axis 1',
    ("fused", "kernel"): "fused=True, or False",
    ("activation", "activation_fn"): 'activation="relu", or "relu6"',
    ("activation_fn", "activation"): "activation_fn=tf.nn.relu, or any function",
}
_RENORM = "renorm=bn_tf1.Renormalization(decay, rmin, rmax, dmax)"
_BY_NAME = {
    "initializer": ("gamma", "beta", "moving_mean", "moving_variance"),
    "regularizer": ("gamma", "beta"),
    "constraint": ("gamma", "beta"),
}
# What makes statistics other than those of the whole batch.
_RICH = ("weights", "ghost_batch_size", "renorm", "adjustment", "sync")

CUMULATIVE = "cumulative"


class WarmUp(NamedTuple):
    """A decay that begins low: min(decay, (1 + n) / (10 + n)) for the update after n others.

    So the initial values are forgotten within the first batches, as with the `num_updates`
    of `tf.train.ExponentialMovingAverage`.

    Attributes:
        decay: the largest: a number, or a scalar float tensor.
    """

    decay: Any = 0.99


# Decays that follow from the number of updates; the one string is CUMULATIVE.
COUNTED = (str, WarmUp)


class Arguments(NamedTuple):
    """The arguments of `batch_norm` that are not about its variables, and what follows.

    Attributes:
        zero_debias: a bool, or which of "moving_mean" and "moving_variance" are
            bias-corrected; the latter after the check.
        bank, banks, bank_affine: which of how many sets of variables, and whether those of
            gamma and beta are among them.
        towers: the length of the list that `x` is; 0 where it is none.
        is_foldable: whether the graph has the form in which `tf.contrib.quantize` folds a
            layer; after the check only with one mode, on the TensorFlow that has contrib.
        plan: how `x` is normalised, with its channel axes; None before the check.
        is_plain: whether the statistics and the output are those of the whole batch and
            nothing more; known after the check.
    """

    is_training: Any
    axis: Any = -1
    decay: Any = 0.99
    epsilon: float = 1e-3
    trainable: Any = True
    weights: Any = None
    ghost_batch_size: int | None = None
    renorm: Renormalization | None = None
    adjustment: Any = None
    zero_debias: Any = False
    ema_variance: str = "biased"
    update: str = "collection"
    skip_nonfinite: bool = True
    kernel: str = "auto"
    fold: Any = False
    sync: Any = None
    activation: str | None = None
    residual: Any = None
    towers: int = 0
    bank: Any = None
    banks: int | None = None
    bank_affine: bool = False
    is_foldable: bool = False
    plan: Plan | None = None
    is_plain: bool = True


def check(
    x: tf.Tensor, asked: Arguments, called: Mapping[str, str] | None = None
) -> Arguments:
    """What was asked for inputs like `x`, checked and completed.

    Args:
        x: the input.
        asked: the arguments as they were given.
        called: in the drop-ins, the originals' names of arguments, by ours. They may
            be what the originals take: a decay of 1, an epsilon of 0, an `x` of rank 1.

    Raises:
        TypeError, ValueError: as `batch_norm` says.
    """
    axes = _checked_axes(x, asked.axis, least_rank=2 if called is None else 1)
    _check_options(asked, called)
    asked = asked._replace(
        is_training=checked_switch("is_training", asked.is_training),
        trainable=checked_switch("trainable", asked.trainable),
    )
    if asked.kernel == "recipe":
        _check_recipe(asked, axes)
    if asked.towers or any(getattr(asked, name) is not None for name in _RICH):
        asked = _with_rich_statistics(x, asked, axes)
    if asked.fold is not False:
        _check_fold(x, asked, axes)
    if (asked.bank, asked.banks, asked.bank_affine) != (None, None, False):
        asked = asked._replace(bank=_checked_bank(asked))
    if asked.towers:
        alone = ("weights", "adjustment", "fold", "ghost_batch_size")
        _check_alone(asked, "a list of tensors", alone)
    # Inference needs no compiled operation, so that a graph for it can be built anywhere.
    if asked.kernel == "compiled" and asked.is_training is not False:
        try:
            compiled.load()
        except compiled.NotBuiltError as error:
            raise ValueError(f"`kernel` is 'compiled', but {error}") from error
    # Statistics of its own, and the recipe's drawing, are made of several operations.
    is_planned = asked.is_plain and asked.kernel != "recipe"
    is_switched = not isinstance(asked.is_training, bool)
    # `tf.contrib.quantize` is in 1.15 alone, and folds no layer with both modes.
    may_fold = asked.is_foldable and is_planned and not is_switched and IS_TENSORFLOW_1
    plan = statistics.plan_of(
        x,
        axes,
        epsilon=asked.epsilon,
        kernel=asked.kernel if is_planned else "composed",
        of_batch=asked.is_training is not False,
        behind_switch=is_switched,
        is_foldable=may_fold,
    )
    kernel = plan.constant if asked.is_training is False else plan.kernel
    # slim corrects the mean alone.
    corrected = asked.zero_debias
    if not isinstance(corrected, tuple):
        corrected = ("moving_mean", "moving_variance") if corrected else ()
    return asked._replace(
        plan=plan, zero_debias=corrected, is_foldable=may_fold and kernel == "fused"
    )


def unfit(argument: str, value: Any, must: str, error: type = ValueError) -> Exception:
    """The `error` that says what `argument` is, and what it must be."""
    return error(f"`{argument}` is {value!r}, but must {must}")


def is_int(value: Any, least: int = 1) -> bool:
    """Whether `value` is an int of at least `least`; in Python, True is one, too."""
    is_integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integral and value >= least


def _checked_axes(x, axis, least_rank):
    """The channel axes, ascending and not negative."""
    if x.dtype.base_dtype not in _FLOATS:
        names = ", ".join(dtype.name for dtype in _FLOATS)
        raise TypeError(f"`x` has dtype {x.dtype.name}, but must have one of {names}")
    rank = x.shape.ndims
    if rank is None or rank < least_rank:
        raise ValueError(
            f"`x` has shape {x.shape}, but must have a known rank of 2 or more"
        )
    axes = axis if isinstance(axis, (list, tuple)) and axis else (axis,)
    for a in axes:
        # True is an int of Python, and would be axis 1 without a word.
        if isinstance(a, bool) or not isinstance(a, numbers.Integral):
            raise unfit("axis", axis, "be an int or several", TypeError)
        if not -rank <= a < rank:
            raise ValueError(
                f"`axis` is {axis}, but must lie in [{-rank}, {rank}) for `x` of shape "
                f"{x.shape}"
            )
        if tf.dimension_value(x.shape[a]) is None:
            raise ValueError(
                f"`x` has shape {x.shape}, but must have a known number of channels on "
                f"axis {a}: call x.set_shape"
            )
    if len({a % rank for a in axes}) != len(axes):
        raise ValueError(f"`axis` is {axis}, but must not name an axis twice")
    return tuple(sorted(a % rank for a in axes))


def _check_options(asked, called):
    names = {"decay": "decay", "renorm_decay": "renorm.decay", **(called or {})}
    # The originals take the ends of the range, too, and people have them in their code.
    is_strict = called is None
    decay = asked.decay
    if isinstance(decay, COUNTED) and asked.zero_debias:
        raise ValueError(
            f"`{names['decay']}` is {decay!r} and `zero_debias` {asked.zero_debias!r}, "
            "but one of them is enough: both keep the initial values out of the averages, "
            "and the correction of `zero_debias` is that of one decay for all updates"
        )
    if isinstance(decay, WarmUp):
        _check_decay(names["decay"], decay.decay, is_strict)
    elif not isinstance(decay, str) or decay != CUMULATIVE:
        others = f", {CUMULATIVE!r}, or a bn_tf1.WarmUp of the first two"
        _check_decay(names["decay"], decay, is_strict, others)
    if asked.renorm is not None:
        _check_decay(
            names["renorm_decay"], getattr(asked.renorm, "decay", 0), is_strict
        )
    epsilon = asked.epsilon
    fits = isinstance(epsilon, numbers.Real) and 0 <= epsilon < float("inf")
    if not fits or (epsilon == 0 and is_strict):
        bound = "a number > 0" if is_strict else "a number >= 0 and finite"
        raise unfit("epsilon", epsilon, f"be {bound}")
    for argument, choices in _CHOICES.items():
        value = getattr(asked, argument)
        if value not in choices:
            raise unfit(argument, value, f"be one of {', '.join(map(repr, choices))}")


def _check_decay(name, decay, is_strict, others=""):
    if tf.is_tensor(decay):
        if decay.dtype.is_floating and decay.shape.is_compatible_with([]):
            return
        raise unfit(name, decay, "be a number or a scalar float tensor")
    bounds = "[0, 1)" if is_strict else "[0, 1]"
    if not isinstance(decay, numbers.Real):
        wanted = f"be a number in {bounds} or a scalar float tensor{others}"
        raise unfit(name, decay, wanted)
    if not 0 <= decay <= 1 or (decay == 1 and is_strict):
        raise unfit(name, decay, f"lie in {bounds}")


def _check_recipe(asked, axes):
    # Nothing is left out without a word: whoever asked for it would train another network.
    lacks = {
        "decay": isinstance(asked.decay, COUNTED),
        **{name: getattr(asked, name) is not None for name in (*_RICH, "banks")},
        "towers": asked.towers > 0,
        "zero_debias": asked.zero_debias,
        "ema_variance": asked.ema_variance != "biased",
        "fold": asked.fold is not False,
        "update": asked.update in ("in_place", "merged"),
        "trainable": not isinstance(asked.trainable, bool),
        "axis": len(axes) > 1,
    }
    for argument, is_lacking in lacks.items():
        if is_lacking:
            raise ValueError(
                f"`kernel` is 'recipe', but the recipe cannot have `{argument}` = "
                f"{getattr(asked, argument)!r}; leave it out, or use kernel='auto'"
            )


def checked_switch(argument: str, value: Any) -> bool | tf.Tensor:
    """A Python bool or a scalar bool tensor, from what was given for `argument`."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if tf.is_tensor(value):
        switch = tf.convert_to_tensor(value)
        if switch.dtype.base_dtype == tf.bool and switch.shape.is_compatible_with([]):
            return switch
    raise unfit(argument, value, "be a Python bool or a scalar bool tensor", TypeError)


def _with_rich_statistics(x, asked, axes):
    """`asked` with weights that are a tensor."""
    if asked.kernel in ("fused", "compiled"):
        raise ValueError(
            f"`kernel` is {asked.kernel!r}, but the {asked.kernel} kernel has no weights, "
            "ghost batches, renormalisation, adjustment or joint statistics; use "
            "kernel='auto' or 'composed'"
        )
    if asked.ghost_batch_size is not None:
        _check_ghost_batch_size(asked, axes)
    if asked.renorm is not None:
        _check_renorm(asked)
    # By what it can do: the room of the workers is above this one.
    if asked.sync is not None and not hasattr(asked.sync, "joint_moments"):
        must = "be a bn_tf1.Workers, or a group of them"
        raise unfit("sync", asked.sync, must, TypeError)
    weights = asked.weights
    if weights is not None:
        weights = _checked_weights(weights, x, axes)
    return asked._replace(weights=weights, is_plain=False)


def _check_ghost_batch_size(asked, axes):
    if not is_int(asked.ghost_batch_size):
        raise unfit("ghost_batch_size", asked.ghost_batch_size, "be an int > 0")
    if 0 in axes:
        raise ValueError(
            f"`axis` is {asked.axis}, but with `ghost_batch_size` axis 0 must count the "
            "examples"
        )
    _check_alone(asked, "`ghost_batch_size`", ("weights", "adjustment", "sync"))


def _check_alone(asked, other, arguments):
    for argument in arguments:
        value, unused = getattr(asked, argument), Arguments._field_defaults[argument]
        if value is not unused:
            raise unfit(argument, value, f"be {unused!r} with {other}")


def _check_renorm(asked):
    renorm = asked.renorm
    if not isinstance(renorm, Renormalization):
        raise unfit("renorm", renorm, "be a bn_tf1.Renormalization", TypeError)
    # `moving_variance` follows from the average of a deviation, which has no N - 1 in it.
    if asked.ema_variance != "biased" or asked.zero_debias:
        raise ValueError(
            f"`ema_variance` is {asked.ema_variance!r} and `zero_debias` "
            f'{asked.zero_debias}, but with `renorm` they must be "biased" and False: '
            "its averages correct the biased statistics"
        )


def _checked_weights(weights, x, axes):
    weights = tf.convert_to_tensor(weights, name="weights")
    shape = x.shape[:1]
    if weights.shape.ndims != 1:
        shape = [1 if a in axes else None for a in range(x.shape.ndims)]
    if not (
        weights.dtype.is_floating
        and weights.shape.ndims is not None
        and weights.shape.is_compatible_with(shape)
    ):
        raise unfit(
            "weights",
            weights,
            "be a float tensor of shape [batch], or of the rank of `x`, "
            f"{x.shape}, with size 1 on the channel axes",
        )
    return weights


def _checked_bank(asked):
    """The bank, an int or a scalar int tensor."""
    bank, banks = asked.bank, asked.banks
    if not is_int(banks):
        must = "be an int > 0, with a `bank` and for `bank_affine`: how many sets of "
        raise unfit("banks", banks, must + "statistics the layer has")
    if not tf.is_tensor(bank):
        if is_int(bank, least=0) and bank < banks:
            return int(bank)
        must = f"be an int in [0, {banks}), as `banks` says, or a scalar int tensor"
        raise unfit("bank", bank, must)
    bank = tf.convert_to_tensor(bank)
    if not (bank.dtype.is_integer and bank.shape.is_compatible_with([])):
        raise unfit("bank", bank, "be an int or a scalar int tensor")
    if asked.sync is not None:
        raise ValueError(
            "`bank` is a tensor, but with `sync` must be an int: workers that choose "
            "different banks in one step would mix them; build a call for each bank"
        )
    if asked.fold == "once":
        raise ValueError(
            "`fold` is 'once', but `bank` is a tensor, and what is folded once is of one "
            "bank; use an int, or fold=True"
        )
    return bank


def _check_fold(x, asked, axes):
    fold = asked.fold
    if not (isinstance(fold, (bool, np.bool_)) or fold == "once"):
        raise unfit("fold", fold, "be False, True or 'once'")
    if not fold:
        return
    if asked.is_training is not False:
        raise ValueError(
            f"`fold` is {fold!r}, but `is_training` is {asked.is_training!r}: only "
            "statistics that do not change with the batch can be folded; use "
            "is_training=False"
        )
    obstacle = statistics.why_not_folded(x, axes, once=fold == "once")
    if obstacle is not None:
        raise ValueError(
            f"`fold` is {fold!r}, but cannot be: {obstacle}; use fold=False"
        )


def check_towers(towers: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """Raises unless the tensors of a list may be normalised together."""
    # Their statistics are joined channel by channel, in one dtype.
    first = towers[0]
    for tower in towers[1:]:
        if tower.dtype != first.dtype or tower.shape.ndims != first.shape.ndims:
            raise ValueError(
                f"`x` has {first.dtype.name} of shape {first.shape} and "
                f"{tower.dtype.name} of shape {tower.shape}, but must have one dtype "
                "and one rank"
            )
    return towers


def checked_residual(residual: Any, x: Any) -> Any:
    """What is added to the output for `x`: a tensor like it, or a list for a list."""
    if isinstance(x, list):
        is_list = isinstance(residual, (list, tuple))
        if not is_list or len(residual) != len(x):
            must = f"be a list of {len(x)} tensors, one for each of `x`"
            raise unfit("residual", residual, must)
        return [checked_residual(*pair) for pair in zip(residual, x)]
    if not tf.is_tensor(residual):
        # NumPy's numbers are float64 by themselves, which `x` seldom is.
        residual = tf.convert_to_tensor(residual, x.dtype.base_dtype, name="residual")
    residual = tf.convert_to_tensor(residual)
    if residual.dtype.base_dtype != x.dtype.base_dtype:
        raise TypeError(
            f"`residual` has dtype {residual.dtype.name}, but must have that of `x`, "
            f"{x.dtype.name}: cast it"
        )
    if not residual.shape.is_compatible_with(x.shape):
        raise ValueError(
            f"`residual` has shape {residual.shape}, but must have that of `x`, "
            f"{x.shape}"
        )
    known = x.shape.merge_with(residual.shape)
    if residual.shape.ndims is None or residual.shape.as_list() != known.as_list():
        # Where its shape comes to light at run time only, a sum would broadcast to `x`.
        residual = tf.ensure_shape(residual, x.shape)
    return residual


def check_by_name(argument: str, mapping: Mapping | None, known: Iterable[str]) -> None:
    """Raises where `mapping` is about a variable that is not `known`, or no function."""
    if mapping is None:
        return
    if not isinstance(mapping, Mapping):
        example = f"{{{next(iter(known))!r}: ...}}"
        must = f"be a dict by the name of a variable, such as {example}"
        raise unfit(argument, mapping, must, TypeError)
    check_keys(argument, mapping, known)
    for key, value in mapping.items():
        if value is not None and not callable(value):
            raise ValueError(
                f"`{argument}` has {value!r} for {key!r}, but must have a function, such "
                "as tf.zeros_initializer() or tf.nn.l2_loss"
            )


def check_keys(argument: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ValueError for a key that is not `known`."""
    for key in keys:
        if key not in known:
            raise ValueError(
                f"`{argument}` has the key {key!r}, but its keys must be among "
                f"{', '.join(map(repr, known))}"
            )


def check_session(session: Any) -> None:
    """Raises a TypeError unless `session` runs a graph, as monitored ones do, too."""
    if not (hasattr(session, "graph") and hasattr(session, "run")):
        must = "be a tf.Session or a MonitoredTrainingSession"
        raise unfit("session", session, must, TypeError)


def says_how_it_is_called(function: Callable) -> Callable:
    """A decorator: who uses another library's name of an argument is told this one's."""
    # Who comes from another library writes its names, and Python's own error tells none.
    hints = names_here(function)

    @functools.wraps(function)
    def checked(*arguments, **options):
        for name in options:
            if name in hints:
                raise TypeError(
                    f"{function.__name__} has no argument `{name}`: here it is "
                    f"`{hints[name]}`"
                )
        return function(*arguments, **options)

    return checked


def names_here(function: Callable) -> Mapping[str, str]:
    """What to write instead, by another library's name of an argument of `function`."""
    known = tuple(inspect.signature(function).parameters)
    hints = {
        theirs: _SAYS_MORE.get((ours, theirs), ours)
        for names in _ONE_ARGUMENT
        for ours in names
        for theirs in names
        if ours in known
    }
    if "renorm_clipping" not in known:
        parts = ("renorm_clipping", "renorm_decay", "renorm_momentum")
        hints.update(dict.fromkeys(parts, _RENORM))
    for kind, roles in _BY_NAME.items():
        for role, group in itertools.product(roles, (f"{kind}s", f"param_{kind}s")):
            one = f"{role}_{kind}"
            if group in known:
                hints[one] = f"{group}={{{role!r}: ...}}"
            elif one in known:
                hints.setdefault(group, f"{one}, and so on")
    return {name: hint for name, hint in hints.items() if name not in known}
