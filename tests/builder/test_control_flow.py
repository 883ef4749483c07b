"""`batch_norm` inside of tf.while_loop, tf.cond and functions, control flow v1 and v2.

An update in a body can only run with that body, so that `update="collection"` is an
error there, and "in_place" is what works.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")

DECAY = 0.9
STEPS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GAMMA, BETA = np.array([1.5, -0.5, 2.0]), np.array([0.25, 1.0, -0.75])


def make_batch(seed=0):
    return np.random.RandomState(seed).normal(1.0, 2.0, size=[8, 3])


def build(x, is_training, **options):
    return bn_tf1.batch_norm(
        x,
        is_training,
        decay=DECAY,
        initializers={
            "gamma": tf.constant_initializer(GAMMA),
            "beta": tf.constant_initializer(BETA),
        },
        name="bn",
        **options,
    )


def make_loop(x, is_training, steps=STEPS, **options):
    """x normalised `steps` times by one layer that is built in the loop's body."""

    def body(step, h):
        return step + 1, build(h, is_training, **options)

    return tf.while_loop(lambda step, h: step < steps, body, [0, x])[1]


def loop_reference(batch, weights, steps=STEPS):
    """The loop in float64: output, statistics after it, gradients of sum(w * y)."""
    inputs, moments = [batch], []
    for _ in range(steps):
        moments.append(reference.moments(inputs[-1]))
        inputs.append(reference.training_output(inputs[-1], GAMMA, BETA))
    means = reference.moving_average(0.0, [m.mean for m in moments], DECAY)
    variances = reference.moving_average(1.0, [m.variance for m in moments], DECAY)
    dy, dgamma, dbeta = weights, 0.0, 0.0
    for h in reversed(inputs[:-1]):
        gradients = reference.training_gradients(h, dy, GAMMA)
        dy = gradients.x
        dgamma = dgamma + gradients.gamma
        dbeta = dbeta + gradients.beta
    return inputs[-1], means[-1], variances[-1], (dy, dgamma, dbeta)


@pytest.fixture
def workable_variables(control_flow, variable_kind):
    """TensorFlow's own limit: a function body cannot assign a variable by reference."""
    if (control_flow, variable_kind) == ("control_flow_v2", "reference_variables"):
        pytest.skip("control flow v2 cannot assign variables by reference")


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_in_place_in_a_while_loop_updates_each_time_round(
    switch, start, variable, workable_variables
):
    """The gradient's own pass over the loop must not update once more."""
    batch, weights = make_batch(), make_batch(seed=1)
    x = tf.constant(batch, tf.float32)
    is_training = True if switch == "python_bool" else tf.constant(True)
    y = make_loop(x, is_training, update="in_place")
    loss = tf.reduce_sum(y * tf.constant(weights, tf.float32))
    gradients = tf.gradients(loss, [x, variable("bn/gamma"), variable("bn/beta")])
    session = start()
    output, actual = session.run([y, gradients])

    expected, mean, variance, exact = loop_reference(batch, weights)
    np.testing.assert_allclose(output, expected, **CLOSE)
    for one, other in zip(actual, exact):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    moving_mean, moving_variance = session.run(
        [variable("bn/moving_mean"), variable("bn/moving_variance")]
    )
    np.testing.assert_allclose(moving_mean, mean, **CLOSE)
    np.testing.assert_allclose(moving_variance, variance, **CLOSE)


def test_in_place_in_a_while_loop_in_evaluation_leaves_every_bit(
    start, variable, workable_variables
):
    is_training = tf.placeholder(tf.bool, [])
    y = make_loop(tf.constant(make_batch(), tf.float32), is_training, update="in_place")
    session = start()
    before = session.run(tf.global_variables())
    session.run(y, {is_training: False})
    for one, other in zip(before, session.run(tf.global_variables())):
        assert one.tobytes() == other.tobytes()
    session.run(y, {is_training: True})
    assert np.any(session.run(variable("bn/moving_mean")) != 0)


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
def test_a_while_loop_without_updates(
    is_training, start, variable, control_flow, variable_kind
):
    batch = make_batch()
    update = "skip" if is_training else "collection"
    y = make_loop(tf.constant(batch, tf.float32), is_training, update=update)
    session = start()
    before = session.run(tf.global_variables())
    output = session.run(y)
    expected = batch
    for _ in range(STEPS):
        if is_training:
            expected = reference.training_output(expected, GAMMA, BETA)
        else:
            expected = reference.normalize(
                expected, np.zeros(3), np.ones(3), GAMMA, BETA
            )
    np.testing.assert_allclose(output, expected, **CLOSE)
    for one, other in zip(before, session.run(tf.global_variables())):
        np.testing.assert_array_equal(one, other)


def test_in_place_in_a_cond_updates_when_its_branch_is_taken(
    start, variable, workable_variables
):
    batch = make_batch()
    x = tf.constant(batch, tf.float32)
    taken = tf.placeholder(tf.bool, [])
    y = tf.cond(taken, lambda: build(x, True, update="in_place"), lambda: x)
    session = start()
    np.testing.assert_allclose(session.run(y, {taken: False}), batch, rtol=1e-6)
    moving_mean = variable("bn/moving_mean")
    np.testing.assert_array_equal(session.run(moving_mean), np.zeros(3))
    output = session.run(y, {taken: True})
    np.testing.assert_allclose(
        output, reference.training_output(batch, GAMMA, BETA), **CLOSE
    )
    expected = reference.moving_average(0.0, [batch.mean(axis=0)], DECAY)[-1]
    np.testing.assert_allclose(session.run(moving_mean), expected, **CLOSE)


