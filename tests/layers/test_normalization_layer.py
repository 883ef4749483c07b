"""The drop-in for tf.layers: names, attributes, collections, modes, errors, install.

What it computes is in test_drop_ins.py and test_drop_ins_networks.py.
"""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import batch_norm_calls, layers, make_train_op
from bn_tf1.undoable_changes import works
from tests import reference

ON_TF1 = tf.version.VERSION.startswith("1.")
only_on_tf1 = pytest.mark.skipif(not ON_TF1, reason="TensorFlow 2.21 has no original")
NAMES = ["gamma", "beta", "moving_mean", "moving_variance"]
# A few roundings of float32 values of size 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make_batch(*shape, seed=0):
    return np.random.RandomState(seed).normal(1.5, 0.8, shape).astype(np.float32)


def names(variables):
    return [v.op.name for v in variables]


def collection(key):
    return tf.get_collection(key)


# --------------------------------------------------------------------------- arguments


def test_positional_arguments(start):
    """axis, momentum, epsilon, center, scale: as old code passes them."""
    x = tf.constant(make_batch(4, 3, 5))
    y = layers.batch_normalization(x, 1, 0.5, 0.1, False, True)
    assert names(tf.global_variables()) == [
        "batch_normalization/gamma",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
    ]
    expected = make_batch(4, 3, 5) / np.sqrt(1.1)
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


def test_the_names_of_the_original_module():
    assert layers.BatchNorm is layers.BatchNormalization
    assert layers.batch_norm is layers.batch_normalization


# ------------------------------------------------------------------------------- names


