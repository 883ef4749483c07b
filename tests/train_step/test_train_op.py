"""`make_train_op`: what one step runs, in which order, and what it refuses."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

LEARNING_RATE = 0.5
BATCH = np.random.RandomState(0).normal(3.0, 2.0, size=[8, 3]).astype(np.float32)


def make_layer(x=None, is_training=True, **options):
    x = tf.constant(BATCH) if x is None else x
    return bn_tf1.batch_norm(x, is_training, decay=0.0, **options)


def make_loss(y):
    return tf.reduce_mean(tf.square(y - 1.0))


def make_optimizer():
    return tf.train.GradientDescentOptimizer(LEARNING_RATE)


def assert_says(caught, *parts):
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# ------------------------------------------------------------------------- what it runs


def test_a_step_trains_updates_and_counts(start, variable, variable_kind):
    loss = make_loss(make_layer())
    global_step = tf.train.get_or_create_global_step()
    train_op = bn_tf1.make_train_op(loss, make_optimizer(), global_step=global_step)
    assert isinstance(train_op, tf.Operation)
    session = start()
    losses = [session.run([loss, train_op])[0] for _ in range(3)]
    assert session.run(global_step) == 3
    np.testing.assert_allclose(
        session.run(variable("batch_norm/moving_mean")), BATCH.mean(axis=0), rtol=1e-5
    )
    assert losses[2] < losses[1] < losses[0]


def test_without_a_global_step_none_is_touched(start):
    loss = make_loss(make_layer())
    global_step = tf.train.get_or_create_global_step()
    train_op = bn_tf1.make_train_op(loss, make_optimizer())
    session = start()
    session.run(train_op)
    assert session.run(global_step) == 0


@pytest.mark.parametrize("is_training", [True, False])
def test_a_tensor_switch(is_training, start, variable, control_flow):
    """A step in evaluation trains gamma and beta but leaves the statistics alone."""
    switch = tf.placeholder(tf.bool, [])
    train_op = bn_tf1.make_train_op(
        make_loss(make_layer(is_training=switch)), make_optimizer()
    )
    session = start()
    session.run(train_op, {switch: is_training})
    moving_mean = session.run(variable("batch_norm/moving_mean"))
    expected = BATCH.mean(axis=0) if is_training else np.zeros(3)
    np.testing.assert_allclose(moving_mean, expected, rtol=1e-5)
    assert np.any(session.run(variable("batch_norm/beta")) != 0)


def test_the_gradients_are_applied_after_the_updates(start, variable):
    """An update that fails stops the step before it changes a weight."""
    y = make_layer()
    loss = make_loss(y)
    broken = tf.Assert(tf.constant(False), ["broken update"])
    tf.add_to_collection(bn_tf1.UPDATE_OPS_COLLECTION, broken)
    train_op = bn_tf1.make_train_op(loss, make_optimizer())
    session = start()
    with pytest.raises(tf.errors.InvalidArgumentError, match="broken update"):
        session.run(train_op)
    np.testing.assert_array_equal(session.run(variable("batch_norm/beta")), np.zeros(3))


def test_one_gradient_step(start, variable):
    """beta - learning_rate * gradient, with the oracle's gradient."""
    loss = make_loss(make_layer())
    train_op = bn_tf1.make_train_op(loss, make_optimizer())
    session = start()
    session.run(train_op)
    dy = 2 * (reference.training_output(BATCH) - 1.0) / BATCH.size
    gradients = reference.training_gradients(BATCH, dy)
    gamma, beta = session.run(
        [variable("batch_norm/gamma"), variable("batch_norm/beta")]
    )
    np.testing.assert_allclose(gamma, 1 - LEARNING_RATE * gradients.gamma, rtol=1e-5)
    np.testing.assert_allclose(beta, -LEARNING_RATE * gradients.beta, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.01, 1e6], ids=["clipped", "not_reached"])
