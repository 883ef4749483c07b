"""The graph builder: what is asked for, checked, and the variables it needs.

    is_training   output normalised with   moving statistics
    True          batch statistics         updated (see `update`)
    False         moving statistics        not touched, no moments in the graph
    bool tensor   either, at run time      updated when it is true, otherwise left
                                           bit for bit as they are

    y      = gamma * (x - mean) / sqrt(variance + epsilon) + beta
    moving = moving - (1 - decay) * (moving - batch)

Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.arguments import (
    Arguments,
    check,
    check_by_name,
    check_towers,
    checked_residual,
    says_how_it_is_called,
    unfit,
)
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION, updating
from bn_tf1.normalization import activated, normalize_and_update
from bn_tf1.statistics import Renormalization
from bn_tf1.variables import INITIALIZERS, LEARNED, make_variables, own_variable


@says_how_it_is_called
def batch_norm(
    x: tf.Tensor | Sequence[tf.Tensor],
    is_training: bool | tf.Tensor,
    *,
    axis: int | Sequence[int] = -1,
    decay: Any = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    initializers: Mapping[str, Callable] | None = None,
    regularizers: Mapping[str, Callable] | None = None,
    constraints: Mapping[str, Callable] | None = None,
    trainable: bool | tf.Tensor = True,
    weights: tf.Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: Renormalization | None = None,
    adjustment: Callable | None = None,
    zero_debias: bool = False,
    ema_variance: str = "biased",
    update: str = "collection",
    updates_collection: str = UPDATE_OPS_COLLECTION,
    skip_nonfinite: bool = True,
    kernel: str = "auto",
    fold: bool | str = False,
    sync: Any = None,
    activation: str | None = None,
    residual: tf.Tensor | Sequence[tf.Tensor] | None = None,
    bank: int | tf.Tensor | None = None,
    banks: int | None = None,
    bank_affine: bool = False,
    name: str | None = None,
    reuse: Any = None,
) -> tf.Tensor | list[tf.Tensor]:
    """Normalises `x` per channel, over all its other axes.

    Creates the variables `gamma`, `beta`, `moving_mean` and `moving_variance`, of
    shape [channels], under the variable scope `name`. They are float32, or float64
    for float64 `x`; so are the statistics. With several channel axes the variables
    have the rank of `x`, with sizes of 1 on the other axes.

    Three switches of fine-tuning are independent: `is_training` chooses the
    statistics to normalise with, `update` whether the moving ones follow,
    `trainable` whether gamma and beta are trained. A frozen layer is
    `is_training=False, trainable=False`.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of known rank, 2 or more, with
            a known number of channels; all other sizes may be unknown. Or a list of
            them, one for each device of this process: in training the statistics are
            those of all of them together, with one update. What is done for each is
            done on its device.
        is_training: a Python bool builds one branch; a scalar bool tensor or variable
            builds a `tf.cond` that computes the moments when it is true only.
        axis: the channel axis, in [-rank, rank), or several of them.
        decay: share of the old moving statistics that an update keeps, in [0, 1): a
            number or a scalar float tensor. After n updates the initial values still
            weigh decay^n. "cumulative" keeps n / (n + 1), so that they are the mean of
            those of all batches alike; `bn_tf1.WarmUp(decay)` at most
            (1 + n) / (10 + n). Both count n in the variable `num_updates`, a scalar
            that belongs in every checkpoint; each call that updates counts.
        epsilon: positive number added to the variance, in the unit of the variance.
        center: whether there is a `beta`.
        scale: whether there is a `gamma`.
        initializers: initializer by variable name; ones for `gamma` and
            `moving_variance`, zeros for `beta` and `moving_mean` otherwise.
        regularizers: regularizer by name, for `gamma` and `beta`. A regularizer of
            the enclosing variable scope does not apply to them.
        constraints: projection by name, for `gamma` and `beta`: a function from the
            variable to its new value, which the optimizer applies after each step.
        trainable: whether gamma and beta go to `TRAINABLE_VARIABLES`. With a scalar
            bool tensor they do; when it is false, they get gradients of 0 and the
            moving statistics do not change.
        weights: how much an example, or a value, counts in the batch statistics: a
            float tensor [batch], or one of the rank of `x` with size 1 on the channel
            axes, such as a mask [batch, time, 1]. A batch whose weights sum to 0 is
            normalised with the moving statistics. (`bn_tf1.statistics.weighted`)
        ghost_batch_size: normalises groups of so many examples by themselves; it must
            divide the batch in training, and does not matter in inference.
            (arXiv:1705.08741; `bn_tf1.statistics.ghost_batches` says which examples
            make a group)
        renorm: `bn_tf1.Renormalization(decay, rmin, rmax, dmax)`, so that training
            normalises nearly as inference does; adds the variables `moving_stddev`,
            `renorm_mean` and `renorm_stddev`. (arXiv:1702.03275)
        adjustment: a function from the shape of `x`, an int32 tensor, to a scale and
            an offset for the normalised values, which broadcast to it; it comes before
            gamma and beta, in training only.
        zero_debias: keeps bias-corrected moving statistics, with variables `biased`
            and `local_step` for each.
        ema_variance: the variance that enters the moving average: "biased" (divided
            by N, as `tf.nn.moments` gives) or "unbiased" (by N - 1, as the fused
            kernel gives). The output always uses the biased one.
        update: "collection" puts the two update operations into
            `updates_collection`, for the train op to run; "merged" leaves it to
            `make_train_op` to make one update by all calls of the layer that say so, by
            the joint statistics of their values (`bn_tf1.train_step.joint_updates`): no
            collection has it, and without `make_train_op` there is none, which
            `bn_tf1.lint` finds; "in_place" makes the output depend on the updates, so
            that they run whenever it is computed; "skip" makes none.
        updates_collection: the collection for `update="collection"`.
        skip_nonfinite: leaves the moving statistics as they are when a batch mean or
            variance is NaN or infinite. One such batch would spoil them for ever.
        kernel: "fused" computes the batch's statistics and the output in one operation,
            and their gradient in another; "composed" in several, with a gradient that
            is written by hand; "auto" takes the faster one for the dtype, the layout,
            the device and the version of TensorFlow; "compiled" is one operation of
            our own, with residual and activation in it, once `python -m bn_tf1 build` has
            made it (`bn_tf1/compiled/README.md`); "recipe" is for tools that read
            graphs: what articles draw, with TensorFlow's own operations and gradients
            alone, and no guards (`bn_tf1.recipe`). All mean the same, but a loss on the
            statistics themselves (`batch_norm_calls`) needs "composed", "compiled" or
            "recipe".
        fold: with `is_training=False`, scales the weights of the convolution or matrix
            product that `x` comes straight from, or by way of a `BiasAdd`, in place of
            its output: float32 or float64 `Conv2D`, `DepthwiseConv2dNative` or
            `MatMul`. True does it in each step, which costs one pass over the weights:
            it pays where the output is larger than they are. "once" does it when
            `tf.local_variables_initializer()` runs, and costs nothing in a step: run
            that by itself after every restore, since what it keeps, in local variables
            that no checkpoint holds, does not follow the others by itself. It passes no
            gradient to the weights, gamma and beta, and an exported graph would have to
            initialise it, too: to train, or to export, use True.
            (`bn_tf1.statistics.folded_weights`)
        sync: a `bn_tf1.Workers`, or a group of them: in training, the statistics are
            those of the batches of all its workers together, and so are their
            gradients. All must make the same runs. The check of one value per channel
            is then one of all of them. (`bn_tf1/workers/README.md`)
        activation: None, "relu" or "relu6": the output is
            activation(normalised + residual), whatever the mode and the kernel, to the
            bit what `tf.nn.relu(batch_norm(x) + residual)` gives. A place whose weight
            is 0 gets it as any other.
        residual: tensor of the shape and dtype of `x`, in which the sum is made, too,
            such as the shortcut of a residual block; or a list of them, where `x` is one.
            Of sizes that neither knows when the graph is built, 1 is repeated, as by `+`.
        bank, banks: with `banks`, the layer has so many sets of moving statistics, for
            kinds of data that must not be mixed: domains, real and generated, clean and
            adversarial examples (arXiv:1911.09665). A call normalises with, and updates,
            the set `bank` alone: an int in [0, banks), or a scalar int tensor that is one
            at run time. The variables of bank 0 are called as those of a layer without
            banks, the others' are below `bank_1`, `bank_2`, ...; every call makes or
            shares all of them. A tensor cannot be with `sync`.
        bank_affine: whether each bank has a gamma and a beta of its own. (To those of a
            bank that a tensor did not choose a gradient of 0 is applied: an optimizer
            with momentum still moves them.)
        name: the variable scope; `batch_norm`, made unique, by default.
        reuse: as for `tf.variable_scope`. A layer called again makes update operations
            again, which `make_train_op` runs in the order of the calls; in place, or run by
            hand, they take turns in no order. Choose for all of them `update="merged"`
            where they shall count as one batch, or for some `update="skip"` where the
            statistics shall follow the others alone.

    Returns:
        A tensor of the shape and dtype of `x`, or a list of them.

    Raises:
        TypeError: `x` is not a float tensor, `is_training` is not a bool or bool
            tensor, `axis` is not an int; or an argument has the name that another
            library gives it.
        ValueError: any other argument is outside of what is said above; there is one
            value per channel in training, so that its variance is 0; update
            operations for a collection, or to be merged, would belong to a `tf.cond`,
            `tf.while_loop` or function body, where the train op cannot run them; or a
            train op has merged the updates of the layer already.
        RuntimeError: eager execution is on.
        tf.errors.InvalidArgumentError: at run time, when a training step has one value
            per channel, or a batch that `ghost_batch_size` does not divide, and the
            shape of `x` did not tell; or when a tensor `bank` is not in [0, banks).
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "batch_norm builds graphs, but eager execution is on: call "
            "tf.disable_eager_execution() at the start of the program"
        )
    # A list of arrays is one tensor, as everywhere in TensorFlow; one of tensors is towers.
    towers = ()
    if isinstance(x, (list, tuple)) and x and all(map(tf.is_tensor, x)):
        x = towers = check_towers([tf.convert_to_tensor(tower) for tower in x])
    else:
        x = tf.convert_to_tensor(x, name="x")
    check_by_name("initializers", initializers, INITIALIZERS)
    check_by_name("regularizers", regularizers, LEARNED)
    check_by_name("constraints", constraints, LEARNED)
    is_name = isinstance(updates_collection, str) and updates_collection
    if update == "collection" and not is_name:
        must = "be the name of a collection; for updates without one there is "
        raise unfit(
            "updates_collection", updates_collection, must + 'update="in_place"'
        )
    if residual is not None:
        residual = checked_residual(residual, x)
    asked = Arguments(
        is_training=is_training,
        axis=axis,
        decay=decay,
        epsilon=epsilon,
        trainable=trainable,
        weights=weights,
        ghost_batch_size=ghost_batch_size,
        renorm=renorm,
        adjustment=adjustment,
        zero_debias=zero_debias,
        ema_variance=ema_variance,
        update=update,
        skip_nonfinite=skip_nonfinite,
        kernel=kernel,
        fold=fold,
        sync=sync,
        activation=activation,
        residual=residual,
        towers=len(towers),
        bank=bank,
        banks=banks,
        bank_affine=bank_affine,
    )
    # Nothing is in the graph before all of it is known to be right.
    arguments = check(towers[0] if towers else x, asked)
    plan = arguments.plan

    with tf.variable_scope(
        name, default_name="batch_norm", values=towers or [x], reuse=reuse
    ) as scope:
        # What an enclosing scope says about weights is not meant for these.
        scope.set_regularizer(None)
        scope.set_partitioner(None)
        # Before the variables: where there may be no updates, there shall be no layer.
        how = updating(arguments, scope.name)
        make = functools.partial(
            own_variable,
            shape=plan.parameter_shape,
            dtype=plan.dtype,
            trainable=arguments.trainable,
            regularizer=regularizers,
            constraint=constraints,
        )
        variables = make_variables(make, arguments, center, scale, initializers)
        y, to_collect = normalize_and_update(
            x, variables, arguments, how, layer=scope.name
        )
        if activation is not None or residual is not None:
            y = activated(y, arguments)
    for _, operation in to_collect:
        tf.add_to_collection(updates_collection, operation)
    return y
