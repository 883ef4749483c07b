"""`make_train_op(accumulate_steps=k)`: k small steps are one step of their batches."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

RANDOM = np.random.RandomState(0)
EXAMPLES = RANDOM.normal(3.0, 2.0, [128, 6]).astype(np.float32)
BATCHES = np.split(EXAMPLES, 4)
WEIGHTS = RANDOM.normal(size=[6, 4]).astype(np.float32)
DECAY, RATE, MOMENTUM = 0.8, 0.5, 0.9


def network(x, is_training=True, **options):
    """The loss of two layers of batch norm with a matrix product between them."""
    h = bn_tf1.batch_norm(x, is_training, decay=DECAY, name="first", **options)
    h = tf.matmul(h, tf.get_variable("w", initializer=WEIGHTS))
    h = bn_tf1.layers.batch_normalization(h, training=is_training, name="second")
    return tf.reduce_mean(tf.square(h - 1.0) * [1.0, 2.0, 3.0, 4.0])


def optimizer():
    return tf.train.MomentumOptimizer(RATE, MOMENTUM)


def values_of(session, *names):
    by_name = {v.op.name: v for v in tf.global_variables()}
    return session.run([by_name[name] for name in names])


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_four_steps_are_one(clip_norm, start, control_flow, variable_kind):
    """128 examples in 4 steps of 32; the gradients of TensorFlow, averaged in NumPy."""
    if (control_flow, variable_kind) == ("control_flow_v2", "reference_variables"):
        return  # TensorFlow 2 allows no such variables in a branch
    x = tf.placeholder(tf.float32, [None, 6])
    loss = network(x)
    global_step = tf.train.get_or_create_global_step()
    trained = tf.trainable_variables()
    gradients = tf.gradients(loss, trained)
    train_op = bn_tf1.make_train_op(
        loss,
        optimizer(),
        global_step=global_step,
        clip_norm=clip_norm,
        accumulate_steps=4,
    )
    session = start()
    moments = reference.moments(EXAMPLES)
    velocity = [0.0 for _ in trained]
    for step in (1, 2):
        before = session.run(trained)
        sums = [0.0 for _ in trained]
        for batch in BATCHES:
            assert session.run(global_step) == step - 1
            parts, _ = session.run([gradients, train_op], {x: batch})
            sums = [total + part / 4.0 for total, part in zip(sums, parts)]
        if clip_norm is not None:
            norm = np.sqrt(sum(np.sum(np.square(total)) for total in sums))
            assert norm > clip_norm
            sums = [total * clip_norm / norm for total in sums]
        velocity = [MOMENTUM * v + total for v, total in zip(velocity, sums)]
        after = session.run(trained)
        for old, new, v in zip(before, after, velocity):
            np.testing.assert_allclose(new, old - RATE * v, rtol=1e-5, atol=1e-6)
        assert session.run(global_step) == step
        mean, variance = values_of(
            session, "first/moving_mean", "first/moving_variance"
        )
        kept = DECAY**step
        np.testing.assert_allclose(mean, (1 - kept) * moments.mean, rtol=1e-6)
        expected = kept + (1 - kept) * moments.variance
        np.testing.assert_allclose(variance, expected, rtol=1e-6)


def test_resumed_in_the_middle_it_ends_with_the_same_bits(graph, tmp_path):
    def built():
        x = tf.placeholder(tf.float32, [None, 6])
        step = tf.train.get_or_create_global_step()
        train_op = bn_tf1.make_train_op(
            network(x), optimizer(), global_step=step, accumulate_steps=3
        )
        return x, train_op, tf.train.Saver()

    path = str(tmp_path / "model.ckpt")
    x, train_op, saver = built()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for i in range(7):
            session.run(train_op, {x: BATCHES[i % 4]})
            if i == 3:  # one step into the second update
                saver.save(session, path, write_meta_graph=False)
        expected = session.run(tf.global_variables())
    with tf.Graph().as_default(), tf.Session() as session:
        x, train_op, saver = built()
        saver.restore(session, path)
        for i in range(4, 7):
            session.run(train_op, {x: BATCHES[i % 4]})
        for value, before in zip(session.run(tf.global_variables()), expected):
            np.testing.assert_array_equal(value, before)
        assert values_of(session, "global_step", "accumulated_steps") == [2, 1]
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 6])
        step = tf.train.get_or_create_global_step()
        train_op = bn_tf1.make_train_op(
            network(x), optimizer(), global_step=step, accumulate_steps=2
        )
        tf.train.Saver().restore(session, path)
        session.run(train_op, {x: BATCHES[0]})  # with fewer steps it is due, or over
        assert values_of(session, "global_step", "accumulated_steps") == [2, 0]


@pytest.mark.parametrize("update", ["collection", "merged"])
def test_several_calls_and_batches_that_do_not_count(update, start):
    """Each call of "collection" has an update by its batches; "merged" has one of all."""
    x = [tf.placeholder(tf.float32, [None, 6]) for _ in range(2)]
    modes = [tf.placeholder_with_default(True, []) for _ in range(2)]
    options = {"decay": DECAY, "name": "bn", "reuse": tf.AUTO_REUSE, "update": update}
    ys = [bn_tf1.batch_norm(*call, **options) for call in zip(x, modes)]
    loss = tf.add_n([tf.reduce_mean(tf.square(y - 1)) for y in ys])
    train_op = bn_tf1.make_train_op(loss, optimizer(), accumulate_steps=2)
    session = start()
    a, b, c, _ = BATCHES
    c = c[:9]
    session.run(train_op, {x[0]: a, x[1]: b})
    session.run(train_op, {x[0]: c, x[1]: np.full_like(b, np.inf)})
    mean, variance = 0.0, 1.0
    joined = [[a, c], [b]] if update == "collection" else [[a, b, c]]
    for batches in joined:
        moments = reference.moments(np.concatenate(batches))
        mean = DECAY * mean + (1 - DECAY) * moments.mean
        variance = DECAY * variance + (1 - DECAY) * moments.variance
    for _ in range(2):
        own = values_of(session, "bn/moving_mean", "bn/moving_variance")
        np.testing.assert_allclose(own, [mean, variance], rtol=1e-6)
        for _ in range(2):  # in inference mode all counts 0
            session.run(train_op, {x[0]: a, x[1]: b, **dict.fromkeys(modes, False)})


def test_sparse_gradients(start):
    """Rows of an embedding that are read twice in a step, in several steps, or never."""
    table = tf.get_variable("table", initializer=np.ones([5, 3], np.float32))
    rows = tf.placeholder(tf.int32, [None])
    y = bn_tf1.batch_norm(tf.nn.embedding_lookup(table, rows), True)
    loss = tf.reduce_sum(y * [[1.0, 2.0, 3.0]]) + tf.reduce_sum(tf.gather(table, rows))
    train_op = bn_tf1.make_train_op(
        loss, tf.train.GradientDescentOptimizer(0.5), accumulate_steps=2
    )
    session = start()
    for batch in ([0, 1, 1], [1, 4]):
        session.run(train_op, {rows: batch})
    counts = np.array([1, 3, 0, 0, 1])  # the normalised part of the loss is constant
    expected = 1 - 0.5 * np.repeat(counts[:, None], 3, axis=1) / 2
    np.testing.assert_allclose(session.run(table), expected, atol=1e-5)


def test_updates_of_other_makers_run_in_each_step(start, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        tf.logging, "warning", lambda text, *parts: warnings.append(text % parts)
    )
    counter = tf.get_variable("counter", initializer=0, trainable=False)
    increment = tf.assign_add(counter, 1, name="increment")
    tf.add_to_collection(bn_tf1.UPDATE_OPS_COLLECTION, increment)
    loss = network(tf.constant(EXAMPLES))
    train_op = bn_tf1.make_train_op(loss, optimizer(), accumulate_steps=4)
    assert ["1 update operations that are of no layer" in w for w in warnings] == [True]
    session = start()
    for _ in range(3):
        session.run(train_op)
    assert session.run(counter) == 3


def test_what_cannot_be_accumulated():
    x = tf.constant(EXAMPLES)

    def refused(loss, match, optimizer=None, **options):
        optimizer = optimizer or tf.train.GradientDescentOptimizer(0.1)
        with pytest.raises(ValueError, match=match):
            bn_tf1.make_train_op(loss, optimizer, **{"accumulate_steps": 2, **options})

    loss = network(x)
    for steps in (0, True, 2.5):
        refused(loss, "`accumulate_steps` is", accumulate_steps=steps)
    replicas = tf.train.SyncReplicasOptimizer(optimizer(), 2)
    refused(loss, "must be 1 with a SyncReplicasOptimizer", replicas)
    first, group = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)[:2], "second"
    group = tf.group(*tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION, group))
    each = "those of 'second' would get one in each step"
    refused(loss, each, update_ops=[*first, group])
    y = bn_tf1.batch_norm(x, True, update="in_place", name="third")
    in_place = loss + tf.reduce_mean(y)
    refused(in_place, "those of 'third' would get one in each step")
    bn_tf1.make_train_op(
        in_place, optimizer(), accumulate_steps=2, ignored_layers=["third"]
    )


def test_the_optimizer_s_variables_keep_their_names():
    """A checkpoint of one number of steps restores with another."""
    names = []
    for steps in (1, 3):
        with tf.Graph().as_default():
            tf.cond(tf.constant(True), lambda: 1.0, lambda: 2.0)
            loss, adam = network(tf.constant(EXAMPLES)), tf.train.AdamOptimizer(0.1)
            bn_tf1.make_train_op(loss, adam, accumulate_steps=steps)
            names.append({v.op.name for v in tf.global_variables()})
    assert "beta1_power" in names[0]
    assert names[0] <= names[1]


def test_a_layer_of_two_train_ops_is_accumulated_by_one(start):
    loss = network(tf.constant(EXAMPLES))
    how = {"optimizer": optimizer(), "accumulate_steps": 2}
    first = bn_tf1.make_train_op(loss, **how)
    with pytest.raises(ValueError, match="another train op .* 'first', 'second'"):
        bn_tf1.make_train_op(loss, **how)
    other = bn_tf1.make_train_op(loss, **how, ignored_layers=["first", "second"])
    session = start()
    for _ in range(2):
        session.run([first, other])
    (mean,) = values_of(session, "first/moving_mean")
    expected = (1 - DECAY) * reference.moments(EXAMPLES).mean
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_a_sum_may_be_larger_than_its_dtype_holds(start):
    half = tf.get_variable("half", initializer=np.float16(1))
    loss = tf.reduce_sum(half * tf.constant(40000, tf.float16))
    descent = tf.train.GradientDescentOptimizer(2.0**-10)
    train_op = bn_tf1.make_train_op(loss, descent, accumulate_steps=2)
    session = start()
    for _ in range(2):
        session.run(train_op)
    assert session.run(half) == np.float16(1 - 40000 / 1024)


def test_in_a_scope_with_a_partitioner(start):
    partitioner = tf.fixed_size_partitioner(2)
    with tf.variable_scope("parts", partitioner=partitioner):
        options = {"zero_debias_moving_mean": True, "decay": DECAY}
        y = bn_tf1.slim.batch_norm(tf.constant(EXAMPLES), scope="bn", **options)
    loss = tf.reduce_sum(y)
    train_op = bn_tf1.make_train_op(loss, optimizer(), accumulate_steps=2)
    session = start()
    for _ in range(2):
        session.run(train_op)
    (mean,) = values_of(session, "parts/bn/moving_mean")
    np.testing.assert_allclose(mean, reference.moments(EXAMPLES).mean, rtol=1e-6)