def test_clip_norm_bounds_the_global_norm(clip_norm, start):
    """One norm over all the gradients together, not one for each."""
    loss = make_loss(make_layer())
    train_op = bn_tf1.make_train_op(loss, make_optimizer(), clip_norm=clip_norm)
    gradients = tf.gradients(loss, tf.trainable_variables())
    session = start()
    before, gradients = session.run([tf.trainable_variables(), gradients])
    session.run(train_op)
    after = session.run(tf.trainable_variables())
    norm = np.sqrt(sum((gradient.astype(float) ** 2).sum() for gradient in gradients))
    assert 0.01 < norm < 1e6
    factor = LEARNING_RATE * min(1.0, clip_norm / norm)
    for old, new, gradient in zip(before, after, gradients):
        np.testing.assert_allclose(old - new, factor * gradient, rtol=1e-3, atol=1e-6)


def test_the_given_variables_alone_are_trained(start, variable):
    loss = make_loss(make_layer())
    gamma, beta = variable("batch_norm/gamma"), variable("batch_norm/beta")
    train_op = bn_tf1.make_train_op(loss, make_optimizer(), variables=[beta])
    session = start()
    session.run(train_op)
    assert np.all(session.run(beta) != 0)
    np.testing.assert_array_equal(session.run(gamma), np.ones(3))


def test_variables_without_a_gradient_are_passed_over(start):
    loss = make_loss(make_layer())
    unrelated = tf.get_variable("unrelated", initializer=1.0)
    train_op = bn_tf1.make_train_op(loss, make_optimizer(), clip_norm=1.0)
    session = start()
    session.run(train_op)
    assert session.run(unrelated) == 1.0


def test_other_update_ops_of_the_collection_run_too(start):
    counter = tf.get_variable("counter", initializer=0, trainable=False)
    tf.add_to_collection(bn_tf1.UPDATE_OPS_COLLECTION, tf.assign_add(counter, 1))
    train_op = bn_tf1.make_train_op(make_loss(make_layer()), make_optimizer())
    session = start()
    session.run(train_op)
    assert session.run(counter) == 1


def test_the_graph_is_the_one_of_the_loss(graph):
    """It may be called when another graph is the default one."""
    loss = make_loss(make_layer())
    with tf.Graph().as_default() as other:
        train_op = bn_tf1.make_train_op(loss, make_optimizer())
        assert train_op.graph is graph
        assert other.get_operations() == []


def test_explicit_update_ops(start, variable):
    loss = make_loss(make_layer(updates_collection="mine"))
    updates = tf.get_collection("mine")
    train_op = bn_tf1.make_train_op(loss, make_optimizer(), update_ops=updates)
    start().run(train_op)


def test_two_train_ops_share_the_layers(start, variable):
    """As for a GAN: each runs its own layer's updates and names the other's."""
    losses = {name: make_loss(make_layer(name=name)) for name in ("one", "other")}
    calls = {call.name: call for call in bn_tf1.batch_norm_calls()}
    train_ops = {
        name: bn_tf1.make_train_op(
            loss,
            make_optimizer(),
            update_ops=calls[name].updates,
            ignored_layers=[other],
        )
        for (name, loss), other in zip(losses.items(), ("other", "one"))
    }
    session = start()
    session.run(train_ops["one"])
    assert np.all(session.run(variable("one/moving_mean")) != 0)
    np.testing.assert_array_equal(
        session.run(variable("other/moving_mean")), np.zeros(3)
    )


# ------------------------------------------------------- updates that run by themselves


@pytest.mark.parametrize("update", ["in_place", "skip"])
def test_a_layer_on_the_way_to_the_loss(update, start, variable):
    train_op = bn_tf1.make_train_op(
        make_loss(make_layer(update=update)), make_optimizer(), update_ops=[]
    )
    session = start()
    session.run(train_op)
    moving_mean = session.run(variable("batch_norm/moving_mean"))
    assert np.any(moving_mean != 0) == (update == "in_place")


