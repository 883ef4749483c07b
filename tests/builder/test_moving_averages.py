"""`update_moving_average` by itself: the formula, the guard, zero_debias."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

# The second oracle, which has no public name in TensorFlow.
from tensorflow.python.training.moving_averages import assign_moving_average

import bn_tf1
from bn_tf1 import moving_averages
from tests import reference

VALUES = np.random.RandomState(0).normal(2.0, 3.0, size=(6, 4))
INITIAL = np.array([0.0, 1.0, -2.0, 1e3])
DECAY = 0.9


def make_moving(dtype, name="moving", initial=INITIAL):
    return tf.get_variable(
        name, dtype=tf.as_dtype(dtype), initializer=initial.astype(dtype)
    )


def rounding(dtype):
    """Relative to values of size 1e3: each step rounds four times."""
    return 4 * len(VALUES) * reference.ROUNDING[dtype]


def test_the_collection_is_tensorflows():
    assert moving_averages.UPDATE_OPS_COLLECTION == tf.GraphKeys.UPDATE_OPS
    assert bn_tf1.UPDATE_OPS_COLLECTION == tf.GraphKeys.UPDATE_OPS


@pytest.mark.parametrize("apply", ["python_true", "tensor_true"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectory(dtype, decay, apply, start, variable_kind):
    """In float64 too: the decay must not pass through float32 on its way."""
    moving = make_moving(dtype)
    value = tf.placeholder(dtype, [4])
    switch = True if apply == "python_true" else tf.constant(True)
    update = moving_averages.update_moving_average(moving, value, decay, apply=switch)
    assert isinstance(update, tf.Operation)
    session = start()
    trajectory = reference.moving_average(INITIAL, VALUES, decay)
    for batch, expected in zip(VALUES, trajectory):
        assert session.run(update, {value: batch}) is None
        allowed = rounding(dtype) * (1e3 + np.abs(expected))
        assert np.all(np.abs(session.run(moving) - expected) <= allowed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tensor_apply_computes_the_same_bits_as_a_python_one(dtype, start):
    """The guard does not change the formula: not by one rounding of the decay."""
    plain, guarded = make_moving(dtype, "plain"), make_moving(dtype, "guarded")
    value = tf.placeholder(dtype, [4])
    update = moving_averages.update_moving_average
    updates = [
        update(plain, value, DECAY),
        update(guarded, value, DECAY, apply=tf.constant(True)),
    ]
    session = start()
    for batch in VALUES:
        session.run(updates, {value: batch})
        np.testing.assert_array_equal(*session.run([plain, guarded]))


@pytest.mark.parametrize("form", ["subtracted_difference", "weighted_sum"])
def test_both_forms_of_the_formula(form, start):
    """moving - (1 - decay) * (moving - value) is moving * decay + value * (1 - decay).

    They round differently, so that they agree within the rounding and no closer.
    """
    moving = make_moving("float32")
    value = tf.placeholder(tf.float32, [4])
    update = moving_averages.update_moving_average(moving, value, DECAY)
    session = start()
    expected = INITIAL
    for batch in VALUES:
        session.run(update, {value: batch})
        if form == "subtracted_difference":
            expected = expected - (1 - DECAY) * (expected - batch)
        else:
            expected = expected * DECAY + batch * (1 - DECAY)
    allowed = rounding("float32") * 1e3
    assert np.all(np.abs(session.run(moving) - expected) <= allowed)


def test_it_computes_what_assign_moving_average_computes(start):
    """TensorFlow's own op, bit for bit: checkpoints of both continue alike."""
    ours, theirs = make_moving("float32", "ours"), make_moving("float32", "theirs")
    value = tf.placeholder(tf.float32, [4])
    updates = [
        moving_averages.update_moving_average(ours, value, DECAY),
        assign_moving_average(theirs, value, DECAY, zero_debias=False),
    ]
    session = start()
    for batch in VALUES:
        session.run(updates, {value: batch})
        np.testing.assert_array_equal(*session.run([ours, theirs]))