# ------------------------------------------------------ the collection is refused there


def assert_explains(caught, layer):
    message = str(caught.value)
    for part in ["`update`", "collection", 'update="in_place"', layer]:
        assert part in message, message


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_a_collection_in_a_while_loop(switch, control_flow):
    is_training = True if switch == "python_bool" else tf.constant(True)
    with tf.variable_scope("net"), pytest.raises(ValueError) as caught:
        make_loop(tf.zeros([8, 3]), is_training)
    assert_explains(caught, "net/bn")


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_a_collection_in_a_cond(switch, control_flow):
    is_training = True if switch == "python_bool" else tf.constant(True)
    x = tf.zeros([8, 3])
    with pytest.raises(ValueError) as caught:
        tf.cond(tf.placeholder(tf.bool, []), lambda: build(x, is_training), lambda: x)
    assert_explains(caught, "bn")


def test_a_collection_in_a_cond_with_a_decay_from_outside(control_flow):
    x, decay = tf.zeros([8, 3]), tf.constant(0.9)

    def layer():
        return bn_tf1.batch_norm(x, True, decay=decay, name="bn")

    with pytest.raises(ValueError) as caught:
        tf.cond(tf.placeholder(tf.bool, []), layer, lambda: x)
    assert_explains(caught, "bn")
    layer()  # outside there is nothing to refuse


def test_a_collection_in_a_cond_in_a_loop(control_flow):
    def body(step, h):
        h = tf.cond(step > 0, lambda: build(h, True), lambda: h)
        return step + 1, h

    with pytest.raises(ValueError) as caught:
        tf.while_loop(lambda step, h: step < 2, body, [0, tf.zeros([8, 3])])
    assert_explains(caught, "bn")


def test_a_collection_in_a_dataset_map():
    dataset = tf.data.Dataset.from_tensors(np.zeros([8, 3], np.float32))
    with pytest.raises(ValueError) as caught:
        dataset.map(lambda x: build(x, True))
    assert_explains(caught, "bn")


def test_a_collection_in_a_function():
    function = tf.function(lambda x: build(x, True))
    with pytest.raises(ValueError) as caught:
        function(tf.zeros([8, 3]))
    assert_explains(caught, "bn")


def test_a_refused_layer_leaves_nothing_behind(graph, control_flow):
    with pytest.raises(ValueError):
        make_loop(tf.zeros([8, 3]), True)
    assert tf.global_variables() == []
    assert graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION) == []
    assert bn_tf1.batch_norm_calls() == ()


@pytest.mark.parametrize("context", ["device", "name_scope", "control_dependencies"])
def test_contexts_that_are_no_control_flow_are_accepted(context, graph):
    contexts = {
        "device": lambda: tf.device("/cpu:0"),
        "name_scope": lambda: tf.name_scope("tower"),
        "control_dependencies": lambda: tf.control_dependencies([tf.constant(1)]),
    }
    with contexts[context]():
        build(tf.zeros([8, 3]), True)
    assert len(graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)) == 2


def test_after_a_loop_the_collection_works_again(control_flow, graph):
    h = tf.while_loop(lambda h: False, lambda h: h, [tf.zeros([8, 3])])
    build(tf.reshape(h, [8, 3]), True)
    assert len(graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)) == 2


# --------------------------------------------------------------------------- functions


@pytest.mark.parametrize("update", ["in_place", "skip"])
def test_in_a_function(update, start, variable):
    """A function takes resources alone, and variables made before its first call."""
    tf.enable_resource_variables()
    try:
        batch = make_batch()
        x = tf.constant(batch, tf.float32)
        build(x, False)
        function = tf.function(
            lambda x: build(x, True, update=update, reuse=True), autograph=False
        )
        y = function(x)
        session = start()
        output = session.run(y)
        np.testing.assert_allclose(
            output, reference.training_output(batch, GAMMA, BETA), **CLOSE
        )
        expected = (1 - DECAY) * batch.mean(axis=0) if update == "in_place" else 0
        moving_mean = session.run(variable("bn/moving_mean"))
        np.testing.assert_allclose(moving_mean, np.broadcast_to(expected, 3), **CLOSE)
    finally:
        tf.disable_resource_variables()


def test_in_a_dataset_map(start, variable):
    """Normalising the input as it is read, with statistics that follow it."""
    tf.enable_resource_variables()
    try:
        batches = np.stack([make_batch(seed) for seed in range(STEPS)])
        dataset = tf.data.Dataset.from_tensor_slices(batches.astype(np.float32))
        # TensorFlow 2.21 traces the function twice.
        dataset = dataset.map(
            lambda x: build(x, True, update="in_place", reuse=tf.AUTO_REUSE)
        )
        iterator = tf.data.make_initializable_iterator(dataset)
        y = iterator.get_next()
        session = start()
        session.run(iterator.initializer)
        for batch in batches:
            np.testing.assert_allclose(
                session.run(y), reference.training_output(batch, GAMMA, BETA), **CLOSE
            )
        means = reference.moving_average(0.0, batches.mean(axis=1), DECAY)
        moving_mean = session.run(variable("bn/moving_mean"))
        np.testing.assert_allclose(moving_mean, means[-1], **CLOSE)
    finally:
        tf.disable_resource_variables()


def test_eager_execution_is_refused(session):
    """tf.py_function runs its body eagerly, where there is no graph to build."""
    y = tf.py_function(lambda x: build(x, True), [tf.zeros([8, 3])], tf.float32)
    with pytest.raises(tf.errors.UnknownError, match="RuntimeError.*eager"):
        session.run(y)
