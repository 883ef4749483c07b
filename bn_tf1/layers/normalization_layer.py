"""The drop-in for `tf.layers.batch_normalization` and `tf.layers.BatchNormalization`.

    - y = tf.layers.batch_normalization(x, training=is_training)
    + from bn_tf1 import layers
    + y = layers.batch_normalization(x, training=is_training)

Contract: the arguments, their order and defaults, the variables, scopes, collections,
attributes and results that TensorFlow 1.15 documents. For code that cannot be edited,
see `tf_layers_module`.

Which variance `moving_variance` follows is the original's choice, whatever kernel
computes it: the unbiased one where its fused kernel would run (rank 4, one axis of
channels that is 1 or 3, no `fused=False`, renorm, virtual batches or adjustment), the
biased one elsewhere.

Where the original is wrong, this is not:
- `virtual_batch_size` does not have to divide the batch in inference
  (arXiv:1705.08741 has no ghost batches there); in training the error names both.
- A call inside of a `tf.cond`, `tf.while_loop` or function updates the statistics in
  place. The original puts operations into UPDATE_OPS that no train op can run, or that
  silently stop it (tensorflow#14699, #6087).
- A batch with a NaN or an infinity does not spoil the statistics (tensorflow#34062).
- One value per channel in training, whose output would be beta whatever the input, is
  an error.
- `fused` may be True for float64 inputs, and float16 and bfloat16 inputs are normalised
  in float32 with every kernel.
- `trainable` may be a bool tensor: when it is false, gamma and beta get gradients of 0
  and the statistics do not change.
- Parts of a partitioned gamma or beta are among `trainable_variables`.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167); the
documentation of `tf.layers`, TensorFlow 1.15.
"""

from __future__ import annotations

import numbers
from typing import Any

import tensorflow.compat.v1 as tf

from bn_tf1 import statistics
from bn_tf1.arguments import Arguments, check, says_how_it_is_called, unfit
from bn_tf1.drop_in import (
    checked_mode,
    renormalization,
    switched_or_not,
    unpartitioned,
    with_original_name,
)
from bn_tf1.layers.legacy_layer import InputSpec, LegacyLayer
from bn_tf1.moving_averages import updating
from bn_tf1.normalization import normalize_and_update
from bn_tf1.variables import (
    COUNTER,
    INITIALIZERS,
    LEARNED,
    OF_STATISTICS,
    LayerVariables,
    make_variables,
)

_ZEROS = tf.zeros_initializer()
_ONES = tf.ones_initializer()
_CALLED = {
    "decay": "momentum",
    "renorm_decay": "renorm_momentum",
    "ghost_batch_size": "virtual_batch_size",
}


@says_how_it_is_called
def batch_normalization(
    inputs: Any,
    axis: int | list = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Any = _ZEROS,
    gamma_initializer: Any = _ONES,
    moving_mean_initializer: Any = _ZEROS,
    moving_variance_initializer: Any = _ONES,
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    beta_constraint: Any = None,
    gamma_constraint: Any = None,
    training: Any = False,
    trainable: Any = True,
    name: Any = None,
    reuse: Any = None,
    renorm: bool = False,
    renorm_clipping: dict | None = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Any = None,
    *,
    sync: Any = None,
    kernel: str = "auto",
    update: str = "collection",
    bank: Any = None,
    banks: int | None = None,
    bank_affine: bool = False,
) -> tf.Tensor:
    """Normalises `inputs`; as `tf.layers.batch_normalization`.

    Args:
        inputs: float tensor of known rank, or what converts to one.
        training: whether to normalise with the statistics of the batch and to make
            updates of the moving ones: a bool, 0 or 1, or a bool tensor or variable.
            The updates are in `UPDATE_OPS`.
        name: the variable scope; `batch_normalization`, made unique, by default.
        reuse: whether the variables exist already.
        bank: as for `bn_tf1.batch_norm`.

    The other arguments are those of `BatchNormalization`; so are the errors.

    Returns:
        A tensor of the shape and dtype of `inputs`.
    """
    layer = BatchNormalization(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        center=center,
        scale=scale,
        beta_initializer=beta_initializer,
        gamma_initializer=gamma_initializer,
        moving_mean_initializer=moving_mean_initializer,
        moving_variance_initializer=moving_variance_initializer,
        beta_regularizer=beta_regularizer,
        gamma_regularizer=gamma_regularizer,
        beta_constraint=beta_constraint,
        gamma_constraint=gamma_constraint,
        renorm=renorm,
        renorm_clipping=renorm_clipping,
        renorm_momentum=renorm_momentum,
        fused=fused,
        trainable=trainable,
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        sync=sync,
        kernel=kernel,
        update=update,
        banks=banks,
        bank_affine=bank_affine,
        name=name,
        _reuse=reuse,
        _scope=name,
    )
    return layer.apply(inputs, training=training, bank=bank)


