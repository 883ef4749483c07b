"""Decays that follow from the number of updates: the mean of all batches, and a warm-up."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

RTOL = 1e-5  # some steps of float32 on statistics of size 1 to 10
KINDS = {"cumulative": "cumulative", "warm_up": bn_tf1.WarmUp(0.4)}
LAYER = ["bn/moving_mean", "bn/moving_variance", "bn/num_updates"]


def batches(count, size=6, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.normal(1 + n, 1 + n, size=[size, 3]) for n in range(count)]


def averages(kind, given):
    """The oracle: [mean, variance, number] after the updates by (mean, variance)."""
    mean, variance = np.zeros(3), np.ones(3)
    for n, (batch_mean, batch_variance) in enumerate(given):
        decay = n / (n + 1) if kind == "cumulative" else min(0.4, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * batch_mean
        variance = decay * variance + (1 - decay) * batch_variance
    return mean, variance, len(given)


def moments(batch, **options):
    found = reference.moments(batch, -1, **options)
    return found.mean, found.variance


def slim(x, is_training, *, decay, update):
    collections = {"in_place": None}.get(update, tf.GraphKeys.UPDATE_OPS)
    how = {"updates_collections": collections, "fused": False, "scope": "bn"}
    return bn_tf1.slim.batch_norm(x, decay=decay, is_training=is_training, **how)


def tf_layers(x, is_training, *, decay, update):
    return bn_tf1.layers.batch_normalization(
        x, momentum=decay, training=is_training, fused=False, name="bn"
    )


def ours(x, is_training, **options):
    return bn_tf1.batch_norm(x, is_training, name="bn", **options)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "layer, update",
    [
        (ours, "collection"),
        (ours, "in_place"),
        (slim, "collection"),
        (slim, "in_place"),
        (tf_layers, "collection"),
    ],
)
def test_a_step_counts_where_it_updates(kind, layer, update, start, variable, graph):
    x = tf.placeholder(tf.float64, [None, 3])
    is_training = tf.placeholder(tf.bool, [])
    y = layer(x, is_training, decay=KINDS[kind], update=update)
    step = [y, graph.get_collection(tf.GraphKeys.UPDATE_OPS)]
    session = start()
    given = batches(4)
    spoilt = np.full([6, 3], np.nan)
    for batch, mode in [(spoilt, True), *((b, True) for b in given), (given[0], False)]:
        session.run(step, {x: batch, is_training: mode})
    for name, expected in zip(LAYER, averages(kind, map_moments(given))):
        np.testing.assert_allclose(session.run(variable(name)), expected, rtol=RTOL)
    if kind == "cumulative":  # nothing of the initial values, and every batch alike
        means = [batch.mean(0) for batch in given]
        np.testing.assert_allclose(
            session.run(variable(LAYER[0])), np.mean(means, 0), rtol=RTOL
        )


def map_moments(given):
    return [moments(batch) for batch in given]


@pytest.mark.parametrize("kind", list(KINDS))
def test_calls_of_one_layer_count_one_by_one_in_a_train_op(
    kind, start, variable, graph
):
    inputs = [tf.placeholder(tf.float64, [None, 3]) for _ in range(3)]
    outputs = [
        bn_tf1.batch_norm(x, True, decay=KINDS[kind], name="bn", reuse=tf.AUTO_REUSE)
        for x in inputs
    ]
    loss = tf.add_n([tf.reduce_mean(y**3) for y in outputs])
    train_op = bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.0))
    session = start()
    given = batches(6)
    for three in (given[:3], given[3:]):
        session.run(train_op, dict(zip(inputs, three)))
    for name, expected in zip(LAYER, averages(kind, map_moments(given))):
        np.testing.assert_allclose(session.run(variable(name)), expected, rtol=RTOL)


def test_an_update_alone_counts_and_both_count_once(start, variable, graph):
    x = tf.placeholder(tf.float32, [None, 3])
    bn_tf1.batch_norm(x, True, decay="cumulative", name="bn")
    of_mean, of_variance = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    session = start()
    for number, run in enumerate([of_mean, of_variance, [of_mean, of_variance]], 1):
        session.run(run, {x: batches(1)[0]})
        assert session.run(variable("bn/num_updates")) == number


@pytest.mark.parametrize("options", ["weights", "renorm", "ghost_batch_size"])
def test_with_other_statistics(options, start, variable, graph):
    x = tf.placeholder(tf.float64, [6, 3])
    weights = tf.placeholder(tf.float32, [6])
    value = {"weights": weights, "renorm": bn_tf1.Renormalization(decay=0.5)}
    y = bn_tf1.batch_norm(
        x,
        True,
        decay="cumulative",
        epsilon=1e-5,
        update="in_place",
        name="bn",
        **{options: value.get(options, 3)},
    )
    session = start()
    given, weighing = batches(3), [1.0, 1, 0, 2, 0, 1]
    found = []
    for batch in given:
        session.run(y, {x: batch, weights: weighing})
        if options == "weights":
            repeated = np.repeat(batch, np.int64(weighing), axis=0)
            found.append(moments(repeated))
        elif options == "renorm":
            found.append((batch.mean(0), np.sqrt(batch.var(0) + 1e-5)))
        else:
            halves = [batch[::2], batch[1::2]]
            found.append(
                [np.mean([f(h, 0) for h in halves], 0) for f in (np.mean, np.var)]
            )
    mean, variance = np.mean(found, 0)
    if options == "renorm":  # which averages the deviation
        variance = variance**2 - 1e-5
    for name, expected in zip(LAYER, (mean, variance, 3)):
        np.testing.assert_allclose(session.run(variable(name)), expected, rtol=RTOL)
    if options == "weights":  # a batch of no weight is no update
        session.run(y, {x: given[0], weights: [0.0] * 6})
        assert session.run(variable("bn/num_updates")) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"decay": "mean"}, ["`decay` is 'mean'", "'cumulative'", "WarmUp"]),
        ({"decay": bn_tf1.WarmUp(1.5)}, ["`decay` is 1.5", "[0, 1)"]),
        ({"decay": "cumulative", "zero_debias": True}, ["zero_debias", "cumulative"]),
        ({"decay": bn_tf1.WarmUp(), "kernel": "recipe"}, ["recipe", "`decay`"]),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError) as error:
        bn_tf1.batch_norm(tf.ones([4, 3]), True, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_checkpoint_without_the_number_is_refused(start, session, graph, tmp_path):
    x = tf.placeholder(tf.float32, [None, 3])
    with tf.Graph().as_default(), tf.Session() as other:
        bn_tf1.batch_norm(tf.ones([4, 3]), True, name="bn")
        other.run(tf.global_variables_initializer())
        path = tf.train.Saver().save(other, str(tmp_path / "model"))
    bn_tf1.batch_norm(x, True, decay="cumulative", name="bn")
    with pytest.raises(ValueError, match="lacks bn/num_updates, .*allow_missing"):
        bn_tf1.restore(start(), path)
    report = bn_tf1.restore(session, path, allow_missing=["*/num_updates"])
    assert report.missing == ("bn/num_updates",)


def test_a_short_run_has_converged_in_the_eyes_of_the_doctor(start, graph, tmp_path):
    """With a decay of 0.999 for all steps, 3 of them leave 99.7 % of the initial values."""
    step = tf.train.get_or_create_global_step()
    x = tf.placeholder(tf.float32, [None, 3])
    y = bn_tf1.batch_norm(x, True, decay=bn_tf1.WarmUp(0.999), name="bn")
    train_op = bn_tf1.make_train_op(
        tf.reduce_mean(y**3), tf.train.GradientDescentOptimizer(0.1), global_step=step
    )
    session = start()
    saver = tf.train.Saver()
    for batch in batches(3):
        session.run(train_op, {x: batch})
    path = saver.save(session, str(tmp_path / "model"), global_step=step)
    assert not [f.check for f in bn_tf1.audit(path) if f.gravity != "note"]
    # Statistics whose number was lost are replaced by the next update.
    session.run(
        tf.assign(graph.get_tensor_by_name("bn/num_updates:0").op.outputs[0], 0.0)
    )
    path = saver.save(session, str(tmp_path / "lost"), global_step=step)
    assert "debias-counter" in [finding.check for finding in bn_tf1.audit(path)]


def test_zero_debias_is_not_restored_without_what_it_counts(start, session, tmp_path):
    """The first update would replace the restored statistics by those of its batch."""
    x = tf.placeholder(tf.float32, [None, 3])
    bn_tf1.batch_norm(x, True, name="bn", zero_debias=True)
    session = start()
    saved = [v for v in tf.global_variables() if "biased" not in v.op.name]
    saved = [v for v in saved if "local_step" not in v.op.name]
    path = tf.train.Saver(saved).save(session, str(tmp_path / "model"))
    with pytest.raises(ValueError, match="lacks .*/biased.*/local_step.*allow_missing"):
        bn_tf1.restore(session, path)
