"""The drop-in for `tf.contrib.layers.batch_norm`, which is tf_slim's, too.

    - net = slim.batch_norm(net, is_training=is_training)
    + from bn_tf1.slim import batch_norm
    + net = batch_norm(net, is_training=is_training)

It is a `normalizer_fn` as it is, and takes what an `arg_scope` of tf_slim or contrib gives
to the original: a key [slim.batch_norm] stays as it is. As a key itself it is made known
first, as any other function:

    batch_norm = slim.add_arg_scope(bn_tf1.slim.batch_norm)
    with slim.arg_scope([batch_norm], decay=0.9):
        net = batch_norm(net)

(In contrib, `add_arg_scope` is in `tf.contrib.framework`; in tf_slim, in `tf_slim`.)

Contract: the arguments, their order and defaults, the variables, scopes, collections
and results that TensorFlow 1.15 documents. The original takes one of three ways, and
some of what it does depends on the way; so it does here:

    way      taken for                                    order      not trainable
    fused    rank 2, or 4 with zero debiasing or another  beta,      statistics are
             collection than UPDATE_OPS                   gamma      updated
    weighted `batch_weights`; other ranks, or not fused,  beta,      statistics are
             with zero debiasing or another collection    gamma      updated
    layer    everything else                              gamma,     no updates
                                                          beta

`moving_variance` follows the unbiased variance with inputs of rank 2 and 4, and the
biased one with others and with `fused=False`, `batch_weights`, `renorm` or `adjustment`,
whatever kernel computes it.

Where the original is wrong, this is not:
- `param_regularizers` and `adjustment` count with `batch_weights`, too.
- Variables are float32 for float16 inputs with `batch_weights`, too: a moving average
  in float16 stands still.
- float64 inputs work with every `fused`.
- A call inside of a `tf.cond`, `tf.while_loop` or function updates the statistics in
  place (tensorflow#14699, #6087).
- A batch with a NaN or an infinity does not spoil the statistics (tensorflow#34062).
- A misspelt name of a variable in `param_initializers` or `param_regularizers` is an
  error.
- One value per channel in training, whose output would be beta whatever the input, is
  an error.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167); the
documentation of `tf.contrib.layers`, TensorFlow 1.15.
"""

from __future__ import annotations

from typing import Any

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.arguments import (
    Arguments,
    check,
    check_by_name,
    says_how_it_is_called,
    unfit,
)
from bn_tf1.drop_in import (
    add_to_collection,
    as_list,
    checked_mode,
    parts,
    renormalization,
    switched_or_not,
    unpartitioned,
    with_original_name,
)
from bn_tf1.moving_averages import updating
from bn_tf1.normalization import activated, normalize_and_update
from bn_tf1.slim.arg_scopes import obeys_arg_scopes
from bn_tf1.variables import INITIALIZERS, LEARNED, make_variables, own_variable

_UPDATE_OPS = tf.GraphKeys.UPDATE_OPS
_MODEL_COLLECTIONS = tf.GraphKeys.GLOBAL_VARIABLES, tf.GraphKeys.MODEL_VARIABLES
_CALLED = {"weights": "batch_weights"}
_FUSED, _WEIGHTED, _LAYER = "fused", "weighted", "layer"
_BETA_FIRST = ("beta", "gamma", "moving_mean", "moving_variance")
_GAMMA_FIRST = ("gamma", "beta", "moving_mean", "moving_variance")
_STATISTICS_FIRST = ("moving_mean", "moving_variance", "beta", "gamma")


