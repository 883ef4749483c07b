"""When and how `batch_norm` updates its moving statistics, and when it must not."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")

DECAY = 0.9
MOVING = ["batch_norm/moving_mean", "batch_norm/moving_variance"]
SHAPES = {
    "rank2": ((8, 3), -1),
    "rank4_nhwc": ((2, 3, 2, 3), -1),
    "rank4_nchw": ((2, 3, 2, 3), 1),
}
# A float32 statistic of size 1 to 10 after a few steps.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make_batches(count, shape=(8, 3), seed=0):
    rng = np.random.RandomState(seed)
    return [
        rng.normal(1 + step, 0.5 + step, size=shape).astype(np.float32)
        for step in range(count)
    ]


def updates_of(graph):
    return graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)


@pytest.fixture
def moving(session, variable):
    """moving() is the current [moving_mean, moving_variance] of `batch_norm`."""
    return lambda: session.run([variable(name) for name in MOVING])


# ----------------------------------------------------------------------- what is fed in


@pytest.mark.parametrize(
    "sizes, update", [("known_sizes", "collection"), ("unknown_sizes", "in_place")]
)
@pytest.mark.parametrize("ema_variance", ["biased", "unbiased"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_ema_variance_is_the_same_whatever_the_kernel(
    name, ema_variance, update, sizes, start, moving, graph
):
    shape, axis = SHAPES[name]
    known = list(shape) if sizes == "known_sizes" else [None] * len(shape)
    known[axis] = shape[axis]
    x = tf.placeholder(tf.float32, known)
    y = bn_tf1.batch_norm(
        x, True, axis=axis, decay=DECAY, ema_variance=ema_variance, update=update
    )
    session = start()
    batches = make_batches(4, shape)
    moments = [reference.moments(batch, axis) for batch in batches]
    variances = [m.variance for m in moments]
    if ema_variance == "unbiased":
        variances = [reference.unbiased(m.variance, m.count) for m in moments]
    means = reference.moving_average(0.0, [m.mean for m in moments], DECAY)
    variances = reference.moving_average(1.0, variances, DECAY)
    for batch, mean, variance in zip(batches, means, variances):
        output, _ = session.run([y, updates_of(graph)], {x: batch})
        # The output uses the biased variance, whatever enters the moving average.
        np.testing.assert_allclose(
            output, reference.training_output(batch, axis=axis), **CLOSE
        )
        actual_mean, actual_variance = moving()
        np.testing.assert_allclose(actual_mean, mean, **CLOSE)
        np.testing.assert_allclose(actual_variance, variance, **CLOSE)


def test_a_decay_schedule(start, moving, graph):
    step = tf.train.get_or_create_global_step()
    decay = 1 - 1 / (2.0 + tf.cast(step, tf.float32))
    x = tf.placeholder(tf.float32, [None, 3])
    bn_tf1.batch_norm(x, True, decay=decay)
    session = start()
    next_step = tf.assign_add(step, 1)
    batches = make_batches(4)
    decays = [1 - 1 / (2.0 + index) for index in range(4)]
    means = reference.moving_average(0.0, [b.mean(axis=0) for b in batches], decays)
    for batch, mean in zip(batches, means):
        session.run(updates_of(graph), {x: batch})
        session.run(next_step)
        np.testing.assert_allclose(moving()[0], mean, **CLOSE)


def test_a_decay_tensor_for_float64_statistics(start, moving, graph):
    x = tf.placeholder(tf.float64, [None, 3])
    bn_tf1.batch_norm(x, True, decay=tf.constant(0.75, tf.float32))
    session = start()
    batch = np.random.RandomState(0).normal(size=[8, 3])
    session.run(updates_of(graph), {x: batch})
    np.testing.assert_allclose(moving()[0], batch.mean(axis=0) / 4, rtol=1e-13)


# -------------------------------------------------------------------- which operations


def test_the_collection_gets_one_operation_per_variable(graph):
    with tf.variable_scope("net"):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True)
        bn_tf1.batch_norm(tf.zeros([4, 3]), tf.placeholder(tf.bool, []))
    updates = updates_of(graph)
    assert [type(op) for op in updates] == [tf.Operation] * 4
    assert all(op.name.startswith("net/batch_norm/") for op in updates[:2])
    assert all(op.name.startswith("net/batch_norm_1/") for op in updates[2:])
    assert len(set(updates)) == 4


def test_a_collection_of_ones_own(start, moving, graph):
    batch = make_batches(1)[0]
    bn_tf1.batch_norm(tf.constant(batch), True, decay=0.0, updates_collection="mine")
    assert not updates_of(graph)
    updates = graph.get_collection("mine")
    assert len(updates) == 2
    start().run(updates)
    np.testing.assert_allclose(moving()[0], batch.mean(axis=0), **CLOSE)


def test_update_ops_work_where_the_switch_is_false(start, moving, control_flow, graph):
    """An update made inside of the cond is dead then, and so is what waits for it."""
    is_training = tf.placeholder(tf.bool, [])
    bn_tf1.batch_norm(tf.constant(make_batches(1)[0]), is_training)
    with tf.control_dependencies(updates_of(graph)):
        train_step = tf.identity(1)
    session = start()
    assert session.run(train_step, {is_training: False}) == 1
    np.testing.assert_array_equal(moving(), [[0] * 3, [1] * 3])
    assert session.run(train_step, {is_training: True}) == 1
    assert np.all(moving()[0] != 0)


@pytest.mark.parametrize("update", ["collection", "in_place", "skip"])
@pytest.mark.parametrize("zero_debias", [False, True], ids=["plain", "zero_debias"])
def test_an_evaluation_step_leaves_every_bit(
    zero_debias, update, start, control_flow, variable_kind, graph
):
    """All variables, between two training steps, whatever is fetched."""
    x = tf.placeholder(tf.float32, [None, 3])
    is_training = tf.placeholder(tf.bool, [])
    y = bn_tf1.batch_norm(
        x, is_training, decay=DECAY, update=update, zero_debias=zero_debias
    )
    session = start()
    batches = make_batches(3)
    fetches = [y, updates_of(graph)]
    initial = session.run(tf.global_variables())
    session.run(fetches, {x: batches[0], is_training: False})
    assert_same_bits(session.run(tf.global_variables()), initial)
    session.run(fetches, {x: batches[1], is_training: True})
    trained = session.run(tf.global_variables())
    for _ in range(3):
        session.run(fetches, {x: batches[2], is_training: False})
    assert_same_bits(session.run(tf.global_variables()), trained)
    changed = any(np.any(a != b) for a, b in zip(initial, trained))
    assert changed == (update != "skip")


def assert_same_bits(actual, expected):
    for one, other in zip(actual, expected):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_in_place_updates_when_the_output_is_computed(
    switch, start, moving, control_flow, variable_kind, graph
):
    x = tf.placeholder(tf.float32, [None, 3])
    is_training = True
    if switch == "tensor":
        is_training = tf.placeholder_with_default(True, [])
    y = bn_tf1.batch_norm(x, is_training, decay=DECAY, update="in_place")
    assert not updates_of(graph)
    session = start()
    batches = make_batches(3)
    means = reference.moving_average(0.0, [b.mean(axis=0) for b in batches], DECAY)
    for batch, mean in zip(batches, means):
        session.run(y, {x: batch})
        np.testing.assert_allclose(moving()[0], mean, **CLOSE)


# ---------------------------------------------------------------- batches to be skipped

BAD_BATCHES = {
    "nan": (np.float32, np.nan),
    "inf": (np.float32, np.inf),
    "variance_overflows": (np.float32, 1e30),
    "float16_inf": (np.float16, np.inf),
}


@pytest.mark.parametrize("zero_debias", [False, True], ids=["plain", "zero_debias"])
@pytest.mark.parametrize(
    "switch, update", [("python_bool", "collection"), ("tensor", "in_place")]
)
@pytest.mark.parametrize("bad", list(BAD_BATCHES))
def test_a_nonfinite_batch_leaves_every_bit(
    bad, switch, update, zero_debias, start, graph
):
    """One bad channel keeps all channels, and the counters, as they are."""
    dtype, value = BAD_BATCHES[bad]
    x = tf.placeholder(dtype, [None, 3])
    is_training = True if switch == "python_bool" else tf.constant(True)
    y = bn_tf1.batch_norm(
        x, is_training, decay=DECAY, update=update, zero_debias=zero_debias
    )
    session = start()
    good, better = [batch.astype(dtype) for batch in make_batches(2)]
    spoiled = good.copy()
    spoiled[0, 1] = value
    fetches = [y, updates_of(graph)]
    initial = session.run(tf.global_variables())
    session.run(fetches, {x: spoiled})
    assert_same_bits(session.run(tf.global_variables()), initial)
    session.run(fetches, {x: good})
    before = session.run(tf.global_variables())
    session.run(fetches, {x: spoiled})
    assert_same_bits(session.run(tf.global_variables()), before)
    session.run(fetches, {x: better})
    call = bn_tf1.batch_norm_calls()[0]
    average = reference.moving_average(0.0, [good.mean(0), better.mean(0)], DECAY)[-1]
    if zero_debias:
        average = average / (1 - DECAY**2)
    # float16 batches of size 1 have means good to 1e-3 when NumPy computes them.
    np.testing.assert_allclose(session.run(call.moving_mean), average, rtol=3e-3)


@pytest.mark.parametrize("update", ["collection", "in_place"])
def test_without_skip_nonfinite_they_become_nan(update, start, moving, graph):
    batch = make_batches(1)[0]
    batch[0, 1] = np.nan
    y = bn_tf1.batch_norm(tf.constant(batch), True, update=update, skip_nonfinite=False)
    start().run([y, updates_of(graph)])
    for values in moving():
        np.testing.assert_array_equal(np.isnan(values), [False, True, False])


# -------------------------------------------------------------------------- zero_debias

COUNTERS = [
    f"batch_norm/batch_norm/{moving}/{counter}"
    for moving in ("moving_mean", "moving_variance")
    for counter in ("biased", "local_step")
]


@pytest.mark.parametrize("update", ["collection", "in_place"])
@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_zero_debias(switch, update, start, moving, variable, graph, variable_kind):
    x = tf.placeholder(tf.float32, [None, 3])
    is_training = True if switch == "python_bool" else tf.constant(True)
    y = bn_tf1.batch_norm(x, is_training, decay=DECAY, update=update, zero_debias=True)
    assert {v.op.name for v in tf.trainable_variables()} == {
        "batch_norm/gamma",
        "batch_norm/beta",
    }
    session = start()
    batches = make_batches(4)
    moments = [reference.moments(batch) for batch in batches]
    means = reference.zero_debiased_moving_average([m.mean for m in moments], DECAY)
    variances = reference.zero_debiased_moving_average(
        [m.variance for m in moments], DECAY
    )
    for step, batch in enumerate(batches):
        session.run([y, updates_of(graph)], {x: batch})
        mean, variance = moving()
        np.testing.assert_allclose(mean, means[step], **CLOSE)
        np.testing.assert_allclose(variance, variances[step], **CLOSE)
        for name in COUNTERS[1::2]:
            assert session.run(variable(name)) == step + 1


def test_zero_debias_variables_are_named_as_tensorflow_names_them():
    bn_tf1.batch_norm(tf.zeros([4, 3]), True, zero_debias=True)
    assert set(COUNTERS) <= {v.op.name for v in tf.global_variables()}


def test_zero_debias_in_an_enclosing_scope():
    with tf.variable_scope("net"):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, zero_debias=True, name="bn")
    names = {v.op.name for v in tf.global_variables()}
    assert "net/bn/net/bn/moving_mean/biased" in names


def test_zero_debias_counters_are_shared_by_a_reused_layer():
    for reuse in (None, True):
        bn_tf1.batch_norm(
            tf.zeros([4, 3]), True, zero_debias=True, name="bn", reuse=reuse
        )
    assert len(tf.global_variables()) == 4 + 4


def test_zero_debias_survives_a_restore(tmp_path):
    """5 steps are 3 steps, a checkpoint, and 2 steps in another graph."""
    batches = make_batches(5)
    checkpoint = str(tmp_path / "model")

    def train(batches, restore=False, save=False):
        with tf.Graph().as_default() as graph, tf.Session() as session:
            x = tf.placeholder(tf.float32, [None, 3])
            bn_tf1.batch_norm(x, True, decay=DECAY, zero_debias=True)
            saver = tf.train.Saver()
            if restore:
                saver.restore(session, checkpoint)
            else:
                session.run(tf.global_variables_initializer())
            for batch in batches:
                session.run(updates_of(graph), {x: batch})
            if save:
                saver.save(session, checkpoint)
            return {v.op.name: session.run(v) for v in tf.global_variables()}

    uninterrupted = train(batches)
    train(batches[:3], save=True)
    resumed = train(batches[3:], restore=True)
    assert set(COUNTERS) < set(uninterrupted) == set(resumed)
    for name in uninterrupted:
        np.testing.assert_array_equal(uninterrupted[name], resumed[name])
    saved = {name for name, _ in tf.train.list_variables(checkpoint)}
    assert saved == set(uninterrupted)


def test_without_zero_debias_there_is_no_hidden_variable():
    bn_tf1.batch_norm(tf.zeros([4, 3]), True)
    assert sorted(v.op.name for v in tf.global_variables()) == sorted(
        MOVING + ["batch_norm/gamma", "batch_norm/beta"]
    )
