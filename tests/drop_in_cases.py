"""What the drop-ins and the originals are put through, call by call.

`record(case, origin)` builds the graph of a case with the batch norm of `origin`, which
is a module with the names of `tf.layers` or of slim, and returns all that can be seen of
it: tests compare it with what the originals gave. `tests/fixtures/make_drop_ins.py`
wrote that down on TensorFlow 1.15.5.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

STEPS = 3
COLLECTIONS = (
    "variables",
    "trainable_variables",
    "model_variables",
    "of_all",
    "of_beta",
    "of_moving_mean",
)


class Case(NamedTuple):
    """A call, or several.

    Attributes:
        shape: of the input.
        options: arguments of the batch norm.
        mode: True, False, or "tensor" for a placeholder.
        dtype: of the input.
        known: whether the graph knows the batch size.
        calls: calls(origin, x, mode, options) makes the calls and returns the output.
        run_updates: False where several calls update the same variables, so that the
            order of the updates, which is left to chance, decides.
    """

    shape: tuple[int, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    mode: Any = "tensor"
    dtype: str = "float32"
    known: bool = True
    calls: Any = None
    run_updates: bool = True


# ----------------------------------------------------------- arguments that are functions


def regularizer(variable):
    return 0.1 * tf.reduce_sum(tf.square(variable))


def half(variable):
    return variable / 2


def adjustment(shape):
    """A scale and an offset for each example and channel, which the shape decides."""
    channels = tf.cast(tf.range(shape[-1]), tf.float32)
    examples = tf.cast(tf.range(shape[0]), tf.float32)
    examples = tf.reshape(examples, tf.concat([shape[:1], 0 * shape[1:] + 1], 0))
    return 1.0 + 0.1 * channels + 0.01 * examples, 0.2 * channels - 0.05


def constants(**values):
    return {key: tf.constant_initializer(value) for key, value in values.items()}


# -------------------------------------------------------------------- calls, tf.layers


def layers_once(origin, x, mode, options):
    return origin.batch_normalization(x, training=mode, **options)


def positional(origin, x, mode, options):
    return origin.batch_normalization(x, -1, 0.5, 0.1, True, False, training=mode)


def class_once(origin, x, mode, options):
    return origin.BatchNormalization(**options)(x, training=mode)


def one_layer_twice(origin, x, mode, options):
    layer = origin.BatchNormalization(name="bn", **options)
    with tf.variable_scope("elsewhere"):
        x = layer(x, training=mode)
    return layer.apply(2 * x + 1, training=mode)


def layers_numbered(origin, x, mode, options):
    x = origin.batch_normalization(x, training=mode)
    x = origin.batch_normalization(x, training=mode)
    with tf.variable_scope("net"):
        x = origin.batch_normalization(x, training=mode)
        x = origin.batch_normalization(x, training=mode, name="bn")
    with tf.variable_scope("batch_normalization"):
        x = origin.batch_normalization(x, training=mode)
    return origin.BatchNormalization()(x, training=mode)


def layers_reused(origin, x, mode, options):
    with tf.variable_scope("net"):
        x = origin.batch_normalization(x, training=mode)
    with tf.variable_scope("net", reuse=True):
        x = origin.batch_normalization(x, training=mode)
    with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
        x = origin.batch_normalization(x, training=mode)
        x = origin.batch_normalization(x, training=mode, name="bn")
    x = origin.batch_normalization(x, training=mode, name="net/bn", reuse=True)
    return origin.batch_normalization(
        x, training=mode, name="net/bn", reuse=tf.AUTO_REUSE
    )


def layers_regularized_twice(origin, x, mode, options):
    for reuse in (None, True):
        x = origin.batch_normalization(
            x, training=mode, name="bn", reuse=reuse, gamma_regularizer=regularizer
        )
    return x


def layers_in_a_scope(origin, x, mode, options):
    partitioner = tf.fixed_size_partitioner(2)
    with tf.variable_scope("net", partitioner=partitioner):
        x = origin.batch_normalization(x, training=mode)
    with tf.variable_scope("other", regularizer=regularizer) as scope:
        x = origin.batch_normalization(x, training=mode)
    return origin.batch_normalization(x, training=mode, name=scope)


# ------------------------------------------------------------------------- calls, slim


def slim_once(origin, x, mode, options):
    return origin.batch_norm(x, is_training=mode, **options)


def slim_positional(origin, x, mode, options):
    return origin.batch_norm(x, 0.5, False, True, 0.1, tf.nn.relu, is_training=mode)


def slim_numbered(origin, x, mode, options):
    x = origin.batch_norm(x, is_training=mode)
    x = origin.batch_norm(x, is_training=mode, scale=True)
    with tf.variable_scope("net"):
        x = origin.batch_norm(x, is_training=mode)
        x = origin.batch_norm(x, is_training=mode, fused=False)
    return origin.batch_norm(x, is_training=mode, scope="bn")


def slim_reused(origin, x, mode, options):
    for fused, reuse in ((True, None), (False, True), (True, tf.AUTO_REUSE)):
        x = origin.batch_norm(
            x,
            is_training=mode,
            scope="net/bn",
            reuse=reuse,
            fused=fused,
            scale=True,
            param_regularizers={"gamma": regularizer},
            **options,
        )
    return x


def slim_partitioned(origin, x, mode, options):
    with tf.variable_scope("net", partitioner=tf.fixed_size_partitioner(2)):
        return origin.batch_norm(x, is_training=mode, scale=True, **options)


RANK2, RANK3, RANK4, RANK5 = (6, 4), (4, 3, 4), (4, 2, 3, 4), (4, 2, 2, 3, 2)
FOUND = constants(
    beta=0.5, gamma=1.5, moving_mean=0.25, moving_variance=[1.0, 4.0, 2.0, 0.5]
)
BY_NAME = {key + "_initializer": value for key, value in FOUND.items()}

LAYERS_CASES = {
    "rank2": Case(RANK2),
    "rank2_axis_0": Case(RANK2, {"axis": 0}),
    "rank2_unknown_batch": Case(RANK2, known=False),
    "rank2_true": Case(RANK2, mode=True),
    "rank2_false": Case(RANK2, mode=False),
    "rank2_one": Case(RANK2, mode=1),
    "rank2_zero": Case(RANK2, mode=0),
    "rank2_numpy": Case(RANK2, mode=np.bool_(True)),
    "rank3": Case(RANK3),
    "rank3_axis_1": Case(RANK3, {"axis": 1}),
    "rank3_axis_minus_2": Case(RANK3, {"axis": -2}),
    "rank3_axis_list": Case(RANK3, {"axis": [1]}),
    "rank3_axes": Case(RANK3, {"axis": [1, 2]}),
    "rank3_axes_unordered": Case(RANK3, {"axis": [-1, 0]}),
    "rank4": Case(RANK4),
    "rank4_true": Case(RANK4, mode=True),
    "rank4_false": Case(RANK4, mode=False),
    "rank4_fused": Case(RANK4, {"fused": True}),
    "rank4_not_fused": Case(RANK4, {"fused": False}),
    "rank4_unknown_batch": Case(RANK4, known=False),
    "rank4_axis_1_not_fused": Case(RANK4, {"axis": 1, "fused": False}),
    "rank4_axis_2": Case(RANK4, {"axis": 2}),
    "rank4_axes": Case(RANK4, {"axis": [1, 3]}),
    "rank5": Case(RANK5),
    "rank5_axis_1": Case(RANK5, {"axis": 1}),
    "rank5_axes": Case(RANK5, {"axis": [1, 4]}),
    "rank3_fused": Case(RANK3, {"fused": True}),
    "float16": Case(RANK2, dtype="float16"),
    "float16_rank4": Case(RANK4, dtype="float16"),
    "float64": Case(RANK2, dtype="float64"),
    "float64_rank4": Case(RANK4, {"fused": False}, dtype="float64"),
    "momentum": Case(RANK4, {"momentum": 0.5, "epsilon": 0.1}),
    "momentum_0": Case(RANK2, {"momentum": 0.0}),
    "no_center": Case(RANK4, {"center": False}),
    "no_scale": Case(RANK4, {"scale": False}),
    "neither": Case(RANK3, {"center": False, "scale": False}),
    "initializers": Case(RANK2, BY_NAME),
    "regularizers": Case(
        RANK3, {"beta_regularizer": regularizer, "gamma_regularizer": regularizer}
    ),
    "constraints": Case(RANK2, {"beta_constraint": half, "gamma_constraint": half}),
    "not_trainable": Case(RANK2, {"trainable": False}),
    "not_trainable_true": Case(RANK4, {"trainable": False}, mode=True),
    "renorm": Case(RANK2, {"renorm": True}),
    "renorm_true": Case(RANK3, {"renorm": True}, mode=True),
    "renorm_clipped": Case(
        RANK2,
        {
            "renorm": True,
            "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1},
            "renorm_momentum": 0.6,
        },
    ),
    "renorm_rank4_axis_1": Case(
        RANK4, {"renorm": True, "axis": 1, "renorm_clipping": {"rmax": 3.0}}
    ),
    "renorm_axes": Case(RANK3, {"renorm": True, "axis": [1, 2], "momentum": 0.7}),
    "renorm_initializers": Case(RANK2, dict(renorm=True, **BY_NAME)),
    "renorm_adjustment": Case(RANK3, {"renorm": True, "adjustment": adjustment}),
    "renorm_virtual": Case((6, 3, 2), {"renorm": True, "virtual_batch_size": 3}),
    "virtual": Case(RANK2, {"virtual_batch_size": 3}),
    "virtual_true": Case(RANK2, {"virtual_batch_size": 2}, mode=True),
    "virtual_full": Case(RANK4, {"virtual_batch_size": 4}),
    "virtual_rank4_axis_1": Case(RANK4, {"virtual_batch_size": 2, "axis": 1}),
    "virtual_rank4": Case(RANK4, {"virtual_batch_size": 2, "axis": -1}),
    "virtual_axes": Case(RANK5, {"virtual_batch_size": 2, "axis": [1, 4]}),
    "virtual_unknown_batch": Case(RANK2, {"virtual_batch_size": 2}, known=False),
    "virtual_no_scale": Case(RANK3, {"virtual_batch_size": 2, "scale": False}),
    "adjustment": Case(RANK2, {"adjustment": adjustment}),
    "adjustment_rank4": Case(RANK4, {"adjustment": adjustment}),
    "adjustment_no_scale": Case(RANK4, {"adjustment": adjustment, "scale": False}),
    "positional": Case(RANK3, calls=positional),
    "class": Case(RANK4, {"momentum": 0.8}, calls=class_once),
    "one_layer_twice": Case(RANK2, calls=one_layer_twice, run_updates=False),
    "numbered": Case(RANK2, calls=layers_numbered),
    "reused": Case(RANK2, calls=layers_reused, run_updates=False),
    "regularized_twice": Case(RANK2, calls=layers_regularized_twice, run_updates=False),
    "in_a_scope": Case(RANK2, calls=layers_in_a_scope),
}

BY_KEY = {"beta": ["of_beta"], "moving_mean": ["of_moving_mean"]}
OTHER = {"updates_collections": "of_updates"}
IN_PLACE = {"updates_collections": None}
DEBIASED = {"zero_debias_moving_mean": True}
WEIGHTS = {"batch_weights": np.float32([1.0, 2.0, 0.0, 0.5])}

SLIM_CASES = {
    "rank2": Case(RANK2),
    "rank2_scale": Case(RANK2, {"scale": True}),
    "rank2_true": Case(RANK2, mode=True),
    "rank2_false": Case(RANK2, mode=False),
    "rank2_not_fused": Case(RANK2, {"fused": False}),
    "rank2_nchw": Case(RANK2, {"data_format": "NCHW", "fused": False}),
    "rank2_unknown_batch": Case(RANK2, known=False),
    "rank3": Case(RANK3, {"scale": True}),
    "rank3_nchw": Case(RANK3, {"data_format": "NCHW"}),
    "rank4": Case(RANK4, {"scale": True}),
    "rank4_true": Case(RANK4, mode=True),
    "rank4_false": Case(RANK4, mode=False),
    "rank4_not_fused": Case(RANK4, {"fused": False}),
    "rank4_nchw_not_fused": Case(RANK4, {"data_format": "NCHW", "fused": False}),
    "rank5": Case(RANK5, {"scale": True}),
    "float16": Case(RANK4, {"scale": True}, dtype="float16"),
    "float64": Case(RANK3, {"scale": True}, dtype="float64"),
    "decay": Case(RANK4, {"decay": 0.5, "epsilon": 0.1}),
    "no_center": Case(RANK2, {"center": False}),
    "no_center_rank3": Case(RANK3, {"center": False}),
    "activation": Case(RANK2, {"activation_fn": tf.nn.relu}),
    "initializers": Case(RANK2, {"scale": True, "param_initializers": FOUND}),
    "initializers_rank4": Case(RANK4, {"scale": True, "param_initializers": FOUND}),
    "regularizers": Case(
        RANK2,
        {
            "scale": True,
            "param_regularizers": {"beta": regularizer, "gamma": regularizer},
        },
    ),
    "regularizers_rank4": Case(RANK4, {"param_regularizers": {"beta": regularizer}}),
    "in_place_rank2": Case(RANK2, IN_PLACE),
    "in_place_rank3": Case(RANK3, IN_PLACE),
    "in_place_rank4": Case(RANK4, IN_PLACE),
    "in_place_true": Case(RANK4, IN_PLACE, mode=True),
    "other_collection_rank2": Case(RANK2, OTHER),
    "other_collection_rank3": Case(RANK3, dict(scale=True, **OTHER)),
    "other_collection_rank4": Case(RANK4, dict(scale=True, **OTHER), mode=True),
    "two_collections": Case(RANK4, {"updates_collections": ["of_updates", "more"]}),
    "variables_list": Case(RANK2, {"variables_collections": ["of_all"]}),
    "variables_list_rank4": Case(
        RANK4, {"variables_collections": ["of_all"], "scale": True}
    ),
    "variables_dict": Case(RANK2, {"variables_collections": BY_KEY, "scale": True}),
    "variables_dict_rank3": Case(RANK3, {"variables_collections": BY_KEY}),
    "outputs": Case(RANK2, {"outputs_collections": "of_outputs", "scope": "bn"}),
    "outputs_rank4": Case(RANK4, {"outputs_collections": ["of_outputs"]}),
    "not_trainable_rank2": Case(RANK2, {"trainable": False}),
    "not_trainable_rank4": Case(RANK4, {"trainable": False}),
    "not_trainable_weighted": Case(RANK4, dict(trainable=False, **WEIGHTS)),
    "weights_rank2": Case((4, 3), WEIGHTS),
    "weights_rank3_nchw": Case(RANK3, dict(data_format="NCHW", scale=True, **WEIGHTS)),
    "weights_rank4": Case(RANK4, dict(scale=True, **WEIGHTS)),
    "weights_true": Case(RANK4, WEIGHTS, mode=True),
    "weights_false": Case(RANK4, WEIGHTS, mode=False),
    "weights_in_place": Case(RANK4, dict(WEIGHTS, **IN_PLACE)),
    "zero_debias_rank2": Case(RANK2, dict(decay=0.7, **DEBIASED)),
    "zero_debias_rank3": Case(RANK3, dict(decay=0.7, **DEBIASED)),
    "zero_debias_rank4": Case(RANK4, dict(decay=0.7, **DEBIASED), mode=True),
    "zero_debias_in_place": Case(RANK4, dict(DEBIASED, **IN_PLACE), mode=True),
    "renorm": Case(RANK2, {"renorm": True, "scale": True, "renorm_decay": 0.6}),
    "renorm_clipped": Case(
        RANK4,
        {"renorm": True, "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1}},
    ),
    "adjustment": Case(RANK4, {"adjustment": adjustment}),
    "positional": Case(RANK3, calls=slim_positional),
    "numbered": Case(RANK4, calls=slim_numbered),
    "numbered_rank2": Case(RANK2, calls=slim_numbered),
    "reused": Case(RANK4, calls=slim_reused, run_updates=False),
    "reused_rank2": Case(
        RANK2,
        {"variables_collections": ["of_all"]},
        calls=slim_reused,
        run_updates=False,
    ),
    "partitioned": Case(RANK2, calls=slim_partitioned),
    "partitioned_rank4": Case(RANK4, calls=slim_partitioned),
    "partitioned_weighted": Case(RANK4, WEIGHTS, calls=slim_partitioned),
}


class Record(NamedTuple):
    """What can be seen of a case.

    Attributes:
        numbers: arrays by what they are.
        texts: names, shapes and counts by what they are, of types that JSON has.
    """

    numbers: dict[str, np.ndarray]
    texts: dict[str, Any]


def record(case: Case, origin: Any, once: Callable) -> Record:
    """Builds the graph of `case` in the default graph, and runs it.

    Args:
        case: the case.
        origin: a module with the batch norms.
        once: what calls it where the case has no `calls`.
    """
    shape = case.shape if case.known else (None,) + case.shape[1:]
    x = tf.placeholder(case.dtype, shape, name="x")
    mode = tf.placeholder(tf.bool, [], "mode") if case.mode == "tensor" else case.mode
    y = (case.calls or once)(origin, x, mode, dict(case.options))
    texts = _texts(y)
    if case.mode != "tensor":
        texts["output"] = y.op.name
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        numbers = _values(session, "initial/")
        _set_variables(session)
        _run_steps(case, session, x, mode, y, numbers)
    return Record(numbers, texts)


def _texts(y):
    texts = {
        key: [variable.op.name for variable in tf.get_collection(key)]
        for key in COLLECTIONS
    }
    for key in ("update_ops", "of_updates", "more", "of_outputs"):
        texts["number of " + key] = len(tf.get_collection(key))
    losses = tf.get_collection("regularization_losses")
    texts["regularization_losses"] = sorted(loss.op.name for loss in losses)
    texts["shapes"] = {
        v.op.name: [v.shape.as_list(), v.dtype.base_dtype.name]
        for v in tf.global_variables()
    }
    texts["constrained"] = [
        v.op.name for v in tf.trainable_variables() if v.constraint is not None
    ]
    texts["output shape"] = y.shape.as_list()
    texts["aliases"] = getattr(y, "aliases", None)
    return texts


def _values(session, prefix):
    variables = tf.global_variables()
    values = session.run(variables)
    return {prefix + v.op.name: value for v, value in zip(variables, values)}


def _set_variables(session):
    """Gives the variables values that differ and that no initializer gave them."""
    for variable in tf.global_variables():
        leaf = variable.op.name.split("/")[-1]
        if leaf in ("biased", "local_step"):
            continue
        values = np.linspace(0.5, 1.5, variable.shape.num_elements())
        values = values.reshape(variable.shape.as_list())
        if leaf in ("beta", "moving_mean", "renorm_mean"):
            values = values - 0.75
        variable.load(values, session)


def _run_steps(case, session, x, mode, y, numbers):
    random = np.random.RandomState(len(case.shape))
    dy = random.randint(-4, 5, case.shape) / 4.0
    targets = [x] + tf.trainable_variables()
    loss = tf.reduce_sum(y * tf.constant(dy, y.dtype))
    gradients = tf.gradients(loss, targets)
    names = ["x"] + [variable.op.name for variable in tf.trainable_variables()]
    updates = []
    if case.run_updates:
        updates = tf.get_collection("update_ops") + tf.get_collection("of_updates")
    losses = tf.get_collection("regularization_losses")
    if losses:
        numbers["regularization"] = session.run(tf.add_n(losses))

    def run(key, is_training, seen):
        feed = {x: random.normal(0.5, 1.5, case.shape).astype(case.dtype)}
        if case.mode == "tensor":
            feed[mode] = is_training
        values = session.run([y] + gradients + updates, feed)
        if not seen:
            return
        numbers[key + "/y"] = values[0]
        for name, value in zip(names, values[1:]):
            numbers[key + "/gradient/" + name] = value
        numbers.update(_values(session, key + "/"))

    for step in range(STEPS):
        run(f"step {step}", True, seen=step in (0, STEPS - 1))
    if case.mode == "tensor":
        run("inference", False, seen=True)
