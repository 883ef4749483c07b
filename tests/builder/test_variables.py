"""The variables of `batch_norm`: names, scopes, reuse, collections, initial values."""

import gc
import logging
import weakref

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1

NAMES = ["gamma", "beta", "moving_mean", "moving_variance"]


def build(x=None, is_training=True, **options):
    x = tf.zeros([4, 3]) if x is None else x
    return bn_tf1.batch_norm(x, is_training, **options)


def names(variables):
    return sorted(v.op.name for v in variables)


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "x_dtype, dtype",
    [
        (tf.float16, tf.float32),
        (tf.bfloat16, tf.float32),
        (tf.float32, tf.float32),
        (tf.float64, tf.float64),
    ],
)
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
def test_names_shapes_and_dtypes(x_dtype, dtype, is_training, variable, variable_kind):
    """The same in training and inference, so that a checkpoint serves both."""
    build(tf.zeros([4, 7, 3], x_dtype), is_training, axis=1)
    assert names(tf.global_variables()) == sorted("batch_norm/" + n for n in NAMES)
    for name in NAMES:
        found = variable("batch_norm/" + name)
        assert found.shape.as_list() == [7]
        assert found.dtype.base_dtype == dtype
    trainable = names(tf.trainable_variables())
    assert trainable == ["batch_norm/beta", "batch_norm/gamma"]


def test_names_are_numbered(variable):
    for _ in range(3):
        build()
    for scope in ("batch_norm", "batch_norm_1", "batch_norm_2"):
        for name in NAMES:
            variable(scope + "/" + name)
    assert len(tf.global_variables()) == 3 * len(NAMES)


def test_names_in_enclosing_scopes(variable):
    with tf.variable_scope("net"), tf.variable_scope("block"):
        build(name="bn")
    for name in NAMES:
        variable("net/block/bn/" + name)


def test_operations_lie_in_the_layers_scope(graph):
    with tf.variable_scope("net"):
        x = tf.zeros([4, 3])
        before = set(graph.get_operations())
        y = build(x, tf.placeholder(tf.bool, []), name="bn")
    assert y.op.name.startswith("net/bn/")
    made = set(graph.get_operations()) - before
    strays = [
        op.name
        for op in made
        if not op.name.startswith("net/bn/") and op.type != "Placeholder"
    ]
    assert strays == []