def test_an_in_place_layer_in_a_loop(start, variable, control_flow):
    tf.enable_resource_variables()
    try:
        y = tf.while_loop(
            lambda step, h: step < 2,
            lambda step, h: (
                step + 1,
                make_layer(h, update="in_place", epsilon=1.0, name="bn"),
            ),
            [0, tf.constant(BATCH)],
        )[1]
        train_op = bn_tf1.make_train_op(make_loss(y), make_optimizer())
        session = start()
        session.run(train_op)
        # decay 0: the statistics are those of the input of the last time round.
        once_normalized = reference.training_output(BATCH, epsilon=1.0)
        np.testing.assert_allclose(
            session.run(variable("bn/moving_variance")),
            reference.moments(once_normalized).variance,
            rtol=1e-5,
        )
    finally:
        tf.disable_resource_variables()


def test_layers_in_inference_ask_for_nothing(start):
    loss = make_loss(make_layer(is_training=False))
    start()
    bn_tf1.make_train_op(loss, make_optimizer(), update_ops=[])


# ---------------------------------------------------------------------- what it refuses


def make_forgotten_layer(case):
    """A loss, and arguments that leave out the updates of the layer net/forgotten."""
    with tf.variable_scope("net"):
        if case == "no_update_ops":
            y = make_layer(name="forgotten")
            return make_loss(y), {"update_ops": []}
        if case == "own_collection":
            y = make_layer(name="forgotten", updates_collection="mine")
            return make_loss(y), {}
        if case == "in_place_beside_the_loss":
            make_layer(name="forgotten", update="in_place")
            return make_loss(make_layer(name="seen")), {}
        if case == "half_of_them":
            y = make_layer(name="forgotten")
            updates = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
            return make_loss(y), {"update_ops": updates[:1]}
        if case == "cleared_collection":
            y = make_layer(name="forgotten")
            tf.get_default_graph().clear_collection(bn_tf1.UPDATE_OPS_COLLECTION)
            return make_loss(y), {}
    raise ValueError(case)


FORGOTTEN = [
    "no_update_ops",
    "own_collection",
    "in_place_beside_the_loss",
    "half_of_them",
    "cleared_collection",
]


@pytest.mark.parametrize("case", FORGOTTEN)
def test_a_forgotten_layer_is_refused_by_name(case, graph):
    loss, options = make_forgotten_layer(case)
    operations = len(graph.get_operations())
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), **options)
    assert_says(caught, "net/forgotten", "update_ops", "ignored_layers")
    assert "net/seen" not in str(caught.value)
    assert len(graph.get_operations()) == operations, "refused before it is built"


@pytest.mark.parametrize("case", FORGOTTEN)
def test_a_forgotten_layer_may_be_ignored(case, start):
    loss, options = make_forgotten_layer(case)
    train_op = bn_tf1.make_train_op(
        loss, make_optimizer(), ignored_layers=["net/forgotten"], **options
    )
    start().run(train_op)


def test_all_forgotten_layers_are_named():
    y = make_layer(make_layer(name="one"), name="two")
    loss = make_loss(make_layer(y, name="three"))
    seen = bn_tf1.batch_norm_calls()[1].updates
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), update_ops=seen)
    assert_says(caught, "'one'", "'three'")
    assert "'two'" not in str(caught.value)