def test_numbering_and_scopes():
    x = tf.zeros([4, 3])
    layers.batch_normalization(x)
    layers.batch_normalization(x)
    layers.BatchNormalization()(x)
    with tf.variable_scope("net"):
        layers.batch_normalization(x)
        layers.batch_normalization(x, name="bn")
    scopes = ["batch_normalization" + end for end in ("", "_1", "_2")]
    scopes += ["net/batch_normalization", "net/bn"]
    assert names(tf.global_variables()) == [
        f"{scope}/{name}" for scope in scopes for name in NAMES
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(dtype):
    layer = layers.BatchNormalization()
    y = layer(tf.zeros([4, 3], dtype), training=True)
    assert y.dtype == tf.as_dtype(dtype)
    assert layer.dtype == dtype
    expected = tf.float64 if dtype == "float64" else tf.float32
    assert {v.dtype.base_dtype for v in layer.variables} == {expected}


@pytest.mark.parametrize(
    "shape, options, expected",
    [
        ((4, 3), {}, [3]),
        ((4, 5, 3), {"axis": 1}, [5]),
        ((4, 5, 3), {"axis": [1]}, [5]),
        ((4, 5, 3), {"axis": [1, 2]}, [1, 5, 3]),
        ((4, 3), {"virtual_batch_size": 2}, [1, 1, 3]),
        ((4, 5, 3), {"virtual_batch_size": 2, "axis": 1}, [1, 1, 5, 1]),
        ((4, 5, 3), {"virtual_batch_size": 2, "axis": [1, 2]}, [1, 1, 5, 3]),
    ],
)
def test_shapes(shape, options, expected):
    layer = layers.BatchNormalization(**options)
    y = layer(tf.zeros(shape), training=True)
    assert y.shape.as_list() == list(shape)
    assert [v.shape.as_list() for v in layer.variables] == [expected] * 4


def test_a_scope_object_as_name():
    with tf.variable_scope("outer") as scope:
        pass
    layers.batch_normalization(tf.zeros([4, 3]), name=scope)
    assert names(tf.global_variables()) == ["outer/" + name for name in NAMES]


def test_a_scope_at_the_first_call():
    layer = layers.BatchNormalization()
    layer(tf.zeros([4, 3]), scope="late")
    assert layer.scope_name == "late"


# ------------------------------------------------------------------------------- reuse


def test_reuse_by_name(start):
    x = tf.constant(make_batch(8, 3))
    first = layers.batch_normalization(x, training=True, name="bn")
    second = layers.batch_normalization(x, training=True, name="bn", reuse=True)
    assert len(tf.global_variables()) == 4
    assert len(collection("update_ops")) == 4
    np.testing.assert_array_equal(*start().run([first, second]))


def test_reuse_from_an_enclosing_scope():
    x = tf.zeros([4, 3])
    with tf.variable_scope("net"):
        layers.batch_normalization(x)
    with tf.variable_scope("net", reuse=True):
        layers.batch_normalization(x)
    assert names(tf.global_variables()) == [
        "net/batch_normalization/" + name for name in NAMES
    ]


def test_reuse_without_a_name():
    layers.batch_normalization(tf.zeros([4, 3]))
    layers.batch_normalization(tf.zeros([4, 3]), reuse=True)
    assert len(tf.global_variables()) == 4


def test_a_name_taken_without_reuse():
    layers.batch_normalization(tf.zeros([4, 3]), name="bn")
    with pytest.raises(ValueError, match="bn/gamma already exists"):
        layers.batch_normalization(tf.zeros([4, 3]), name="bn")


def test_a_layer_called_twice_shares_its_variables():
    layer = layers.BatchNormalization(name="bn")
    with tf.variable_scope("elsewhere"):
        layer(tf.zeros([4, 3]), training=True)
    layer(tf.zeros([6, 3]), training=True)
    assert len(tf.global_variables()) == 4
    assert layer.scope_name == "elsewhere/bn"
    assert layer.updates == collection("update_ops")
    assert len(layer.updates) == 4


# -------------------------------------------------------------------------- attributes


def test_attributes():
    layer = layers.BatchNormalization(axis=1, name="bn")
    assert not layer.built
    assert layer.dtype is None
    with pytest.raises(ValueError, match="bn"):
        assert layer.scope_name
    with pytest.raises(ValueError, match="bn"):
        layer.count_params()
    x = tf.zeros([4, 3, 5])
    layer.apply(x, training=tf.placeholder("bool"))
    assert layer.built
    assert layer.name == layer.scope_name == "bn"
    assert layer.axis == [1]
    assert layer.gamma is tf.trainable_variables()[0]
    assert layer.beta is tf.trainable_variables()[1]
    assert names([layer.moving_mean, layer.moving_variance]) == [
        "bn/moving_mean",
        "bn/moving_variance",
    ]
    assert layer.trainable_variables == collection("trainable_variables")
    assert layer.non_trainable_variables == tf.global_variables()[2:]
    assert layer.variables == layer.weights == tf.global_variables()
    assert layer.updates == collection("update_ops")
    assert all(isinstance(update, tf.Operation) for update in layer.updates)
    assert layer.get_updates_for(x) == layer.updates
    assert layer.get_updates_for(None) == []
    assert layer.get_updates_for(tf.zeros([])) == []
    assert layer.count_params() == 12
    assert layer.losses == layer.get_losses_for(None) == []
    assert layer.compute_output_shape((4, 3, 5)) == (4, 3, 5)
    with pytest.raises(AttributeError, match="gama"):
        assert layer.gama


@pytest.mark.parametrize("missing", ["center", "scale"])
def test_without_center_or_scale(missing):
    layer = layers.BatchNormalization(**{missing: False})
    layer(tf.zeros([4, 3]), training=True)
    assert (layer.beta is None) == (missing == "center")
    assert (layer.gamma is None) == (missing == "scale")
    assert len(layer.variables) == 3
    assert len(layer.trainable_variables) == 1


def test_build_by_hand():
    layer = layers.BatchNormalization()
    layer.build((None, 3))
    assert names(layer.variables) == ["batch_normalization/" + name for name in NAMES]
    layer(tf.zeros([4, 3]))
    assert len(tf.global_variables()) == 4


@only_on_tf1
def test_layer_names_count_as_the_originals_do():
    """`name` is one ahead of the scope there; old code compares neither."""
    originals = [tf.layers.BatchNormalization().name for _ in range(2)]
    assert [layers.BatchNormalization().name for _ in range(2)] == originals


def test_a_subclass():
    class Normalize(layers.BatchNormalization):
        def call(self, inputs, training=True):
            return 2 * super().call(inputs, training=training)

    Normalize()(tf.zeros([4, 3]))
    assert names(tf.global_variables())[0] == "normalize/gamma"
    assert len(collection("update_ops")) == 2


# ------------------------------------------------------------------------- collections


def test_not_trainable(start):
    layer = layers.BatchNormalization(trainable=False)
    layer(tf.zeros([4, 3]), training=True)
    assert collection("trainable_variables") == collection("update_ops") == []
    assert layer.trainable_variables == layer.updates == []
    assert len(layer.non_trainable_variables) == 4


def test_trainable_switched_off_later():
    layer = layers.BatchNormalization()
    layer(tf.zeros([4, 3]), training=True)
    layer.trainable = False
    assert layer.updates == layer.trainable_weights == []
    assert names(layer.weights) == ["batch_normalization/" + name for name in NAMES]


def test_a_tensor_trainable(start):
    trainable = tf.placeholder(tf.bool, [])
    x = tf.constant(make_batch(8, 3))
    y = layers.batch_normalization(x, training=True, trainable=trainable)
    gradients = tf.gradients(y**3 + y, tf.trainable_variables())
    assert len(gradients) == len(collection("update_ops")) == 2
    session = start()
    assert np.all(np.array(session.run(gradients, {trainable: True})[1]) != 0)
    frozen = session.run(gradients, {trainable: False})
    np.testing.assert_array_equal(frozen, np.zeros([2, 3]))


def test_regularizers_once_under_reuse(start):
    def regularizer(variable):
        return tf.reduce_sum(variable) + 1

    for reuse in (None, True):
        layer = layers.BatchNormalization(
            beta_regularizer=regularizer,
            gamma_regularizer=regularizer,
            _scope="bn",
            _reuse=reuse,
        )
        layer(tf.zeros([4, 3]))
        layer(tf.zeros([4, 3]))
        assert len(layer.losses) == (0 if reuse else 2)
    losses = collection("regularization_losses")
    assert names(losses)[0].startswith("bn/gamma/Regularizer")
    assert start().run(losses) == [4.0, 1.0]


def test_the_regularizer_of_a_scope_applies_too():
    """As in the original, where it reaches the moving statistics as well."""
    with tf.variable_scope("net", regularizer=tf.nn.l2_loss):
        layers.batch_normalization(tf.zeros([4, 3]), gamma_regularizer=tf.nn.l2_loss)
    assert len(collection("regularization_losses")) == 5


def test_constraints(start):
    def half(variable):
        return variable / 2

    layer = layers.BatchNormalization(gamma_constraint=half, beta_constraint=half)
    y = layer(tf.constant(make_batch(8, 3)))
    assert layer.gamma_constraint is layer.beta_constraint is half
    train_op = tf.train.GradientDescentOptimizer(0.0).minimize(tf.reduce_sum(y))
    session = start()
    session.run(train_op)
    np.testing.assert_array_equal(session.run(layer.gamma), [0.5] * 3)


def test_initializers(start):
    layer = layers.BatchNormalization(
        beta_initializer=tf.constant_initializer(2.0),
        gamma_initializer="zeros",
        moving_mean_initializer=tf.ones_initializer,
        moving_variance_initializer=tf.constant_initializer([1.0, 2.0, 3.0]),
    )
    layer(tf.zeros([4, 3]))
    values = start().run(layer.variables)
    np.testing.assert_array_equal(values, [[0] * 3, [2] * 3, [1] * 3, [1, 2, 3]])


def test_a_partitioner_splits_gamma_and_beta_alone(start):
    partitioner = tf.fixed_size_partitioner(2)
    with tf.variable_scope("net", partitioner=partitioner):
        layer = layers.BatchNormalization()
        y = layer(tf.constant(make_batch(8, 4)), training=True)
    assert len(tf.global_variables()) == 2 + 2 + 1 + 1
    assert len(layer.trainable_variables) == 4
    expected = reference.training_output(make_batch(8, 4))
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


def test_a_custom_getter_sees_every_variable():
    seen = []

    def custom_getter(getter, name, *args, **kwargs):
        seen.append(name)
        return getter(name, *args, **kwargs)

    with tf.variable_scope("net", custom_getter=custom_getter):
        layers.batch_normalization(tf.zeros([4, 3]), renorm=True)
    assert len(seen) == 7


def test_the_train_op_knows_the_layer():
    y = layers.batch_normalization(tf.zeros([4, 3]), training=True)
    (call,) = batch_norm_calls()
    assert call.name == "batch_normalization"
    assert list(call.updates) == collection("update_ops")
    with pytest.raises(ValueError, match="batch_normalization"):
        make_train_op(
            tf.reduce_sum(y), tf.train.GradientDescentOptimizer(0.1), update_ops=[]
        )


# ------------------------------------------------------------------------------- modes

MODES = {
    "bool": (lambda: True, 2),
    "int": (lambda: 1, 2),
    "numpy": (lambda: np.bool_(True), 2),
    "constant": (lambda: tf.constant(True), 2),
    "placeholder": (lambda: tf.placeholder_with_default(True, []), 2),
    "unknown_shape": (lambda: tf.placeholder_with_default(True, None), 2),
    "variable": (lambda: tf.Variable(True, trainable=False), 2),
    "false": (lambda: False, 0),
    "zero": (lambda: 0, 0),
    "constant_false": (lambda: tf.constant(False), 0),
    "none": (lambda: None, 0),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_training(mode, start):
    make_mode, updates = MODES[mode]
    y = layers.batch_normalization(tf.constant(make_batch(8, 3)), training=make_mode())
    assert len(collection("update_ops")) == updates
    expected = reference.training_output(make_batch(8, 3))
    if not updates:
        expected = make_batch(8, 3) / np.sqrt(1.001)
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


@pytest.mark.parametrize("mode", ["yes", 2, 0.5])
def test_training_is_something_else(mode):
    with pytest.raises(TypeError, match="`training`"):
        layers.batch_normalization(tf.zeros([4, 3]), training=mode)


def test_inputs_of_unknown_sizes(start):
    x = tf.placeholder(tf.float32, [None, None, None, 3])
    y = layers.batch_normalization(x, training=True)
    assert y.shape.as_list() == [None, None, None, 3]
    batch = make_batch(2, 3, 4, 3)
    output = start().run(y, {x: batch})
    np.testing.assert_allclose(output, reference.training_output(batch), **CLOSE)


@pytest.mark.parametrize("kind", ["numpy", "variable"])
def test_inputs_that_convert(kind, start):
    batch = make_batch(8, 3)
    x = tf.Variable(batch, trainable=False) if kind == "variable" else batch
    y = layers.batch_normalization(x, training=True)
    output = start().run(y)
    np.testing.assert_allclose(output, reference.training_output(batch), **CLOSE)


def test_statistics_converge_and_inference_follows(start):
    """The whole cycle: train with UPDATE_OPS, then evaluate with what they left."""
    x, training = tf.placeholder(tf.float32, [8, 4, 3]), tf.placeholder(tf.bool)
    layer = layers.BatchNormalization(axis=1, momentum=0.5)
    y = layer(x, training=training)
    session, batch = start(), make_batch(8, 4, 3)
    for _ in range(30):
        trained, _, _ = session.run([y] + layer.updates, {x: batch, training: True})
    moments = reference.moments(batch, axis=1)
    mean, variance = session.run([layer.moving_mean, layer.moving_variance])
    np.testing.assert_allclose(mean, moments.mean, **CLOSE)
    np.testing.assert_allclose(variance, moments.variance, **CLOSE)
    np.testing.assert_allclose(
        session.run(y, {x: batch, training: False}), trained, **CLOSE
    )


@pytest.mark.parametrize(
    "shape, options, correction",
    [
        ((4, 2, 3, 3), {}, 24 / 23),
        ((4, 2, 3, 3), {"fused": True, "axis": -1}, 24 / 23),
        ((4, 3, 2, 3), {"axis": 1}, 24 / 23),
        ((4, 3, 2, 3), {"axis": [-3]}, 24 / 23),
        ((4, 2, 3, 3), {"fused": False}, 1.0),
        ((4, 3, 3, 2), {"axis": 2, "fused": True}, 1.0),
        ((8, 3, 3), {"fused": True}, 1.0),
        ((4, 2, 3, 3), {"virtual_batch_size": 4}, 1.0),
        ((4, 2, 3, 3), {"adjustment": lambda shape: (1.0, 0.0)}, 1.0),
    ],
)
def test_which_variance_the_moving_one_follows(shape, options, correction, start):
    batch = make_batch(*shape)
    layer = layers.BatchNormalization(momentum=0.0, **options)
    layer(tf.constant(batch), training=True)
    assert layer.fused == (correction != 1.0)
    session = start()
    session.run(layer.updates)
    axis = options.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) else axis
    expected = reference.moments(batch, axis).variance * correction
    actual = session.run(layer.moving_variance).ravel()
    np.testing.assert_allclose(actual, expected, **CLOSE)


def test_nchw_is_nhwc_transposed(start):
    batch = make_batch(4, 2, 5, 3)
    outputs = [
        layers.batch_normalization(tf.constant(batch), training=True),
        tf.transpose(
            layers.batch_normalization(
                tf.constant(batch.transpose(0, 3, 1, 2)), axis=1, training=True
            ),
            [0, 2, 3, 1],
        ),
    ]
    np.testing.assert_allclose(*start().run(outputs), **CLOSE)


# ---------------------------------------------------------------- what is right here


def test_a_nonfinite_batch_leaves_the_statistics(start):
    batch = make_batch(8, 3)
    batch[0, 0] = np.nan
    layer = layers.BatchNormalization()
    y = layer(tf.constant(batch), training=True)
    session = start()
    output, _, _ = session.run([y] + layer.updates)
    assert np.all(np.isnan(output[:, 0]))
    np.testing.assert_array_equal(session.run(layer.moving_mean), np.zeros(3))


def test_ghost_batches_evaluate_with_any_size(start):
    x, training = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.bool)
    y = layers.batch_normalization(x, training=training, virtual_batch_size=4)
    session = start()
    output = session.run(y, {x: make_batch(5, 3), training: False})
    np.testing.assert_allclose(output, make_batch(5, 3) / np.sqrt(1.001), **CLOSE)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must divide"):
        session.run(y, {x: make_batch(5, 3), training: True})


