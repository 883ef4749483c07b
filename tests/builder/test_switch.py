"""What `is_training` switches, and what training refuses: one value per channel."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")


def make_input(case, dtype, sizes):
    """A placeholder for x: the channels are known, the other sizes by `sizes`."""
    shape = list(case.shape)
    if sizes == "unknown_sizes":
        shape = [None] * len(shape)
        shape[case.axis] = case.shape[case.axis]
    return tf.placeholder(dtype, shape)


# ------------------------------------------------------------------------- the switch

COMPOSED_MOMENT_OPS = {"SquaredDifference", "Mean", "Sum", "BiasAddGrad"}
COMPOSED_MOMENT_OPS |= {"EuclideanNorm", "BatchMatMulV2"}
MOMENT_OPS = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}
MOMENT_OPS |= COMPOSED_MOMENT_OPS


@pytest.mark.parametrize("sizes", ["known_sizes", "unknown_sizes"])
@pytest.mark.parametrize("update", ["collection", "in_place"])
@pytest.mark.parametrize("name", ["rank2", "rank4_nhwc", "rank4_nchw"])
def test_a_tensor_switch_computes_batch_moments_in_training_alone(
    name, update, sizes, start, control_flow, graph, executed_op_types
):
    """What one run executes, from its trace: no pass over x but the output's."""
    case = reference.CASES[name]
    x = make_input(case, "float32", sizes)
    is_training = tf.placeholder(tf.bool, [])
    y = bn_tf1.batch_norm(x, is_training, axis=case.axis, update=update)
    start()
    batch = reference.make_batch(case, "float32")
    fetches = [y, graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)]
    trained = executed_op_types(fetches, {x: batch, is_training: True})
    evaluated = executed_op_types(fetches, {x: batch, is_training: False})
    assert trained & MOMENT_OPS, trained
    # A fused kernel may also serve inference, with the statistics as its inputs.
    moments = evaluated & COMPOSED_MOMENT_OPS
    assert not moments, moments


@pytest.mark.parametrize("name", ["rank2", "rank4_nhwc", "rank4_nchw"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
def test_a_python_switch_builds_one_branch(name, is_training, graph):
    case = reference.CASES[name]
    x = tf.constant(reference.make_batch(case, "float32"), tf.float32)
    bn_tf1.batch_norm(x, is_training, axis=case.axis, skip_nonfinite=False)
    ops = {op.type for op in graph.get_operations()}
    assert not ops & {"Switch", "Merge", "If", "StatelessIf"}
    if not is_training:
        assert not ops & COMPOSED_MOMENT_OPS
        assert not graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)


@pytest.mark.parametrize("update", ["collection", "in_place", "skip"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("is_training", [True, False], ids=["batch", "moving"])
def test_the_three_switches_are_independent(
    is_training, trainable, update, start, variable, graph
):
    case = reference.CASES["rank2"]
    batch = reference.make_batch(case, "float32")
    y = bn_tf1.batch_norm(
        tf.constant(batch, tf.float32), is_training, trainable=trainable, update=update
    )
    session = start()
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    assert len(updates) == (2 if is_training and update == "collection" else 0)
    names = {v.op.name for v in tf.trainable_variables()}
    assert names == ({"batch_norm/gamma", "batch_norm/beta"} if trainable else set())

    output, _ = session.run([y, updates])
    moments = reference.moments(batch)
    mean, variance = (moments.mean, moments.variance) if is_training else (0.0, 1.0)
    mean, variance = np.broadcast_to(mean, [5]), np.broadcast_to(variance, [5])
    expected = reference.normalize(batch, mean, variance)
    allowed = reference.output_tolerance(
        batch, expected, mean, variance, 1.0, -1, 1e-3, "float32"
    )
    reference.assert_within(output, expected, allowed, "output")
    moving_mean = session.run(variable("batch_norm/moving_mean"))
    updated = bool(is_training and update != "skip")
    assert np.any(moving_mean != 0) == updated


# --------------------------------------------------------------- one value per channel


def test_one_value_per_channel_passes_at_run_time_in_inference(start, control_flow):
    x = tf.placeholder(tf.float32, [None, 3])
    is_training = tf.placeholder(tf.bool, [])
    with tf.variable_scope("tower"):
        y = bn_tf1.batch_norm(x, is_training, name="last_layer")
    session = start()
    one_row, two_rows = np.ones([1, 3]), np.eye(2, 3)
    output = session.run(y, {x: one_row, is_training: False})
    np.testing.assert_allclose(output, one_row / np.sqrt(1 + 1e-3), rtol=1e-6)
    session.run(y, {x: two_rows, is_training: True})
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(y, {x: one_row, is_training: True})
    for part in ["tower/last_layer", "a larger batch or is_training=False", "[1 3]"]:
        assert part in caught.value.message


@pytest.mark.parametrize("kernel", ["fused", "composed"])
@pytest.mark.parametrize("ema_variance", ["biased", "unbiased"])
def test_a_known_batch_of_one_value_can_be_switched(kernel, ema_variance, start):
    is_training = tf.placeholder(tf.bool, [])
    x = tf.ones([1, 3])
    y = bn_tf1.batch_norm(x, is_training, kernel=kernel, ema_variance=ema_variance)
    session = start()
    output = session.run(y, {is_training: False})
    np.testing.assert_allclose(output, np.ones([1, 3]) / np.sqrt(1 + 1e-3), rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        session.run(y, {is_training: True})


@pytest.mark.parametrize("update", ["collection", "in_place", "skip"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)], ids=["rank2", "rank4"])
def test_one_value_per_channel_fails_in_a_training_run(shape, update, start, graph):
    x = tf.placeholder(tf.float32, (None,) + shape[1:])
    y = bn_tf1.batch_norm(x, True, update=update, name="last_layer")
    session = start()
    fetches = [y, graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)]
    session.run(fetches, {x: np.zeros((2,) + shape[1:])})
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(fetches, {x: np.zeros(shape)})
    assert "last_layer" in caught.value.message


def test_one_value_per_channel_leaves_the_statistics_alone(start, variable, graph):
    """The update ops by themselves, without the output, are guarded as well."""
    x = tf.placeholder(tf.float32, [None, 3])
    bn_tf1.batch_norm(x, True, ema_variance="unbiased")
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    session = start()
    with pytest.raises(tf.errors.InvalidArgumentError):
        session.run(updates, {x: np.ones([1, 3])})
    moving = session.run(
        [variable("batch_norm/moving_mean"), variable("batch_norm/moving_variance")]
    )
    np.testing.assert_array_equal(moving, [[0] * 3, [1] * 3])


def test_a_known_single_value_with_a_tensor_switch_fails_when_training(start):
    is_training = tf.placeholder(tf.bool, [])
    y = bn_tf1.batch_norm(tf.ones([1, 3]), is_training, name="last_layer")
    session = start()
    session.run(y, {is_training: False})
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(y, {is_training: True})
    assert "last_layer" in caught.value.message