@pytest.mark.parametrize("decay_dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_decay_schedule(dtype, decay_dtype, start):
    """Decays that every dtype holds exactly, one for each step."""
    decays = [0.0, 0.5, 0.75, 0.875, 0.25, 0.9375]
    moving = make_moving(dtype)
    value = tf.placeholder(dtype, [4])
    decay = tf.placeholder(decay_dtype, [])
    update = moving_averages.update_moving_average(moving, value, decay)
    session = start()
    trajectory = reference.moving_average(INITIAL, VALUES, decays)
    for batch, step_decay, expected in zip(VALUES, decays, trajectory):
        session.run(update, {value: batch, decay: step_decay})
        allowed = rounding(dtype) * (1e3 + np.abs(expected))
        assert np.all(np.abs(session.run(moving) - expected) <= allowed)


# No denormal numbers: TensorFlow's kernels flush them to 0 whatever they compute.
UNTOUCHABLE = np.array([1.1, -0.0, 2e-38, 1e38, np.inf, -np.inf, np.nan, 0.0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_what_is_not_applied_leaves_every_bit(value, start, variable_kind):
    """Infinite and NaN statistics stay too: a step in evaluation writes nothing."""
    moving = make_moving("float32", initial=UNTOUCHABLE)
    apply = tf.placeholder(tf.bool, [])
    update = moving_averages.update_moving_average(
        moving, tf.fill([8], tf.constant(value, tf.float32)), DECAY, apply=apply
    )
    session = start()
    session.run(update, {apply: False})
    np.testing.assert_array_equal(bits(session.run(moving)), bits(UNTOUCHABLE))


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.99])
@pytest.mark.parametrize("apply", ["python_true", "tensor"])
def test_zero_debias_trajectory(apply, decay, dtype, start, variable, variable_kind):
    """Accumulators from 0 divided by 1 - decay^n; what was in the variable is gone."""
    moving = make_moving(dtype)
    value = tf.placeholder(dtype, [4])
    switch = True if apply == "python_true" else tf.placeholder_with_default(True, [])
    update = moving_averages.update_moving_average(
        moving, value, decay, apply=switch, zero_debias=True
    )
    assert isinstance(update, tf.Operation)
    names = ["moving/biased", "moving/local_step"]
    assert not set(names) & {v.op.name for v in tf.trainable_variables()} and all(
        variable(name).shape.as_list() == shape for name, shape in zip(names, [[4], []])
    )
    session = start()
    trajectory = reference.zero_debiased_moving_average(VALUES, decay)
    # 1 - decay^n of size 1 - decay holds the unit of 1: it is off by 1 / (1 - decay).
    relative = 8 * rounding(dtype) / (1 - decay)
    for step, (batch, expected) in enumerate(zip(VALUES, trajectory)):
        if switch is not True:
            session.run(update, {value: np.full(4, np.nan), switch: False})
        session.run(update, {value: batch})
        size = np.abs(VALUES).max()
        assert np.all(np.abs(session.run(moving) - expected) <= relative * size)
        assert session.run(variable("moving/local_step")) == step + 1


def test_zero_debias_before_the_first_update_leaves_every_bit(start, variable):
    """Both accumulators are 0 then, and 0 / 0 is not a statistic."""
    moving = make_moving("float32")
    apply = tf.placeholder(tf.bool, [])
    update = moving_averages.update_moving_average(
        moving, tf.ones([4]), DECAY, apply=apply, zero_debias=True
    )
    session = start()
    session.run(update, {apply: False})
    np.testing.assert_array_equal(bits(session.run(moving)), bits(INITIAL))
    assert session.run(variable("moving/local_step")) == 0
    np.testing.assert_array_equal(session.run(variable("moving/biased")), np.zeros(4))


def test_zero_debias_computes_what_assign_moving_average_computes(start):
    ours, theirs = make_moving("float32", "ours"), make_moving("float32", "theirs")
    value = tf.placeholder(tf.float32, [4])
    updates = [
        moving_averages.update_moving_average(ours, value, DECAY, zero_debias=True),
        assign_moving_average(theirs, value, DECAY, zero_debias=True),
    ]
    session = start()
    # 1 - 0.9 in float32 is good to 1 / 0.1 of its unit; the decay may differ by one.
    close = 64 * reference.ROUNDING["float32"]
    for batch in VALUES:
        session.run(updates, {value: batch})
        ours_now, theirs_now = session.run([ours, theirs])
        np.testing.assert_allclose(ours_now, theirs_now, rtol=close, atol=close)


def test_an_update_without_zero_debias_adds_no_variable():
    moving = make_moving("float32")
    moving_averages.update_moving_average(moving, tf.ones([4]), DECAY)
    assert tf.global_variables() == [moving]