@pytest.mark.parametrize("tower", [0, 1], ids=["first", "second"])
def test_the_updates_of_one_call_of_a_reused_layer_suffice(tower, start, variable):
    """As for towers, where those of the others would count the same step again."""
    batches = [BATCH[:4], BATCH[4:]]
    losses = [
        make_loss(make_layer(tf.constant(batch), name="bn", reuse=tf.AUTO_REUSE))
        for batch in batches
    ]
    updates = bn_tf1.batch_norm_calls()[tower].updates
    train_op = bn_tf1.make_train_op(
        tf.add_n(losses), make_optimizer(), update_ops=updates
    )
    session = start()
    session.run(train_op)
    mean = session.run(variable("bn/moving_mean"))
    np.testing.assert_allclose(mean, batches[tower].mean(axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="'bn'"):
        bn_tf1.make_train_op(losses[0], make_optimizer(), update_ops=updates[:1])


def test_an_optimizer_of_keras():
    with pytest.raises(TypeError, match="`optimizer`.*must be a tf.train.Optimizer"):
        bn_tf1.make_train_op(make_loss(make_layer()), tf.keras.optimizers.Adam())


def test_an_ignored_layer_that_does_not_exist():
    loss = make_loss(make_layer(name="bn"))
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), ignored_layers=["bm"])
    assert_says(caught, "`ignored_layers`", "'bm'", "'bn'")


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan")])
def test_clip_norm_must_be_positive(clip_norm):
    loss = make_loss(make_layer())
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), clip_norm=clip_norm)
    assert_says(caught, f"`clip_norm` is {clip_norm}", "> 0")


def test_the_loss_must_be_a_scalar():
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(make_layer(), make_optimizer())
    assert_says(caught, "`loss`", "(8, 3)", "scalar")


@pytest.mark.parametrize("loss", [None, 1.0], ids=["none", "number"])
def test_the_loss_must_be_a_tensor(loss):
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer())
    assert_says(caught, f"`loss` is {loss}", "tensor")


def test_no_variables():
    loss = make_loss(make_layer(trainable=False))
    with pytest.raises(ValueError, match="[Nn]o variables") as caught:
        bn_tf1.make_train_op(loss, make_optimizer())
    assert_says(caught, "trainable=True", "`variables`")


def test_one_variable_by_itself():
    loss = make_loss(make_layer())
    (beta,) = (v for v in tf.trainable_variables() if "beta" in v.name)
    bn_tf1.make_train_op(loss, make_optimizer(), variables=beta)


def test_an_optimizer_that_chooses_its_variables_itself():
    loss = make_loss(make_layer(trainable=False))
    (beta,) = (v for v in tf.global_variables() if "beta" in v.name)

    class OfBeta(tf.train.GradientDescentOptimizer):
        def compute_gradients(self, loss, **others):
            return super().compute_gradients(loss, **{**others, "var_list": [beta]})

    bn_tf1.make_train_op(loss, OfBeta(LEARNING_RATE))


def test_an_empty_list_of_variables():
    loss = make_loss(make_layer())
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), variables=[])
    assert_says(caught, "`variables` is []", "None")


def test_no_gradient_for_any_variable():
    unrelated = tf.get_variable("unrelated", initializer=1.0)
    loss = make_loss(make_layer())
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), variables=[unrelated])
    assert_says(caught, "`loss`", "`variables`", "gradient")


def test_update_ops_from_another_graph():
    with tf.Graph().as_default():
        stray = tf.no_op(name="stray")
    loss = make_loss(make_layer())
    updates = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    with pytest.raises(ValueError) as caught:
        bn_tf1.make_train_op(loss, make_optimizer(), update_ops=updates + [stray])
    assert_says(caught, "`update_ops`", "stray", "graph")


# ------------------------------------------------------------ several calls of one layer

CALLS, DECAY = 20, 0.8
STEPS = [
    np.random.RandomState(k).normal(k / 3, 1 + k / 9, [6, 3]).astype(np.float32)
    for k in range(CALLS)
]
SHARED_LAYERS = {
    "batch_norm": lambda x, reuse: bn_tf1.batch_norm(
        x, True, decay=DECAY, name="bn", reuse=reuse
    ),
    "zero_debias": lambda x, reuse: bn_tf1.batch_norm(
        x, True, decay=DECAY, name="bn", reuse=reuse, zero_debias=True
    ),
    "recipe": lambda x, reuse: bn_tf1.batch_norm(
        x, True, decay=DECAY, name="bn", reuse=reuse, kernel="recipe"
    ),
    "layers": lambda x, reuse: bn_tf1.layers.batch_normalization(
        x, momentum=DECAY, name="bn", reuse=reuse, training=True
    ),
    "slim": lambda x, reuse: bn_tf1.slim.batch_norm(
        x, DECAY, scope="bn", reuse=reuse, scale=True, fused=False
    ),
}