# ------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("reuse", [True, "AUTO_REUSE"])
def test_reuse_shares_the_variables(reuse, start, graph):
    reuse = tf.AUTO_REUSE if reuse == "AUTO_REUSE" else reuse
    x = tf.constant(np.random.RandomState(0).normal(size=[4, 3]), tf.float32)
    first = build(x, name="bn")
    second = build(x, name="bn", reuse=reuse)
    assert names(tf.global_variables()) == sorted("bn/" + name for name in NAMES)
    gamma = next(v for v in tf.trainable_variables() if "gamma" in v.name)
    session = start()
    session.run(gamma.assign([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(*session.run([first, second]))


def test_an_enclosing_scope_is_reused(start):
    x = tf.constant(np.random.RandomState(0).normal(size=[4, 3]), tf.float32)

    def network(is_training):
        return build(build(x, is_training), is_training)

    with tf.variable_scope("net"):
        network(True)
    with tf.variable_scope("net", reuse=True):
        network(False)
    assert len(tf.global_variables()) == 2 * len(NAMES)


def test_train_and_eval_graphs_share_statistics(start, graph):
    """The classic pair: one call that trains, one with reuse that evaluates."""
    batch = np.random.RandomState(0).normal(3.0, 2.0, size=[64, 3]).astype(np.float32)
    build(tf.constant(batch), True, decay=0.0, name="bn")
    evaluated = build(tf.constant(batch), False, name="bn", reuse=True)
    session = start()
    session.run(graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION))
    output = session.run(evaluated)
    np.testing.assert_allclose(output.mean(axis=0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(output.std(axis=0), np.ones(3), rtol=1e-3)


# ------------------------------------------------- initializers, regularizers, scopes


def test_initializers(start, variable):
    values = {name: index + np.arange(3.0) for index, name in enumerate(NAMES)}
    build(
        initializers={n: tf.constant_initializer(v) for n, v in values.items()},
    )
    session = start()
    for name, expected in values.items():
        np.testing.assert_array_equal(
            session.run(variable("batch_norm/" + name)), expected
        )


def test_an_enclosing_initializer_does_not_spoil_the_defaults(start, variable):
    with tf.variable_scope("net", initializer=tf.constant_initializer(7.0)):
        build()
    session = start()
    for name, expected in zip(NAMES, [1, 0, 0, 1]):
        value = session.run(variable("net/batch_norm/" + name))
        np.testing.assert_array_equal(value, [expected] * 3)


def test_regularization_losses_are_added_once(start):
    def loss_of(factor):
        return lambda weights: factor * tf.reduce_sum(tf.abs(weights))

    for reuse in (None, True):
        build(
            name="bn",
            reuse=reuse,
            regularizers={"gamma": loss_of(1.0), "beta": loss_of(10.0)},
            initializers={"beta": tf.ones_initializer()},
        )
    losses = tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES)
    assert sorted(start().run(losses)) == [3.0, 30.0]


def test_an_enclosing_regularizer_does_not_apply():
    with tf.variable_scope("net", regularizer=tf.nn.l2_loss):
        build()
    assert tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES) == []


def test_an_enclosing_partitioner_does_not_apply(variable, start):
    with tf.variable_scope("net", partitioner=tf.fixed_size_partitioner(2)):
        y = build(tf.zeros([4, 6]))
    for name in NAMES:
        assert variable("net/batch_norm/" + name).shape.as_list() == [6]
    start().run(y)


def test_the_enclosing_scope_keeps_its_regularizer_and_partitioner():
    with tf.variable_scope("net", regularizer=tf.nn.l2_loss) as scope:
        build()
        assert scope.regularizer is tf.nn.l2_loss
        tf.get_variable("weights", [3])
    assert len(tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES)) == 1


# ------------------------------------------------------------------- the calls' records


def test_batch_norm_calls(graph, variable):
    assert bn_tf1.batch_norm_calls() == ()
    build(name="first")
    with tf.variable_scope("net"):
        build(name="second", is_training=False, center=False)
        build(name="third", is_training=tf.constant(True), scale=False)
    build(name="fourth", update="in_place")
    build(name="fifth", update="skip")
    calls = bn_tf1.batch_norm_calls(graph)
    assert isinstance(calls, tuple)
    assert [call.name for call in calls] == [
        "first",
        "net/second",
        "net/third",
        "fourth",
        "fifth",
    ]
    assert calls[0]._fields == bn_tf1.BatchNormCall._fields
    assert calls[0]._fields == (
        "name",
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
        "batch_mean",
        "batch_variance",
        "updates",
        "x",
        "arguments",
        "bank",
        "is_chosen",
    )
    for name in NAMES:
        assert getattr(calls[0], name) is variable("first/" + name)
    assert calls[1].beta is None and calls[2].gamma is None
    assert calls[1].gamma is variable("net/second/gamma")
    assert calls[1].batch_mean is None and calls[1].batch_variance is None
    for call in calls[:1] + calls[2:]:
        assert call.batch_mean.shape.as_list() == [3]
        assert call.batch_variance.shape.as_list() == [3]
    assert [len(call.updates) for call in calls] == [2, 0, 2, 2, 0]
    assert all(isinstance(op, tf.Operation) for c in calls for op in c.updates)
    collected = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    assert tuple(collected) == calls[0].updates + calls[2].updates


def test_batch_norm_calls_are_those_of_one_graph(graph):
    build()
    with tf.Graph().as_default() as other:
        assert bn_tf1.batch_norm_calls() == ()
        build(name="elsewhere")
        assert [call.name for call in bn_tf1.batch_norm_calls(graph)] == ["batch_norm"]
    assert [call.name for call in bn_tf1.batch_norm_calls(other)] == ["elsewhere"]


def test_batch_statistics_are_recorded(start):
    batch = np.random.RandomState(0).normal(2.0, size=[8, 3]).astype(np.float32)
    build(tf.constant(batch))
    call = bn_tf1.batch_norm_calls()[0]
    mean, variance = start().run([call.batch_mean, call.batch_variance])
    np.testing.assert_allclose(mean, batch.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, batch.var(axis=0), rtol=1e-5)


def test_the_records_end_with_their_graph():
    """They are kept in the graph, not in a global table that would keep it alive."""
    with tf.Graph().as_default() as graph:
        build()
    graph = weakref.ref(graph)
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("update", ["collection", "in_place"])
def test_export_meta_graph_logs_no_warning(update):
    build(is_training=tf.placeholder(tf.bool, []), update=update, zero_debias=True)
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = tf.get_logger()
    logger.addHandler(handler)
    try:
        meta_graph = tf.train.export_meta_graph()
        logger.warning("the handler works")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["the handler works"]
    # The records are not in it either: their names alone would break the import.
    known = {"variables", "trainable_variables", "update_ops", "cond_context"}
    assert set(meta_graph.collection_def) <= known


def test_a_meta_graph_keeps_the_update_ops(start):
    build(tf.placeholder(tf.float32, [None, 3], name="x"), decay=0.0)
    meta_graph = tf.train.export_meta_graph()
    with tf.Graph().as_default() as graph, tf.Session() as session:
        tf.train.import_meta_graph(meta_graph)
        session.run(tf.global_variables_initializer())
        updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
        session.run(updates, {"x:0": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]})
        moving_mean = [v for v in tf.global_variables() if "moving_mean" in v.name]
        np.testing.assert_allclose(session.run(moving_mean[0]), [2, 3, 4], rtol=1e-6)
