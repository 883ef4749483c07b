"""The hook and the function that watch moving statistics while training runs."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
import tf_slim as slim

import bn_tf1
from tests.graphs import graph_zoo

BATCHES = np.random.RandomState(0).randn(64, 16, 6).astype(np.float32)


@pytest.fixture
def warnings(monkeypatch):
    """What was logged as a warning about batch norm."""
    texts = []

    def warning(text, *arguments):
        if text.startswith("batch norm"):
            texts.append(text % arguments)

    monkeypatch.setattr(tf.logging, "warning", warning)
    return texts


def train(layer, hook, *, steps, updates=True, feed=lambda step: BATCHES[step % 64]):
    """Runs `steps` steps of a network with one layer, layer(x) -> y, under the hook."""
    x = tf.placeholder(tf.float32, [16, 6], name="x")
    unused = tf.placeholder(tf.float32, [16, 6], name="unused")
    loss = tf.reduce_mean(tf.square(layer(x) - 1.0))
    with tf.variable_scope("other"):
        bn_tf1.batch_norm(unused, True)  # nothing in the run feeds it
    step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(1e-3)
    operations = tf.get_collection("update_ops", scope="(?!other)") if updates else []
    with tf.control_dependencies(operations):
        train_op = optimizer.minimize(loss, global_step=step)
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for number in range(steps):
            session.run(train_op, {x: feed(number)})


def ours(**options):
    return lambda x: bn_tf1.batch_norm(x, True, **options)


def with_moments(x):
    """A layer of somebody else, with a variable for each statistic."""
    return graph_zoo.with_nn(x, True)


def test_a_healthy_run_is_silent(warnings, tmp_path):
    hook = bn_tf1.StatisticsHook(every_steps=10, output_dir=str(tmp_path))
    train(ours(decay=0.9), hook, steps=61)
    assert warnings == []
    (events,) = tmp_path.glob("events*")
    found = [
        (event.step, value.tag, value.simple_value)
        for event in tf.train.summary_iterator(str(events))
        for value in event.summary.value
    ]
    assert {step for step, _, _ in found} == {1, 11, 21, 31, 41, 51, 61}
    assert {tag for _, tag, _ in found} == {
        "batch_norm/batch_norm/mean_distance",
        "batch_norm/batch_norm/variance_distance",
    }


def test_statistics_that_move_once_in_several_runs_are_healthy(warnings):
    """Gradients are accumulated, and two calls make one update; each run is looked at."""
    x = tf.placeholder(tf.float32, [16, 6])
    ys = [
        bn_tf1.batch_norm(t, True, decay=0.3, name="bn", reuse=reuse, update="merged")
        for t, reuse in ((x, None), (x + 0.1, True))
    ]
    train_op = bn_tf1.make_train_op(
        tf.reduce_mean(tf.square(ys[0] + ys[1] - 1.0)),
        tf.train.GradientDescentOptimizer(1e-3),
        global_step=tf.train.get_or_create_global_step(),
        accumulate_steps=4,
    )
    hook = bn_tf1.StatisticsHook(every_steps=1)
    with tf.train.MonitoredTrainingSession(hooks=[hook]) as session:
        for number in range(20):
            session.run(train_op, {x: BATCHES[number]})
    assert warnings == []


def test_updates_that_nobody_runs_are_said_once(warnings):
    train(ours(), bn_tf1.StatisticsHook(every_steps=4), steps=20, updates=False)
    assert len(warnings) == 1
    assert "step 5: the moving statistics of batch_norm stand still" in warnings[0]
    assert "make_train_op" in warnings[0]


def test_a_short_run_has_not_converged(warnings):
    train(ours(decay=0.99), bn_tf1.StatisticsHook(every_steps=5), steps=20)
    assert len(warnings) == 1
    assert "step 20" in warnings[0] and "initial values" in warnings[0]
    assert "recalibrate SOURCE computes" in warnings[0]


def test_statistics_that_follow_other_data_lie_far(warnings):
    """Batches that alternate between means of -5 and 5 for ten steps each."""
    train(
        ours(decay=0.9),
        bn_tf1.StatisticsHook(every_steps=20),
        steps=101,
        feed=lambda step: BATCHES[step % 64] + (50.0 if step % 20 == 0 else 0.0),
    )
    assert len(warnings) == 1 and "lie far" in warnings[0]


def test_a_nan_is_said(warnings):
    batch = np.full([16, 6], np.nan, np.float32)
    feed = {3: batch}
    train(
        with_moments,
        bn_tf1.StatisticsHook(every_steps=2),
        steps=8,
        feed=lambda step: feed.get(step, BATCHES[step]),
    )
    assert any("are not finite" in text for text in warnings)


def test_in_a_loop_of_ones_own(warnings, session):
    x = tf.placeholder(tf.float32, [16, 6])
    is_training = tf.placeholder(tf.bool, [])
    bn_tf1.batch_norm(x, is_training)
    session.run(tf.global_variables_initializer())
    feed = {x: BATCHES[0] + 3.0, is_training: True}
    (reading,) = bn_tf1.check_statistics(session, 1, feed)
    expected = np.sqrt(np.mean(((BATCHES[0] + 3.0).mean(axis=0)) ** 2 / 1.001))
    np.testing.assert_allclose(reading.mean_distance, expected, rtol=1e-4)
    assert bn_tf1.check_statistics(session, 2, {**feed, is_training: False}) == ()
    bn_tf1.check_statistics(session, 3, feed)
    assert len(warnings) == 1 and "stand still" in warnings[0]


# ------------------------------------------------------------------ in loops of others


def network(updates):
    """A loss on random batches, a layer of slim's and what trains it."""
    x = tf.random_normal([16, 6], 3.0, seed=1)
    loss = tf.reduce_mean(tf.square(bn_tf1.slim.batch_norm(x, decay=0.9) - 1.0))
    step = tf.train.get_or_create_global_step()
    update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS) if updates else []
    optimizer = tf.train.GradientDescentOptimizer(1e-3)
    return slim.learning.create_train_op(
        loss, optimizer, global_step=step, update_ops=update_ops
    )