@pytest.mark.parametrize("body", ["while", "cond"])
def test_updates_run_in_place_in_a_body(body, start, control_flow):
    """A variable by reference cannot be assigned in a body of control flow v2."""
    with tf.variable_scope("net", use_resource=True):
        layer = layers.BatchNormalization(momentum=0.5)
        x = tf.constant(make_batch(8, 3))

        def build(h):
            return layer(h, training=True)

        if body == "cond":
            y = tf.cond(
                tf.placeholder_with_default(True, []), lambda: build(x), lambda: x
            )
        else:
            y = tf.while_loop(
                lambda step, h: step < 1, lambda step, h: (step + 1, build(h)), [0, x]
            )[1]
    assert collection("update_ops") == []
    session = start()
    session.run(y)
    expected = make_batch(8, 3).mean(axis=0) / 2
    np.testing.assert_allclose(session.run(layer.moving_mean), expected, **CLOSE)


def test_evaluation_leaves_every_bit(start, control_flow, variable_kind):
    x, training = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.bool)
    layer = layers.BatchNormalization(renorm=True)
    y = layer(x, training=training)
    session = start()
    session.run([y] + layer.updates, {x: make_batch(8, 3), training: True})
    before = session.run(layer.variables)
    session.run([y] + layer.updates, {x: make_batch(5, 3), training: False})
    for one, other in zip(session.run(layer.variables), before):
        assert one.tobytes() == other.tobytes()


