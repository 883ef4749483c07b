"""The drop-in for slim: as a normalizer_fn, in an arg_scope, its errors, control flow.

What it computes is in test_drop_ins.py.
"""

import functools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import batch_norm_calls, make_train_op
from bn_tf1.slim import batch_norm
from tests import reference

ON_TF1 = tf.version.VERSION.startswith("1.")
needs_contrib = pytest.mark.skipif(not ON_TF1, reason="TensorFlow 2 has no contrib")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make_batch(*shape, seed=0):
    return np.random.RandomState(seed).normal(1.5, 0.8, shape).astype(np.float32)


def names(key):
    return [element.op.name for element in tf.get_collection(key)]


# --------------------------------------------------------------- in the company of slim


def contrib():
    import tensorflow

    return tensorflow.contrib


@needs_contrib
@pytest.mark.parametrize("layer", ["fully_connected", "conv2d"])
def test_as_a_normalizer_fn(layer, start):
    """The same variables and output as with the original in its place."""
    shape = (6, 4) if layer == "fully_connected" else (2, 5, 5, 3)
    x = tf.constant(make_batch(*shape))
    arguments = (5,) if layer == "fully_connected" else (5, 3)
    seen = []
    for scope, normalizer in [("a", contrib().layers.batch_norm), ("b", batch_norm)]:
        with tf.variable_scope(scope):
            y = getattr(contrib().layers, layer)(
                x,
                *arguments,
                weights_initializer=tf.ones_initializer(),
                normalizer_fn=normalizer,
                normalizer_params={"scale": True, "decay": 0.9},
            )
        made = [name[2:] for name in names("variables") if name.startswith(scope)]
        seen.append((made, y))
    (theirs, original), (ours, y) = seen
    assert ours == theirs
    np.testing.assert_allclose(*start().run([original, y]), **CLOSE)


@needs_contrib
def test_as_a_key_of_an_arg_scope(start):
    framework = contrib().framework
    wrapped = framework.add_arg_scope(batch_norm)
    with framework.arg_scope([wrapped], is_training=False, scale=True, scope="bn"):
        y = wrapped(tf.constant(make_batch(6, 4)))
    assert names("trainable_variables") == ["bn/beta", "bn/gamma"]
    expected = make_batch(6, 4) / np.sqrt(1.001)
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


def test_as_a_partial(start):
    """The other way to give it arguments, which needs no slim."""
    normalize = functools.partial(batch_norm, decay=0.5, is_training=True)
    y = normalize(tf.constant(make_batch(6, 4)))
    expected = reference.training_output(make_batch(6, 4))
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


# ---------------------------------------------------------------------------- behaviour


def test_the_train_op_knows_the_layer():
    y = batch_norm(tf.constant(make_batch(6, 4)), updates_collections="of_updates")
    (call,) = batch_norm_calls()
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    with pytest.raises(ValueError, match="BatchNorm"):
        make_train_op(tf.reduce_sum(y), optimizer)
    updates = tf.get_collection("of_updates")
    make_train_op(tf.reduce_sum(y), optimizer, update_ops=updates)
    assert len(call.updates) == len(updates) == 2


def test_other_collections_hold_tensors(start, variable_kind):
    """Whose values are the statistics after the update."""
    batch = make_batch(6, 4)
    batch_norm(tf.constant(batch), decay=0.0, updates_collections=["one", "two"])
    session = start()
    for key in ("one", "two"):
        assert names(key)[0].startswith("BatchNorm/AssignMovingAvg")
        mean, _ = session.run(tf.get_collection(key))
        np.testing.assert_allclose(mean, batch.mean(axis=0), **CLOSE)


@pytest.mark.parametrize("body", ["while", "cond"])
def test_updates_run_in_place_in_a_body(body, start, control_flow, variable):
    x = tf.constant(make_batch(6, 4))
    with tf.variable_scope("net", use_resource=True, reuse=tf.AUTO_REUSE):

        def build(h):
            return batch_norm(h, decay=0.5, scope="bn")

        if body == "cond":
            chosen = tf.placeholder_with_default(True, [])
            y = tf.cond(chosen, lambda: build(x), lambda: x)
        else:
            y = tf.while_loop(
                lambda step, h: step < 1, lambda step, h: (step + 1, build(h)), [0, x]
            )[1]
    assert tf.get_collection("update_ops") == []
    session = start()
    session.run(y)
    moving_mean = session.run(variable("net/bn/moving_mean"))
    np.testing.assert_allclose(moving_mean, make_batch(6, 4).mean(axis=0) / 2, **CLOSE)