@says_how_it_is_called
@obeys_arg_scopes
def batch_norm(
    inputs: Any,
    decay: float = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Any = None,
    param_initializers: dict | None = None,
    param_regularizers: dict | None = None,
    updates_collections: Any = _UPDATE_OPS,
    is_training: Any = True,
    reuse: Any = None,
    variables_collections: Any = None,
    outputs_collections: Any = None,
    trainable: bool = True,
    batch_weights: Any = None,
    fused: bool | None = None,
    data_format: str = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: Any = None,
    renorm: bool = False,
    renorm_clipping: dict | None = None,
    renorm_decay: float = 0.99,
    adjustment: Any = None,
    *,
    sync: Any = None,
    kernel: str = "auto",
    update: str = "collection",
    bank: Any = None,
    banks: int | None = None,
    bank_affine: bool = False,
) -> tf.Tensor:
    """Normalises `inputs`; as `tf.contrib.layers.batch_norm`.

    Args:
        inputs: float tensor of known rank with a known number of channels, or what
            converts to one.
        decay: share of the old moving statistics that an update keeps; or what else it
            may be for `bn_tf1.batch_norm`.
        center, scale: whether there is a `beta` and a `gamma`; no gamma by default.
        epsilon: added to the variance.
        activation_fn: a function of the output, or None; `tf.nn.relu` and `tf.nn.relu6` are
            what `bn_tf1.batch_norm` has as `activation`.
        param_initializers: initializers by variable name.
        param_regularizers: regularizers by variable name, for `beta` and `gamma`.
        updates_collections: the collection, or a list of them, for the update
            operations; None makes the output depend on them.
        is_training: whether to normalise with the statistics of the batch and to
            update the moving ones: a bool, 0 or 1, or a bool tensor or variable.
        reuse: whether the variables exist already; needs a `scope`.
        variables_collections: a list of collections for all variables, or a dict of
            lists by variable name. All are in `GLOBAL_VARIABLES` and `MODEL_VARIABLES`.
        outputs_collections: the collection, or a list of them, for the output.
        trainable: whether beta and gamma are trainable.
        batch_weights: float tensor [batch]: how much an example counts in the
            statistics.
        fused: False, or None or True: see the module. Which kernel runs is for the
            library to choose.
        data_format: "NHWC" for channels on the last axis, "NCHW" for axis 1; for every
            rank.
        zero_debias_moving_mean: keeps a bias-corrected moving mean, with the variables
            `biased` and `local_step`.
        scope: the variable scope, a name or an object; `BatchNorm`, made unique, by
            default.
        renorm: batch renormalization (arXiv:1702.03275), with the variables
            `moving_stddev`, `renorm_mean` and `renorm_stddev`.
        renorm_clipping: bounds of the correction: `rmax`, `rmin` and `dmax`.
        renorm_decay: share of the old `renorm_mean` and `renorm_stddev` that an update
            keeps.
        adjustment: a function from the shape of `inputs`, a tensor, to a scale and an
            offset for the normalised values, before beta and gamma, in training only.
        sync, kernel, update, bank, banks, bank_affine: as for `bn_tf1.batch_norm`; the
            original has no such thing. "merged" updates are in no collection.

    Returns:
        A tensor of the shape and dtype of `inputs`.

    Raises:
        TypeError: `is_training` is none of what it may be, or `inputs` no floats.
        ValueError: `is_training` is None, `data_format` is not one of the two, the rank
            or the number of channels is undefined, an initializer or regularizer is
            for no variable of the layer, `renorm` is asked for with
            `batch_weights`, `zero_debias_moving_mean` or another collection than
            UPDATE_OPS, or `reuse` without `scope`.
    """
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(
            f"data_format has to be either NCHW or NHWC. It is {data_format!r}"
        )
    # None is False for a layer of tf.layers; here, where True is the default, a mistake.
    if is_training is None:
        raise unfit("is_training", None, "be a bool or a bool tensor")
    mode = checked_mode("is_training", is_training)
    x = tf.convert_to_tensor(inputs)
    axis = _checked_channel_axis(x, data_format)
    way, is_unbiased = _way(
        x.shape.ndims,
        fused is None or fused,
        special=bool(zero_debias_moving_mean) or updates_collections != _UPDATE_OPS,
        weighted=batch_weights is not None,
        neither=renorm or adjustment is not None,
    )
    if renorm and way != _LAYER:
        raise ValueError(
            "`renorm` is True, but must be False with `batch_weights`, "
            "`zero_debias_moving_mean` or `updates_collections` other than "
            f"{_UPDATE_OPS!r}"
        )
    # Two words for one thing: neither is to be left out without a word.
    if update != "collection" and updates_collections != _UPDATE_OPS:
        raise ValueError(
            f"`update` is {update!r}, but must be 'collection' with `updates_collections` "
            f"{updates_collections!r}, which asks for another kind of update"
        )
    if updates_collections is None:
        update = "in_place"
    # What looks like an oversight of the original is in people's frozen networks.
    if way == _LAYER and trainable is False:
        update = "skip"
    asked = Arguments(
        is_training=mode,
        axis=axis,
        decay=decay,
        epsilon=epsilon,
        trainable=switched_or_not(trainable),
        weights=_checked_weights(batch_weights, x),
        renorm=renormalization(renorm, renorm_clipping, renorm_decay),
        adjustment=adjustment,
        sync=sync,
        zero_debias=("moving_mean",) if zero_debias_moving_mean else (),
        ema_variance="unbiased" if is_unbiased else "biased",
        update=update,
        kernel=kernel,
        activation=_name_of(activation_fn),
        bank=bank,
        banks=banks,
        bank_affine=bank_affine,
        is_foldable=is_unbiased,
    )
    arguments = check(x, asked, called=_CALLED)
    check_by_name("param_initializers", param_initializers, INITIALIZERS)
    # The original leaves regularizers of the statistics unread: no error, but no effect.
    check_by_name("param_regularizers", param_regularizers, INITIALIZERS)
    getter = None if way == _FUSED else _model_variable_getter
    with tf.variable_scope(
        scope, "BatchNorm", [x], reuse=reuse, custom_getter=getter
    ) as variable_scope:
        # As the original does, for the names of what comes after: in a scope BatchNorm,
        # whose name it takes but for its case, `batchnorm` is then `batchnorm_1`, and that
        # is what `tf.contrib.quantize` looks for.
        with tf.name_scope(variable_scope.name.rpartition("/")[2]):
            pass
        variables = make_variables(
            _variable_maker(variable_scope, arguments, param_regularizers),
            arguments,
            center,
            scale,
            param_initializers,
            order=_GAMMA_FIRST if way == _LAYER else _BETA_FIRST,
            named_by="scope",
        )
        order = _STATISTICS_FIRST if way == _LAYER else _BETA_FIRST
        for one_bank in (variables, *variables.others):
            _collect_variables(one_bank, variables_collections, order)
        how = updating(arguments, variable_scope.name, moves_in=True)
        with unpartitioned(variable_scope):
            y, to_collect = normalize_and_update(
                x, variables, arguments, how, layer=variable_scope.name
            )
        _collect_updates(to_collect, updates_collections)
        # Before the activation: what the original's layer is called comes before it, too.
        y = with_original_name(y, mode, fused=is_unbiased, kernel=kernel)
        if arguments.activation is not None:
            y = activated(y, arguments)
        elif activation_fn is not None:
            y = activation_fn(y)
        return _collect_output(y, outputs_collections, variable_scope.name)


