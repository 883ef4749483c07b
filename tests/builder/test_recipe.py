"""`recipe.batch_norm`, and `batch_norm(kernel="recipe")`, which draws the same graph."""

import inspect

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import recipe
from tests import reference

DECAY, EPSILON = 0.9, 1e-3


def by_kernel(x, is_training, **options):
    return bn_tf1.batch_norm(x, is_training, kernel="recipe", **options)


BOTH = pytest.mark.parametrize("layer", [recipe.batch_norm, by_kernel])


def batches(shape, count=3):
    generator = np.random.RandomState(0)
    return [generator.normal(k, 1 + k, shape) for k in range(count)]


@BOTH
@pytest.mark.usefixtures("control_flow")
@pytest.mark.parametrize(
    "shape, axis, dtype",
    [((6, 3), -1, "float64"), ((4, 5, 5, 2), -1, "float32"), ((4, 3, 5), 1, "float64")],
    ids=["rank2", "nhwc", "ncw"],
)
def test_training_and_inference_by_a_tensor(layer, shape, axis, dtype, start, graph):
    x, mode = (
        tf.placeholder(dtype, [None, *shape[1:-1], shape[-1]]),
        tf.placeholder("bool"),
    )
    y = layer(x, mode, axis=axis, decay=DECAY, epsilon=EPSILON)
    dy = reference.make_output_gradient(reference.Case(shape, axis))
    slopes = tf.gradients(y, [x, *tf.trainable_variables()], tf.constant(dy, dtype))
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    moving = graph.get_collection("variables")[-2:]
    mean, variance = np.zeros(shape[axis]), np.ones(shape[axis])
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == "float32" else 1e-12}
    session = start()
    for batch in batches(shape):
        found = session.run([y, slopes, updates], {x: batch, mode: True})
        exact = reference.moments(batch, axis)
        mean = mean - (1 - DECAY) * (mean - exact.mean)
        variance = variance - (1 - DECAY) * (variance - exact.variance)
        expected = reference.training_output(batch, axis=axis, epsilon=EPSILON)
        np.testing.assert_allclose(found[0], expected, **tolerance)
        expected = reference.training_gradients(batch, dy, axis=axis, epsilon=EPSILON)
        for one, other in zip(found[1], expected):
            np.testing.assert_allclose(one, other, rtol=0, atol=40 * tolerance["atol"])
        before = session.run(moving)
        np.testing.assert_allclose(before, [mean, variance], **tolerance)
        output, _ = session.run([y, updates], {x: batch, mode: False})
        for one, other in zip(before, session.run(moving)):
            np.testing.assert_array_equal(one, other)
        expected = reference.normalize(batch, mean, variance, 1, 0, axis, EPSILON)
        np.testing.assert_allclose(output, expected, **tolerance)


@BOTH
@pytest.mark.parametrize("mode", [True, False, "tensor"])
def test_it_draws_tensorflows_own_operations(layer, mode, graph):
    x = tf.placeholder(tf.float32, [8, 4])
    mode = tf.placeholder(tf.bool, []) if mode == "tensor" else mode
    y = layer(x, mode)
    tf.gradients(y, [x, *tf.trainable_variables()])
    attributes = {key for op in graph.get_operations() for key in op.node_def.attr}
    assert "_gradient_op_type" not in attributes
    types = [op.type for op in graph.get_operations()]
    assert ("SquaredDifference" in types) == (mode is not False)
    assert not {"FusedBatchNormV3", "Assert", "IdentityN", "IsFinite"} & set(types)


@pytest.mark.parametrize("mode", [True, False, "tensor"])
def test_both_draw_the_same_graph(mode):
    drawn = []
    for layer in (recipe.batch_norm, by_kernel):
        with tf.Graph().as_default() as graph:
            is_training = tf.placeholder(tf.bool, []) if mode == "tensor" else mode
            layer(tf.placeholder(tf.float32, [8, 3, 4]), is_training, axis=1)
            # The builder shares the constants of initial values.
            kinds = [op.type for op in graph.get_operations()]
            drawn.append(
                sorted(kind for kind in kinds if kind not in ("Const", "Fill"))
            )
    assert drawn[0] == drawn[1]


@BOTH
@pytest.mark.parametrize("mode", [True, False, "tensor"])
def test_the_moving_statistics_get_no_gradient(layer, mode):
    mode = tf.placeholder(tf.bool, []) if mode == "tensor" else mode
    y = layer(tf.placeholder(tf.float32, [8, 4]), mode)
    moving = [v for v in tf.global_variables() if "moving" in v.op.name]
    assert tf.gradients(tf.reduce_sum(y * y), moving) == [None, None]


@BOTH
@pytest.mark.usefixtures("control_flow", "variable_kind")
def test_a_tool_can_freeze_it(layer, start):
    x, mode = (
        tf.placeholder(tf.float32, [8, 4], "x"),
        tf.placeholder("bool", [], "mode"),
    )
    y = tf.identity(layer(x, mode), "y")
    session = start()
    definition = tf.graph_util.convert_variables_to_constants(
        session, session.graph_def, ["y"]
    )
    (batch,) = batches((8, 4), 1)
    feeds = [{"x:0": batch, "mode:0": is_training} for is_training in (True, False)]
    expected = [session.run(y, feed) for feed in feeds]
    with tf.Graph().as_default() as frozen, tf.Session(graph=frozen) as other:
        tf.import_graph_def(definition, name="")
        for feed, values in zip(feeds, expected):
            np.testing.assert_array_equal(other.run("y:0", feed), values)


def test_half_precision_is_normalised_in_float32(start):
    (batch,) = batches((64, 4), 1)
    y = by_kernel(tf.constant(batch, tf.float16), True)
    assert y.dtype == tf.float16
    expected = reference.training_output(batch.astype(np.float16).astype(np.float64))
    np.testing.assert_allclose(start().run(y), expected, atol=4e-3)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("weights", np.ones(8, "f")),
        ("ghost_batch_size", 4),
        ("renorm", bn_tf1.Renormalization()),
        ("adjustment", lambda shape: (1.0, 0.0)),
        ("zero_debias", True),
        ("ema_variance", "unbiased"),
        ("update", "in_place"),
        ("fold", True),
        ("axis", [1, 2]),
    ],
)
def test_what_the_drawing_does_not_have(argument, value):
    x = tf.placeholder(tf.float32, [8, 3, 4])
    with pytest.raises(ValueError, match=f"'recipe'.*`{argument}`.*'auto'"):
        by_kernel(x, True, **{argument: value})
    assert tf.global_variables() == []


def test_it_is_a_page():
    assert len(inspect.getsource(recipe).splitlines()) <= 80