# ------------------------------------------------------------------------------ errors

ERRORS = {
    "axis_tuple": ({"axis": (1,)}, TypeError, "`axis` is .*int or a list"),
    "axis_too_large": ({"axis": [1, 4]}, ValueError, "axis 4"),
    "axis_too_small": ({"axis": [-5, 1]}, ValueError, "axis -1"),
    "axis_twice": ({"axis": [1, 2, 1]}, ValueError, "duplicate axis"),
    "virtual_batch": ({"virtual_batch_size": -1}, ValueError, "is -1.*positive"),
    "virtual_axis": ({"virtual_batch_size": 2, "axis": 0}, ValueError, "include 0"),
    "virtual_adjustment": (
        {"virtual_batch_size": 2, "adjustment": abs},
        ValueError,
        "`adjustment` cannot be given",
    ),
    "clipping": (
        {"renorm": True, "renorm_clipping": {"max": 2.0}},
        ValueError,
        "`renorm_clipping` has the key 'max'",
    ),
}


@pytest.mark.parametrize(
    "options, error, message", list(ERRORS.values()), ids=list(ERRORS)
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        layers.batch_normalization(tf.zeros([6, 5, 4, 3]), **options)


@only_on_tf1
@pytest.mark.parametrize(
    "options, error, message", list(ERRORS.values()), ids=list(ERRORS)
)
def test_the_original_raises_the_same(options, error, message):
    with pytest.raises(error):
        tf.layers.batch_normalization(tf.zeros([6, 5, 4, 3]), **options)


@pytest.mark.parametrize(
    "shape, message", [(None, "undefined rank"), ((4, None), "axis 1.*undefined")]
)
def test_shapes_that_are_not_known(shape, message):
    with pytest.raises(ValueError, match=message):
        layers.batch_normalization(tf.placeholder(tf.float32, shape))


def test_another_shape_at_the_second_call():
    layer = layers.BatchNormalization(name="bn")
    layer(tf.zeros([4, 3]))
    for shape in ((4, 5), (4, 5, 3)):
        with pytest.raises(ValueError, match="incompatible with the layer 'bn'"):
            layer(tf.zeros(shape))


def test_fused_float64(start):
    """Which the original's kernel does not take, so that it fails."""
    batch = make_batch(4, 2, 2, 3).astype(np.float64)
    layer = layers.BatchNormalization(momentum=0.0, fused=True)
    y = layer(tf.constant(batch), training=True)
    session = start()
    output, _, _ = session.run([y] + layer.updates)
    np.testing.assert_allclose(output, reference.training_output(batch), rtol=1e-12)
    moments = reference.moments(batch)
    np.testing.assert_allclose(
        session.run(layer.moving_variance),
        reference.unbiased(moments.variance, moments.count),
        rtol=1e-12,
    )


def test_an_integer_input():
    with pytest.raises(TypeError, match="int32"):
        layers.batch_normalization(tf.zeros([4, 3], tf.int32))


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match="momentun"):
        layers.BatchNormalization(momentun=0.9)


