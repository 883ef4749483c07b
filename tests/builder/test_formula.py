"""Output, gradients and moving statistics of `batch_norm` against the oracle.

The layer is run as a user runs it (update ops fetched with the step) and compared
with reference.py in float64, for every rank, axis, dtype and kind of shape.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import reference

DECAY = 0.9
EPSILON = 1e-3

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# Every case in float32, and one case of each kind in the other dtypes.
ONE_OF_EACH_KIND = ["rank2", "rank3_ncw", "rank4_nhwc", "rank4_nchw", "rank5_ncdhw"]
CASES_AND_DTYPES = [
    (name, dtype)
    for name in reference.CASES
    for dtype in DTYPES
    if dtype == "float32" or name in ONE_OF_EACH_KIND
]

every_case_and_dtype = pytest.mark.parametrize("name, dtype", CASES_AND_DTYPES)
every_size = pytest.mark.parametrize("sizes", ["known_sizes", "unknown_sizes"])


def make_input(case, dtype, sizes):
    """A placeholder for x: the channels are known, the other sizes by `sizes`."""
    shape = list(case.shape)
    if sizes == "unknown_sizes":
        shape = [None] * len(shape)
        shape[case.axis] = case.shape[case.axis]
    return tf.placeholder(dtype, shape)


def constants(**values):
    return {name: tf.constant_initializer(value) for name, value in values.items()}


def weighted_gradients(y, weights, inputs):
    """Gradients of sum(y * weights) in the statistics' dtype."""
    dtype = tf.float64 if y.dtype == tf.float64 else tf.float32
    loss = tf.reduce_sum(tf.cast(y, dtype) * tf.constant(weights, dtype))
    return tf.gradients(loss, inputs)


# -------------------------------------------------------------------------- training


@every_size
@every_case_and_dtype
def test_training_output_gradients_and_statistics(
    name, dtype, sizes, start, variable, graph
):
    case = reference.CASES[name]
    gamma, beta = reference.make_parameters(case.shape[case.axis])
    weights = reference.make_output_gradient(case)
    x = make_input(case, dtype, sizes)
    # A Python switch and a tensor one are different graphs of the same function.
    is_training = True if sizes == "known_sizes" else tf.placeholder(tf.bool, [])
    feed = {} if is_training is True else {is_training: True}
    y = bn_tf1.batch_norm(
        x,
        is_training,
        axis=case.axis,
        decay=DECAY,
        epsilon=EPSILON,
        initializers=constants(gamma=gamma, beta=beta),
    )
    assert y.dtype == tf.as_dtype(dtype)
    assert y.shape.as_list() == x.shape.as_list()
    parameters = [variable("batch_norm/gamma"), variable("batch_norm/beta")]
    moving = [
        variable("batch_norm/moving_mean"),
        variable("batch_norm/moving_variance"),
    ]
    gradients = weighted_gradients(y, weights, [x] + parameters)
    assert gradients[0].dtype == x.dtype
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    session = start()

    batches = [
        reference.make_batch(case, dtype, seed, mean=1 + seed) for seed in range(3)
    ]
    moments = [reference.moments(batch, case.axis) for batch in batches]
    means = reference.moving_average(0.0, [m.mean for m in moments], DECAY)
    variances = reference.moving_average(1.0, [m.variance for m in moments], DECAY)
    mean_tolerance = variance_tolerance = 0
    for step, batch in enumerate(batches):
        feed[x] = batch.astype(x.dtype.as_numpy_dtype)
        output, (dx, dgamma, dbeta), _ = session.run([y, gradients, updates], feed)
        mean, variance, _ = moments[step]
        expected = reference.training_output(batch, gamma, beta, case.axis, EPSILON)
        statistics = (mean, variance, gamma, case.axis, EPSILON, dtype)
        reference.assert_within(
            output,
            expected,
            reference.output_tolerance(batch, expected, *statistics),
            "output",
        )
        expected = reference.training_gradients(
            batch, weights, gamma, case.axis, EPSILON
        )
        allowed = reference.gradient_tolerances(batch, weights, *statistics)
        reference.assert_within(dx, expected.x, allowed.x, "gradient of x")
        reference.assert_within(
            dgamma, expected.gamma, allowed.gamma, "gradient of gamma"
        )
        reference.assert_within(dbeta, expected.beta, allowed.beta, "gradient of beta")

        # One step adds (1 - decay) of the batch's error, and the update's roundings.
        unit = reference.OPERATIONS * reference.statistics_rounding(dtype)
        mean_tolerance += reference.mean_tolerance(batch, case.axis, dtype)
        variance_tolerance += reference.variance_tolerance(batch, case.axis, dtype)
        moving_mean, moving_variance = session.run(moving)
        reference.assert_within(
            moving_mean, means[step], mean_tolerance + unit, "moving mean"
        )
        reference.assert_within(
            moving_variance,
            variances[step],
            variance_tolerance + unit * (1 + variances[step]),
            "moving variance",
        )


