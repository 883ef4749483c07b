"""A list of tensors, one for each device: as the joint batch, each on its device."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1

DEVICES = tf.ConfigProto(device_count={"CPU": 2})


def build(sizes, towers, is_training, dtype, **options):
    """(outputs, gradients for inputs and parameters, statistics after a step)."""
    random = np.random.RandomState(0)
    x = (random.randn(sum(sizes), 4, 6) * 2 + 3).astype(dtype)
    dy = random.randn(*x.shape).astype(dtype)
    x, places = tf.constant(x), np.cumsum((0, *sizes))
    xs = [x]
    if towers:
        xs = []
        for i, (first, end) in enumerate(zip(places, places[1:])):
            with tf.device(f"/cpu:{i}"):
                xs.append(tf.identity(x[first:end]))
    with tf.variable_scope("towers" if towers else "whole"):
        y = bn_tf1.batch_norm(xs if towers else x, is_training, **options)
    ys = y if towers else [y]
    variables = tf.trainable_variables(tf.get_variable_scope().name or None)[-2:]
    dx, *slopes = tf.gradients(tf.concat(ys, 0), [x, *variables], [dy])
    call = bn_tf1.batch_norm_calls()[-1]
    with tf.control_dependencies([dx, *call.updates]):
        moving = [call.moving_mean.read_value(), call.moving_variance.read_value()]
    return [tf.concat(ys, 0), dx, *slopes, *moving], xs, ys


@pytest.mark.parametrize(
    "sizes, options, mode, dtype",
    [
        ((3, 5), {}, "tensor", "float64"),
        ((3, 5), {}, False, "float64"),
        ((3, 5), {}, True, "float32"),
        ((4, 0), {"update": "in_place"}, True, "float64"),
        ((6, 2), {"ema_variance": "unbiased"}, True, "float64"),
        ((3, 5), {"renorm": bn_tf1.Renormalization(0.9, 0.5, 2, 1)}, True, "float64"),
    ],
)
def test_as_the_joint_batch(sizes, options, mode, dtype):
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    is_training = tf.placeholder_with_default(True, []) if mode == "tensor" else mode
    joint, _, _ = build(sizes, False, is_training, dtype, **options)
    towers, _, ys = build(sizes, True, is_training, dtype, **options)
    with tf.Session(config=DEVICES) as session:
        session.run(tf.global_variables_initializer())
        for one, other in zip(session.run(towers), session.run(joint)):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
        alone, whole = session.run(ys[0]), session.run(ys)[0]
        assert alone.shape == whole.shape == (sizes[0], 4, 6)


def test_each_tower_s_work_is_on_its_device():
    _, _, ys = build((3, 5), True, True, "float32")
    assert [y.device[-5:] for y in ys] == ["CPU:0", "CPU:1"]
    large = [
        op
        for op in tf.get_default_graph().get_operations()
        for tensor in op.outputs
        if tensor.shape.ndims and tensor.shape.as_list() == [5, 4, 6]
    ]
    assert len(large) > 5
    # Cut out of one here; and zeros for outputs that nothing uses, which nothing runs.
    others = {op.type for op in large if op.device[-5:] != "CPU:1"}
    assert others <= {"Slice", "ZerosLike"}


@pytest.mark.parametrize(
    "others, options, message",
    [
        ([tf.float64, [8, 4]], {}, "must have one dtype and one rank"),
        ([tf.float32, [8, 4, 4]], {}, "must have one dtype and one rank"),
        (
            [tf.float32, [8, 4]],
            {"ghost_batch_size": 2},
            "`ghost_batch_size` is 2, but must be None with a list",
        ),
        ([tf.float32, [8, 4]], {"adjustment": len}, "`adjustment` .* None with a list"),
        ([tf.float32, [8, 4]], {"kernel": "fused"}, "the fused kernel has no"),
        ([tf.float32, [8, 4]], {"kernel": "recipe"}, "the recipe cannot have `towers`"),
    ],
)
def test_what_is_refused(others, options, message):
    xs = [tf.placeholder(tf.float32, [8, 4]), tf.placeholder(*others)]
    with pytest.raises(ValueError, match=message):
        bn_tf1.batch_norm(xs, True, **options)


def test_a_loop_over_towers_with_one_that_updates():
    """The other policy: each tower its own statistics, the first one's are averaged."""
    losses = []
    for i in range(2):
        with tf.device(f"/cpu:{i}"), tf.variable_scope("net", reuse=i > 0):
            y = bn_tf1.batch_norm(
                tf.random_normal([8, 4]),
                True,
                name="bn",
                update="skip" if i else "collection",
            )
            losses.append(tf.reduce_mean(y))
    bn_tf1.make_train_op(tf.add_n(losses), tf.train.GradientDescentOptimizer(0.1))