def under_an_estimator(folder, updates):
    def model(features, labels, mode):
        train_op = network(updates)
        return tf.estimator.EstimatorSpec(mode, loss=train_op, train_op=train_op)

    estimator = tf.estimator.Estimator(model, str(folder))
    hook = bn_tf1.StatisticsHook(every_steps=10)
    data = tf.data.Dataset.from_tensors
    for steps in (41, 82):  # the second goes on, in a graph of its own
        estimator.train(lambda: data(0.0).repeat(), [hook], max_steps=steps)


def under_slims_loop_with_hooks(folder, updates):
    hook = bn_tf1.StatisticsHook(every_steps=10)
    last = tf.train.StopAtStepHook(num_steps=41)
    slim.training.train(network(updates), str(folder), hooks=[hook, last])


def under_slims_loop(folder, updates):
    def train_step(session, train_op, global_step, options):
        result = slim.learning.train_step(session, train_op, global_step, options)
        step = session.run(global_step)
        if step % 10 == 1:
            bn_tf1.check_statistics(session, step)
        return result

    slim.learning.train(
        network(updates),
        str(folder),
        train_step,
        number_of_steps=41,
        save_interval_secs=0,
    )


@pytest.mark.parametrize("updates", [True, False])
@pytest.mark.parametrize(
    "loop",
    [
        pytest.param(
            under_an_estimator,
            marks=pytest.mark.skipif(
                not tf.version.VERSION.startswith("1."), reason="gone since 2.16"
            ),
        ),
        under_slims_loop_with_hooks,
        under_slims_loop,
    ],
)
def test_loops_of_others(loop, updates, warnings, tmp_path):
    loop(tmp_path, updates)
    expected = [] if updates else ["stand still"]
    assert [text.split(":")[1].split("BatchNorm ")[1] for text in warnings] == expected


def test_a_number_of_steps_that_cannot_be():
    with pytest.raises(ValueError, match="`every_steps` is 0"):
        bn_tf1.StatisticsHook(every_steps=0)


def test_a_session_that_is_none():
    with pytest.raises(TypeError, match="`session` is None, but must be"):
        bn_tf1.check_statistics(None, 1)