class BatchNormalization(LegacyLayer):
    """Batch normalization as a layer; as `tf.layers.BatchNormalization`.

    Args:
        axis: the channel axis, or a list of them. With several, the variables have the
            rank of the inputs, with sizes of 1 on the other axes.
        momentum: share of the old moving statistics that an update keeps; or what else
            the `decay` of `bn_tf1.batch_norm` may be.
        epsilon: added to the variance.
        center, scale: whether there is a `beta` and a `gamma`.
        beta_initializer, gamma_initializer, moving_mean_initializer,
            moving_variance_initializer: initializers of the variables.
        beta_regularizer, gamma_regularizer: functions of a variable whose results go to
            `REGULARIZATION_LOSSES`.
        beta_constraint, gamma_constraint: functions from a variable to its new value,
            which an optimizer applies after each step.
        renorm: batch renormalization (arXiv:1702.03275), with the variables
            `moving_stddev`, `renorm_mean` and `renorm_stddev`.
        renorm_clipping: bounds of the correction: `rmax`, `rmin` and `dmax`.
        renorm_momentum: share of the old `renorm_mean` and `renorm_stddev` that an
            update keeps.
        fused: False, or None or True: see the module. Which kernel runs is for the
            library to choose.
        trainable: whether gamma and beta are trainable; if not, there are no updates.
        virtual_batch_size: normalises ghost batches of so many examples
            (arXiv:1705.08741); it must divide the batch in training. The variables get
            the rank of the inputs plus one.
        adjustment: a function from the shape of the inputs, a tensor, to a scale and an
            offset for the normalised values, before gamma and beta, in training only.
        name: the variable scope, a string or a `tf.VariableScope`.
        sync, kernel, update, banks, bank_affine: as for `bn_tf1.batch_norm`; the original
            has no such thing, and updates as "collection" says. The `bank` is for each
            call to choose.
        **kwargs: `dtype`, that of the layer; by default that of its first input.

    Raises:
        TypeError: `axis` is not an int or a list, `training` is none of what it may be,
            the inputs are not floats, or an argument is not known.
        ValueError: an axis or another argument cannot be, or the shape of the inputs
            is not known as far as needed, or does not fit the layer.
        RuntimeError: eager execution is on.
    """

    # Code that compares kernels sets this to False, to feed the biased variance always; the
    # original has it under this name.
    _bessels_correction_test_only = True

    def __init__(
        self,
        axis: int | list = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = _ZEROS,
        gamma_initializer: Any = _ONES,
        moving_mean_initializer: Any = _ZEROS,
        moving_variance_initializer: Any = _ONES,
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: Any = True,
        virtual_batch_size: int | None = None,
        adjustment: Any = None,
        name: Any = None,
        *,
        sync: Any = None,
        kernel: str = "auto",
        update: str = "collection",
        banks: int | None = None,
        bank_affine: bool = False,
        **kwargs: Any,
    ):
        super().__init__(trainable=trainable, name=name, **kwargs)
        if not isinstance(axis, (numbers.Integral, list)):
            raise unfit("axis", axis, "be an int or a list of ints", TypeError)
        # A copy: `build` makes the axes positive, and the caller's list may be for others.
        self.axis = axis[:] if isinstance(axis, list) else axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        for key, value in {
            "beta_initializer": beta_initializer,
            "gamma_initializer": gamma_initializer,
            "moving_mean_initializer": moving_mean_initializer,
            "moving_variance_initializer": moving_variance_initializer,
        }.items():
            setattr(self, key, _checked_initializer(key, value))
        for key, value in {
            "beta_regularizer": beta_regularizer,
            "gamma_regularizer": gamma_regularizer,
            "beta_constraint": beta_constraint,
            "gamma_constraint": gamma_constraint,
        }.items():
            setattr(self, key, _checked_function(key, value))
        self.renorm = renorm
        self.virtual_batch_size = virtual_batch_size
        self.adjustment = adjustment
        self.sync = sync
        self.kernel = kernel
        self.update = update
        self.banks = banks
        self.bank_affine = bank_affine
        self.fused = True if fused is None else fused
        if renorm:
            self.renorm_clipping = renorm_clipping or {}
            self.renorm_momentum = renorm_momentum
            self._renormalization()  # of keys that are not known, here and now

    def build(self, input_shape: Any) -> None:
        """Makes the variables for inputs of `input_shape`, whose rank is known."""
        shape = tf.TensorShape(input_shape)
        if not shape.ndims:
            raise ValueError(
                f"`inputs` has undefined rank or none: its shape is {shape}, but must "
                "have at least one axis: call set_shape"
            )
        # As attributes after the build, too, which the original changes in this way.
        self.axis = _checked_axes(self.axis, shape)
        self._check_virtual_batches()
        self.fused = bool(self.fused) and self._original_is_fused(shape.ndims)
        sizes = {axis: tf.dimension_value(shape[axis]) for axis in self.axis}
        self.input_spec = InputSpec(ndim=shape.ndims, axes=sizes)
        variables = make_variables(
            self._variable_maker(self._parameter_shape(shape)),
            self._asked(),
            self.center,
            self.scale,
            {role: getattr(self, f"{role}_initializer") for role in INITIALIZERS},
        )
        for role, variable in variables._asdict().items():
            # Of the original, too, a layer without renormalisation lacks the attributes.
            if variable is not None or role in (*LEARNED, "num_updates"):
                setattr(self, role, variable)
        self.built = True

    def call(
        self, inputs: tf.Tensor, training: Any = False, *, bank: Any = None
    ) -> tf.Tensor:
        """Normalises `inputs`, with the statistics that `training` and `bank` say."""
        if not inputs.dtype.is_floating:
            raise TypeError(
                f"`inputs` has dtype {inputs.dtype.name}, but must be a float tensor"
            )
        mode = checked_mode("training", training)
        arguments = check(inputs, self._asked(mode, bank), called=_CALLED)
        # In a branch or a loop its updates run with the output: the original's silently stop
        # the train op, or are never run.
        y, to_collect = normalize_and_update(
            inputs,
            self._layer_variables(),
            arguments,
            updating(arguments, self.scope_name, moves_in=True),
            layer=self.scope_name,
        )
        self.add_update([operation for _, operation in to_collect])
        return with_original_name(y, mode, fused=self.fused, kernel=arguments.kernel)

    def _asked(self, mode=None, bank=None):
        # From the attributes, each time: the original reads them so, and people set them.
        is_unbiased = self.fused and self._bessels_correction_test_only
        return Arguments(
            is_training=mode,
            axis=self.axis,
            decay=self.momentum,
            epsilon=self.epsilon,
            trainable=switched_or_not(self.trainable),
            ghost_batch_size=self.virtual_batch_size,
            renorm=self._renormalization(),
            adjustment=self.adjustment,
            sync=self.sync,
            ema_variance="unbiased" if is_unbiased else "biased",
            update="skip" if self.trainable is False else self.update,
            kernel=self.kernel,
            bank=bank,
            banks=self.banks,
            bank_affine=self.bank_affine,
            is_foldable=self.fused,
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The same shape."""
        return input_shape

    def _check_virtual_batches(self):
        size = self.virtual_batch_size
        # When it is built, as in the original: the axes are known only then.
        if size is None:
            return
        if size <= 0:
            must = "be a positive integer that divides the batch"
            raise unfit("virtual_batch_size", size, must)
        if 0 in self.axis:
            raise ValueError(
                f"`axis` is {self.axis}, but must not include 0 with "
                "`virtual_batch_size`: axis 0 counts the examples"
            )
        if self.adjustment is not None:
            raise ValueError("`adjustment` cannot be given with `virtual_batch_size`")

    def _original_is_fused(self, rank):
        # Of 1.15 on a CPU and a GPU alike: its kernel decides which variance is averaged.
        return (
            rank == 4
            and self.axis in ([1], [3])
            and not self.renorm
            and self.virtual_batch_size is None
            and self.adjustment is None
        )

    def _parameter_shape(self, shape):
        sizes = self.input_spec.axes
        kept_rank = [sizes.get(axis, 1) for axis in range(shape.ndims)]
        if self.virtual_batch_size is not None:
            # As the original, which keeps the axis that counts the virtual batches: its
            # checkpoints have variables of that shape.
            return kept_rank[:1] + [1] + kept_rank[1:]
        return kept_rank if len(sizes) > 1 else list(sizes.values())

    def _variable_maker(self, shape):
        # float32 for half-precision inputs: a float16 average stands still.
        dtype = statistics.statistics_dtype(self._dtype or tf.float32)

        def make(name, initializer):
            role = name.rpartition("/")[2]
            scope, options = self._scope, {"trainable": False, **OF_STATISTICS}
            if role in LEARNED:
                # Of these the original's may be in parts; an update takes no parts.
                scope = None
                kinds = ("regularizer", "constraint")
                options = {kind: getattr(self, f"{role}_{kind}") for kind in kinds}
            sizes = [] if role == COUNTER else shape
            with unpartitioned(scope):
                return self.add_weight(name, sizes, dtype, initializer, **options)

        return make

    def _layer_variables(self):
        own = (getattr(self, role, None) for role in LayerVariables._fields)
        return LayerVariables(*own)

    def _renormalization(self):
        if not self.renorm:
            return None
        return renormalization(True, self.renorm_clipping, self.renorm_momentum)


# The other names that the module tensorflow.python.layers.normalization has.
BatchNorm = BatchNormalization
batch_norm = batch_normalization


def _checked_axes(axis, shape):
    """`axis` as a list of axes that are not negative, with sizes that are known."""
    given = axis if isinstance(axis, list) else [axis]
    axes = [a + shape.ndims if a < 0 else a for a in given]
    for a in axes:
        if not 0 <= a < shape.ndims:
            raise ValueError(
                f"`axis` is {axis}: there is no axis {a} in inputs of shape {shape}"
            )
        if tf.dimension_value(shape[a]) is None:
            raise ValueError(
                f"`inputs` has shape {shape}, whose size on axis {a} is undefined, but "
                "must be known: call set_shape"
            )
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` is {axis}, which has a duplicate axis")
    return axes


def _checked_initializer(argument, value):
    """An initializer, also if it is given by its name or by its class."""
    # Keras's configurations have names, and its users classes.
    if isinstance(value, str):
        value = getattr(tf, value.lower() + "_initializer", value)
    if value is not None and not callable(value):
        must = "be an initializer, such as tf.ones_initializer()"
        raise unfit(argument, value, must)
    return value() if isinstance(value, type) else value


def _checked_function(argument, value):
    if value is not None and not callable(value):
        raise unfit(argument, value, "be a function of a variable, or None")
    return value