@pytest.mark.parametrize("name", sorted(SHARED_LAYERS))
def test_calls_of_one_layer_update_it_in_their_order(
    name, start, variable, variable_kind
):
    """As of the items of a sequence: each moves what the one before it left."""
    ys = [
        SHARED_LAYERS[name](tf.constant(batch), k > 0 or None)
        for k, batch in enumerate(STEPS)
    ]
    loss = tf.add_n([make_loss(y) for y in ys])
    train_op = bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(0.0))
    mean, variance = np.zeros(3), np.ones(3)
    for batch in STEPS:
        moments = reference.moments(batch.astype(np.float64))
        mean = DECAY * mean + (1 - DECAY) * moments.mean
        variance = DECAY * variance + (1 - DECAY) * moments.variance
    if name == "zero_debias":
        mean, variance = (
            (value - DECAY**CALLS * first) / (1 - DECAY**CALLS)
            for value, first in ((mean, 0.0), (variance, 1.0))
        )
    session = start()
    session.run(train_op)
    for role, expected in (("moving_mean", mean), ("moving_variance", variance)):
        np.testing.assert_allclose(
            session.run(variable(f"bn/{role}")), expected, rtol=2e-5
        )


IN_PLACE = {
    "in_place": lambda x, reuse: bn_tf1.batch_norm(
        x, True, decay=DECAY, name="bn", reuse=reuse, update="in_place"
    ),
    "slim_in_place": lambda x, reuse: bn_tf1.slim.batch_norm(
        x, DECAY, scope="bn", reuse=reuse, updates_collections=None
    ),
}


@pytest.mark.parametrize("name", sorted({**SHARED_LAYERS, **IN_PLACE}))
def test_run_by_hand_they_stay_among_the_batches(name, start, variable, variable_kind):
    """In no order, 20 updates of one old value would move it 4 times the way."""
    layer = {**SHARED_LAYERS, **IN_PLACE}[name]
    ys = [layer(tf.constant(batch), k > 0 or None) for k, batch in enumerate(STEPS)]
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    assert len(updates) == (0 if name in IN_PLACE else 2 * CALLS)
    session = start()
    for _ in range(60):
        session.run(updates or ys)
    mean = session.run(variable("bn/moving_mean"))
    variance = session.run(variable("bn/moving_variance"))
    means, variances = zip(*((b.mean(0), b.var(0)) for b in STEPS))
    assert np.all((np.min(means, 0) < mean) & (mean < np.max(means, 0)))
    # The drop-in's is unbiased, 6 / 5 of that.
    assert np.all(
        (np.min(variances, 0) < variance) & (variance < 1.2 * np.max(variances, 0))
    )


def test_the_update_of_a_call_needs_no_other_calls_input(start, variable):
    """They are ordered when the train op is made, and not before."""
    x = [tf.placeholder(tf.float32, [6, 3]) for _ in range(2)]
    ys = [make_layer(t, name="bn", reuse=tf.AUTO_REUSE) for t in x]
    updates = bn_tf1.batch_norm_calls()[1].updates
    session = start()
    session.run(updates, {x[1]: STEPS[3]})
    mean = session.run(variable("bn/moving_mean"))
    np.testing.assert_allclose(mean, STEPS[3].mean(0), rtol=1e-5)
    train_op = bn_tf1.make_train_op(
        make_loss(ys[0]) + make_loss(ys[1]), make_optimizer()
    )
    session.run(train_op, dict(zip(x, STEPS)))
    mean = session.run(variable("bn/moving_mean"))
    np.testing.assert_allclose(mean, STEPS[1].mean(0), rtol=1e-5)