@pytest.mark.parametrize(
    "name, dtype, mode",
    [
        (name, dtype, mode)
        for name, dtype in CASES_AND_DTYPES
        for mode in ["python_bool", "tensor"]
    ]
    + [("rank4_nhwc", "float32", mode) for mode in ["numpy_bool", "variable"]],
)
def test_inference_output_and_gradients(name, dtype, mode, start, variable):
    case = reference.CASES[name]
    channels = case.shape[case.axis]
    gamma, beta = reference.make_parameters(channels)
    mean = reference.representable(np.linspace(-1, 2, channels), "float32")
    variance = reference.representable(np.linspace(0.3, 3, channels), "float32")
    weights = reference.make_output_gradient(case)
    x = make_input(case, dtype, "known_sizes")
    is_training, feed = make_inference_switch(mode)
    y = bn_tf1.batch_norm(
        x,
        is_training,
        axis=case.axis,
        epsilon=EPSILON,
        initializers=constants(
            gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance
        ),
    )
    parameters = [variable("batch_norm/gamma"), variable("batch_norm/beta")]
    gradients = weighted_gradients(y, weights, [x] + parameters)
    batch = reference.make_batch(case, dtype)
    feed[x] = batch.astype(x.dtype.as_numpy_dtype)
    output, (dx, dgamma, dbeta) = start().run([y, gradients], feed)

    statistics = (mean, variance, gamma, case.axis, EPSILON)
    expected = reference.normalize(
        batch, mean, variance, gamma, beta, case.axis, EPSILON
    )
    allowed = reference.output_tolerance(batch, expected, *statistics, dtype=dtype)
    reference.assert_within(output, expected, allowed, "output")
    expected = reference.inference_gradients(batch, weights, *statistics)
    allowed = reference.gradient_tolerances(batch, weights, *statistics, dtype=dtype)
    reference.assert_within(dx, expected.x, allowed.x, "gradient of x")
    reference.assert_within(dgamma, expected.gamma, allowed.gamma, "gradient of gamma")
    reference.assert_within(dbeta, expected.beta, allowed.beta, "gradient of beta")


def make_inference_switch(mode):
    """An `is_training` that is false, and what to feed for it."""
    if mode == "python_bool":
        return False, {}
    if mode == "numpy_bool":
        return np.bool_(False), {}
    if mode == "variable":
        return tf.get_variable("switch", initializer=False, trainable=False), {}
    is_training = tf.placeholder(tf.bool, [])
    return is_training, {is_training: False}


@pytest.mark.parametrize("statistics_from", ["batch", "moving"])
@pytest.mark.parametrize(
    "center, scale",
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["center_and_scale", "center", "scale", "neither"],
)
@pytest.mark.parametrize(
    "name, dtype",
    [("rank2", "float64"), ("rank4_nhwc", "float32"), ("rank4_nchw", "float32")],
)
def test_center_and_scale(name, dtype, center, scale, statistics_from, start):
    case = reference.CASES[name]
    gamma, beta = reference.make_parameters(case.shape[case.axis])
    given = {}
    if scale:
        given["gamma"] = gamma
    if center:
        given["beta"] = beta
    batch = reference.make_batch(case, dtype)
    weights = reference.make_output_gradient(case)
    x = tf.constant(batch, dtype)
    y = bn_tf1.batch_norm(
        x,
        statistics_from == "batch",
        axis=case.axis,
        epsilon=EPSILON,
        center=center,
        scale=scale,
        initializers=constants(**given),
    )
    names = sorted(v.op.name for v in tf.trainable_variables())
    assert names == sorted("batch_norm/" + name for name in given)
    gradients = weighted_gradients(y, weights, [x] + tf.trainable_variables())
    output, gradients = start().run([y, gradients])

    gamma, beta = given.get("gamma", 1.0), given.get("beta", 0.0)
    moments = reference.moments(batch, case.axis)
    if statistics_from == "moving":
        zeros = np.zeros_like(moments.mean)
        moments = reference.Moments(zeros, zeros + 1, moments.count)
        differentiate = reference.inference_gradients
        fixed = (moments.mean, moments.variance)
    else:
        differentiate = reference.training_gradients
        fixed = ()
    statistics = (moments.mean, moments.variance, gamma, case.axis, EPSILON, dtype)
    expected = reference.normalize(
        batch, moments.mean, moments.variance, gamma, beta, case.axis, EPSILON
    )
    allowed = reference.output_tolerance(batch, expected, *statistics)
    reference.assert_within(output, expected, allowed, "output")
    expected = differentiate(batch, weights, *fixed, gamma, case.axis, EPSILON)
    allowed = reference.gradient_tolerances(batch, weights, *statistics)
    reference.assert_within(gradients[0], expected.x, allowed.x, "gradient of x")
    for variable, gradient in zip(tf.trainable_variables(), gradients[1:]):
        kind = variable.op.name.split("/")[-1]
        tolerance = getattr(allowed, kind)
        reference.assert_within(gradient, getattr(expected, kind), tolerance, kind)


def test_the_default_parameters_are_identities(start, variable):
    """gamma 1, beta 0, moving mean 0, moving variance 1: inference is nearly x."""
    batch = reference.make_batch(reference.CASES["rank2"], "float32")
    y = bn_tf1.batch_norm(tf.constant(batch, tf.float32), False)
    output = start().run(y)
    expected = batch / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(output, expected, rtol=32 * 2.0**-24)


def test_the_two_row_example(start, variable, graph):
    """Known figures, so that the oracle itself is held to something."""
    img = np.array(
        [[0.69495416, 2.08983064, -1.08764684], [0.31431156, -0.98923939, -0.34656194]]
    )
    mean = [0.50463283, 0.55029559, -0.71710438]
    variance = [0.0362222, 2.37016821, 0.13730171]
    moments = reference.moments(img)
    # The example was worked out in float32: values of size 2 are good to 2e-7.
    np.testing.assert_allclose(moments.mean, mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(moments.variance, variance, rtol=0, atol=2e-7)

    y = bn_tf1.batch_norm(tf.constant(img, tf.float32), True, decay=0.0)
    session = start()
    output, _ = session.run([y, graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)])
    expected = (img - mean) / np.sqrt(np.array(variance) + 1e-3)
    # The inputs' 2e-7, divided by the smallest deviation, 0.19.
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)
    moving_mean, moving_variance = session.run(
        [variable("batch_norm/moving_mean"), variable("batch_norm/moving_variance")]
    )
    np.testing.assert_allclose(moving_mean, mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(moving_variance, variance, rtol=0, atol=5e-7)