def test_another_librarys_keyword():
    words = "BatchNormalization has no argument `decay`: here it is `momentum`"
    with pytest.raises(TypeError, match=words):
        layers.BatchNormalization(decay=0.9)


# ----------------------------------------------------------------------------- install

INSTALL_PROBE = """
import sys
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()

def works():
    try:
        return bool(tf.layers.batch_normalization and tf.layers.BatchNormalization)
    except AttributeError:
        return False

from bn_tf1 import layers
before, loaded = works(), set(sys.modules)
replaced = layers.install()
assert layers.install() == ()
assert not [name for name in set(sys.modules) - loaded if "contrib" in name]
y = tf.layers.batch_normalization(tf.zeros([4, 3]), training=True)
from tensorflow.compat.v1 import layers as imported
print(before, len(tf.get_collection("update_ops")), *replaced)
assert imported.BatchNormalization is tf.layers.BatchNormalization
"""


def test_install():
    """In a process of its own: it changes TensorFlow, when and only when called."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INSTALL_PROBE],
        check=False,
        capture_output=True,
        text=True,
    )
    # From 2.0 to 2.15, and beside tf_keras, it works.
    if works(tf.layers, "batch_normalization"):
        expected = "True 2"
    else:
        module = "tf.compat.v1.layers."
        expected = f"False 2 {module}batch_normalization {module}BatchNormalization"
    assert result.stdout.strip() == expected, result.stdout + result.stderr