def test_a_nonfinite_batch_leaves_the_statistics(start, variable):
    batch = make_batch(6, 4)
    batch[0, 0] = np.inf
    y = batch_norm(tf.constant(batch), updates_collections=None)
    session = start()
    session.run(y)
    moving_mean = session.run(variable("BatchNorm/moving_mean"))
    np.testing.assert_array_equal(moving_mean, np.zeros(4))


def test_float16_with_weights_keeps_float32_variables(start):
    x = tf.constant(make_batch(4, 3), tf.float16)
    y = batch_norm(x, batch_weights=tf.ones([4], tf.float16))
    assert y.dtype == tf.float16
    assert {v.dtype.base_dtype for v in tf.global_variables()} == {tf.float32}
    expected = reference.training_output(make_batch(4, 3))
    np.testing.assert_allclose(start().run(y), expected, atol=1e-2)


def test_regularizers_and_adjustment_count_with_weights(start):
    y = batch_norm(
        tf.constant(make_batch(4, 3)),
        batch_weights=tf.ones([4]),
        param_regularizers={"beta": tf.nn.l2_loss},
        adjustment=lambda shape: (2.0, 1.0),
    )
    assert len(tf.get_collection("regularization_losses")) == 1
    expected = 2 * reference.training_output(make_batch(4, 3)) + 1
    np.testing.assert_allclose(start().run(y), expected, **CLOSE)


def test_nchw_is_nhwc_transposed(start):
    """Also where the original's kernel has no NCHW, and with its unbiased variance."""
    batch = make_batch(4, 2, 5, 3)
    options = {"decay": 0.0, "updates_collections": None}
    nhwc = batch_norm(tf.constant(batch), scope="nhwc", **options)
    nchw = batch_norm(
        tf.constant(batch.transpose(0, 3, 1, 2)),
        scope="nchw",
        data_format="NCHW",
        **options,
    )
    session = start()
    outputs = session.run([nhwc, tf.transpose(nchw, [0, 2, 3, 1])])
    np.testing.assert_allclose(*outputs, **CLOSE)
    values = {v.op.name: session.run(v) for v in tf.global_variables()}
    moments = reference.moments(batch)
    for scope in ("nhwc", "nchw"):
        np.testing.assert_allclose(
            values[scope + "/moving_variance"],
            reference.unbiased(moments.variance, moments.count),
            **CLOSE,
        )


# ------------------------------------------------------------------------------- errors

ERRORS = {
    "data_format": ({"data_format": "NCWH"}, "either NCHW or NHWC. It is 'NCWH'"),
    "is_training": ({"is_training": None}, "`is_training` is None"),
    "reuse": ({"reuse": True}, "reuse=True cannot be used without"),
    "weights": ({"batch_weights": [1.0]}, "`batch_weights` has shape .*each example"),
    "renorm_collection": (
        {"renorm": True, "updates_collections": None},
        "`renorm` is True, but must be False",
    ),
    "renorm_debias": (
        {"renorm": True, "zero_debias_moving_mean": True},
        "`renorm` is True, but must be False",
    ),
    "clipping": (
        {"renorm": True, "renorm_clipping": {"max": 2.0}},
        "`renorm_clipping` has the key 'max'",
    ),
}


@pytest.mark.parametrize("options, message", list(ERRORS.values()), ids=list(ERRORS))
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(tf.zeros([4, 3]), **options)


@pytest.mark.parametrize(
    "shape, message",
    [(None, "undefined rank"), ((4, None), "undefined number of channels")],
)
def test_shapes_that_are_not_known(shape, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(tf.placeholder(tf.float32, shape))


@pytest.mark.parametrize(
    "function, name, node",
    [
        (tf.nn.relu, "relu", "BatchNorm/Relu"),
        (tf.nn.relu6, "relu6", "BatchNorm/Relu6"),
        (tf.nn.tanh, None, "BatchNorm/Tanh"),
    ],
)
def test_activations_that_the_layer_has_are_its_own(function, name, node):
    y = batch_norm(tf.zeros([4, 3, 3, 2]), activation_fn=function)
    (call,) = batch_norm_calls()
    assert (call.arguments.activation, y.op.name) == (name, node)


@pytest.mark.parametrize("mode", ["yes", 2])
def test_is_training_is_something_else(mode):
    with pytest.raises(TypeError, match="`is_training`"):
        batch_norm(tf.zeros([4, 3]), is_training=mode)


def test_an_integer_input():
    with pytest.raises(TypeError, match="int32"):
        batch_norm(tf.zeros([4, 3], tf.int32))