def _checked_channel_axis(x, data_format):
    if not x.dtype.is_floating:
        raise TypeError(
            f"`inputs` has dtype {x.dtype.name}, but must be a float tensor"
        )
    rank = x.shape.ndims
    if rank is None or rank < 2:
        raise ValueError(
            f"`inputs` has shape {x.shape}, of undefined rank or one below 2, but must "
            "have a known rank of 2 or more: call set_shape"
        )
    axis = 1 if data_format == "NCHW" else rank - 1
    if tf.dimension_value(x.shape[axis]) is None:
        raise ValueError(
            f"`inputs` has shape {x.shape}, with an undefined number of channels on "
            f"axis {axis}, but it must be known: call set_shape"
        )
    return axis


def _name_of(activation_fn):
    """What the library calls the function, where it is one that it has."""
    # So that the compiled kernel can have it in its pass; any other is called as it is.
    known = statistics.ACTIVATIONS.items()
    return next((name for name, own in known if own is activation_fn), None)


def _way(rank, fused, *, special, weighted, neither):
    """The way that the original would take, and whether it averages the unbiased variance."""
    # Whatever kernel runs here: where the original's would be the fused one, the moving
    # variance of people's checkpoints is the unbiased one.
    fusible = bool(fused) and rank in (2, 4) and not (weighted or neither)
    if fusible and (special or rank == 2):
        return _FUSED, True
    return (_WEIGHTED if special or weighted else _LAYER), fusible


def _model_variable_getter(getter, name, *arguments, **options):
    """Puts a variable into the collections of the model's variables, too."""
    known = options.pop("collections", None) or ()
    keys = list(dict.fromkeys([*known, *_MODEL_COLLECTIONS]))
    return getter(name, *arguments, collections=keys, **options)


def _variable_maker(scope, arguments, regularizers):
    def make(name, initializer):
        # The original keeps parts of gamma and beta apart; an update takes no parts.
        is_whole = name.rpartition("/")[2] not in LEARNED
        with unpartitioned(scope if is_whole else None):
            return own_variable(
                name,
                initializer,
                shape=arguments.plan.parameter_shape,
                dtype=arguments.plan.dtype,
                trainable=arguments.trainable,
                collections=[*_MODEL_COLLECTIONS],
                regularizer={role: (regularizers or {}).get(role) for role in LEARNED},
            )

    return make


def _collect_variables(variables, collections, order):
    for key in order:
        variable = getattr(variables, key)
        if variable is None:
            continue
        by_key = collections.get(key) if isinstance(collections, dict) else collections
        for collection in by_key or ():
            add_to_collection(collection, parts(variable))


def _checked_weights(weights, x):
    if weights is None:
        return None
    weights = tf.convert_to_tensor(weights)
    if not weights.shape.is_compatible_with(x.shape[:1]):
        raise ValueError(
            f"`batch_weights` has shape {weights.shape}, but must have one value for "
            f"each example of `inputs`, {x.shape[:1]}"
        )
    # Whole numbers, such as a mask of 0 and 1, count as what they are.
    weights.set_shape(x.shape[:1])
    return weights if weights.dtype.is_floating else tf.cast(weights, tf.float32)


def _collect_updates(updates, collections):
    """Operations in UPDATE_OPS, tensors in other collections, as the original has."""
    for collection in as_list(collections):
        for variable, update in updates:
            if collection != _UPDATE_OPS:
                update = _updated(variable, update)
            tf.add_to_collection(collection, update)


def _updated(variable, update):
    # An assignment to a reference gives it; one to a resource gives nothing.
    if update.outputs:
        return update.outputs[0]
    # Under the update's own name, by which people find it.
    with tf.name_scope(update.name + "/"), tf.control_dependencies([update]):
        return variable.read_value()


def _collect_output(y, collections, alias):
    # `slim.utils.convert_collection_to_dict` names end points by it.
    if collections:
        y.aliases = getattr(y, "aliases", []) + [alias]
        tf.add_to_collections(collections, y)
    return y
