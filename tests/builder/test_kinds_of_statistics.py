"""Weighted, ghost-batch and renormalised statistics against float64.

The oracle computes each from its definition: values repeated as often as they weigh,
ghost batches normalised one by one, the corrections of the paper step by step.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import Renormalization, batch_norm, batch_norm_calls
from tests import reference

pytestmark = pytest.mark.usefixtures("small_and_large")

# float32 with its roundings on values of size 1 to 10, and float64.
TOLERANCES = {"float32": 2e-5, "float64": 1e-11}
GAMMA, BETA = np.array([0.5, -1.5, 2.0]), np.array([0.25, 0.0, -1.0])


def make_batch(*shape, seed=0):
    random = np.random.RandomState(seed)
    return random.normal(1.5, 0.8, shape).astype(np.float32).astype(np.float64)


def initial(**values):
    return {key: tf.constant_initializer(value) for key, value in values.items()}


def update_ops():
    return tf.get_collection("update_ops")


@pytest.fixture(params=list(TOLERANCES))
def dtype(request):
    return request.param


def close(actual, expected, dtype):
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------- weights


def repeated(batch, weights):
    return np.repeat(batch, weights.astype(int), axis=0)


@pytest.mark.parametrize("ema_variance", ["biased", "unbiased"])
def test_weights_are_repetitions(dtype, ema_variance, start, variable):
    batch, weights = make_batch(5, 4, 3), np.array([2, 0, 1, 3, 1])
    x = tf.constant(batch, dtype)
    y = batch_norm(
        x,
        True,
        decay=0.0,
        weights=tf.constant(weights, dtype),
        initializers=initial(gamma=GAMMA, beta=BETA),
        ema_variance=ema_variance,
    )
    session = start()
    output, _ = session.run([y, update_ops()])
    moments = reference.moments(repeated(batch, weights))
    expected = reference.normalize(batch, moments.mean, moments.variance, GAMMA, BETA)
    close(output, expected, dtype)
    averaged = moments.variance
    if ema_variance == "unbiased":
        averaged = reference.unbiased(averaged, moments.count)
    close(session.run(variable("batch_norm/moving_mean")), moments.mean, dtype)
    close(session.run(variable("batch_norm/moving_variance")), averaged, dtype)


@pytest.mark.parametrize("weight", [0.05, 0.2])
def test_a_sum_of_weights_up_to_1_leaves_the_variance_biased(weight, start, variable):
    """N - 1 would make it negative, or infinite."""
    batch = make_batch(5, 3)
    batch_norm(
        tf.constant(batch, tf.float32),
        True,
        decay=0.0,
        weights=tf.fill([5], weight),
        ema_variance="unbiased",
    )
    session = start()
    session.run(update_ops())
    expected = reference.moments(batch).variance
    close(session.run(variable("batch_norm/moving_variance")), expected, "float32")


def test_weights_gradients(session):
    """Those of x and of the weights, by central differences."""
    batch, dy = (
        make_batch(4, 3),
        reference.make_output_gradient(reference.Case((4, 3), -1)),
    )
    weights = np.array([2.0, 0.5, 1.0, 0.25])
    x, w = tf.placeholder(tf.float64, [4, 3]), tf.placeholder(tf.float64, [4])
    y = batch_norm(x, True, weights=w)
    gradients = tf.gradients(tf.reduce_sum(y * dy), [x, w])
    session.run(tf.global_variables_initializer())

    def loss(values, weighing):
        total = weighing.sum()
        mean = (weighing[:, None] * values).sum(axis=0) / total
        variance = (weighing[:, None] * (values - mean) ** 2).sum(axis=0) / total
        return (dy * reference.normalize(values, mean, variance)).sum()

    of_x, of_w = session.run(gradients, {x: batch, w: weights})
    expected = reference.central_differences(lambda v: loss(v, weights), batch)
    np.testing.assert_allclose(of_x, expected, rtol=1e-6, atol=1e-7)
    expected = reference.central_differences(lambda v: loss(batch, v), weights)
    np.testing.assert_allclose(of_w, expected, rtol=1e-6, atol=1e-7)


def test_a_mask_leaves_padding_out(start, variable):
    """Whatever the padding is, and with sizes that the graph does not know."""
    batch, lengths = make_batch(3, 5, 2), np.array([5, 2, 3])
    mask = np.arange(5) < lengths[:, None]
    batch[~mask] = 1e4
    x = tf.placeholder(tf.float32, [None, None, 2])
    w = tf.placeholder(tf.float32, [None, None, 1])
    y = batch_norm(x, True, decay=0.0, weights=w)
    session = start()
    output, _ = session.run([y, update_ops()], {x: batch, w: mask[:, :, None]})
    moments = reference.moments(batch[mask])
    close(session.run(variable("batch_norm/moving_mean")), moments.mean, "float32")
    expected = reference.normalize(batch[mask], moments.mean, moments.variance)
    close(output[mask], expected, "float32")


RENORM = Renormalization(decay=0.8, rmin=0.5, rmax=2.0, dmax=3.0)


@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
@pytest.mark.parametrize(
    "options",
    [{}, {"renorm": RENORM}, {"skip_nonfinite": False, "zero_debias": True}],
    ids=["plain", "renorm", "unguarded"],
)
def test_without_any_weight_the_moving_statistics_normalise(options, switch, start):
    """And nothing moves; what comes before the layer gets the gradient of a constant one."""
    mode = tf.placeholder_with_default(True, []) if switch == "tensor" else True
    batch, before = make_batch(4, 3), tf.get_variable("before", initializer=np.ones(3))
    x = tf.constant(batch) * before
    y = batch_norm(x, mode, weights=tf.zeros([4], tf.float64), **options)
    slopes = tf.gradients(tf.reduce_sum(y * y), [before, *tf.trainable_variables()[1:]])
    moving = [v for v in tf.global_variables() if v not in tf.trainable_variables()]
    session = start()
    for number, v in enumerate(moving):
        if v.shape.ndims:
            v.load(np.full(3, 2.0 + number), session)
    kept = session.run(moving)
    output, slopes, _ = session.run([y, slopes, update_ops()])
    for one, other in zip(kept, session.run(moving)):
        np.testing.assert_array_equal(one, other)
    mean, variance = (
        value
        for v, value in zip(moving, kept)
        if v.op.name in ("batch_norm/moving_mean", "batch_norm/moving_variance")
    )
    expected = reference.normalize(batch, mean, variance)
    close(output, expected, "float64")
    inverse = 1 / np.sqrt(variance + 1e-3)
    for found, exact in zip(
        slopes,
        [
            (2 * expected * inverse * batch).sum(0),
            (2 * expected * expected).sum(0),
            (2 * expected).sum(0),
        ],
    ):
        np.testing.assert_allclose(found, exact, rtol=1e-9)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    "options",
    [
        {"renorm": RENORM},
        {"ghost_batch_size": 2, "renorm": RENORM},
        {"weights": np.zeros([0], "f")},
        {"skip_nonfinite": False},
        {"adjustment": lambda shape: (2.0, 1.0)},
    ],
    ids=["renorm", "ghosts", "weights", "unguarded", "adjustment"],
)
def test_an_empty_batch_of_any_kind_changes_nothing(options, known, start):
    x = tf.placeholder(tf.float32, [0 if known else None, 5, 3])
    y = batch_norm(x, True, **options)
    slopes = tf.gradients(tf.reduce_sum(y * y), tf.trainable_variables())
    session = start()
    before = session.run(tf.global_variables())
    slopes, _ = session.run([slopes, update_ops()], {x: np.zeros([0, 5, 3])})
    np.testing.assert_array_equal(slopes, np.zeros([2, 3]))
    for one, other in zip(before, session.run(tf.global_variables())):
        np.testing.assert_array_equal(one, other)


# ----------------------------------------------------------------------- ghost batches


def ghosts(batch, size):
    """The ghost batches: example i belongs to number i mod (B / size)."""
    number = len(batch) // size
    return [batch[first::number] for first in range(number)]


def ghost_output(batch, size, axis):
    number, output = len(batch) // size, np.empty_like(batch)
    for first in range(number):
        output[first::number] = reference.training_output(
            batch[first::number], GAMMA, BETA, axis
        )
    return output


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape, axis", [((6, 3), -1), ((6, 4, 3), -1), ((6, 3, 4), 1)])
@pytest.mark.parametrize("ema_variance", ["biased", "unbiased"])
def test_ghost_batches(dtype, known, shape, axis, ema_variance, start, variable):
    batch = make_batch(*shape)
    x = tf.placeholder(dtype, shape if known else (None,) + shape[1:])
    y = batch_norm(
        x,
        True,
        axis=axis,
        decay=0.0,
        ghost_batch_size=2,
        ema_variance=ema_variance,
        initializers=initial(gamma=GAMMA, beta=BETA),
    )
    assert y.shape.as_list() == x.shape.as_list()
    session = start()
    output, _ = session.run([y, update_ops()], {x: batch})
    close(output, ghost_output(batch, 2, axis), dtype)
    each = [reference.moments(ghost, axis) for ghost in ghosts(batch, 2)]
    mean = np.mean([moments.mean for moments in each], axis=0)
    variances = [
        reference.unbiased(moments.variance, moments.count)
        if ema_variance == "unbiased"
        else moments.variance
        for moments in each
    ]
    close(session.run(variable("batch_norm/moving_mean")), mean, dtype)
    close(
        session.run(variable("batch_norm/moving_variance")),
        np.mean(variances, axis=0),
        dtype,
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "shape, axis",
    [((6, 3), -1), ((6, 4, 5, 3), -1), ((6, 3, 4, 5), 1), ((6, 4, 3, 5), 2)],
    ids=["rank2", "nhwc", "nchw", "nhcw"],
)
def test_ghost_batch_gradients(shape, axis, known, session):
    batch = make_batch(*shape)
    dy = reference.make_output_gradient(reference.Case(shape, axis))
    x = tf.placeholder(tf.float64, shape if known else (None, *shape[1:]))
    y = batch_norm(
        x,
        True,
        axis=axis,
        ghost_batch_size=3,
        initializers=initial(gamma=GAMMA, beta=BETA),
    )
    gradients = tf.gradients(tf.reduce_sum(y * dy), [x, *tf.trainable_variables()])
    session.run(tf.global_variables_initializer())
    dx, dgamma, dbeta = session.run(gradients, {x: batch})
    each = [
        reference.training_gradients(batch[first::2], dy[first::2], GAMMA, axis)
        for first in range(2)
    ]
    expected = np.empty_like(batch)
    for first, slopes in enumerate(each):
        expected[first::2] = slopes.x
    close(dx, expected, "float64")
    close(dgamma, sum(slopes.gamma for slopes in each), "float64")
    close(dbeta, sum(slopes.beta for slopes in each), "float64")


def test_ghost_batches_evaluate_with_any_size(start, control_flow):
    x, training = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.bool, [])
    y = batch_norm(x, training, ghost_batch_size=4)
    session, batch = start(), make_batch(5, 3)
    output = session.run(y, {x: batch, training: False})
    close(output, batch / np.sqrt(1.001), "float32")
    message = r"`ghost_batch_size` must divide.*batch_norm.*\[4\] ?\[5\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        session.run(y, {x: batch, training: True})


def test_a_known_batch_that_does_not_divide():
    x = tf.zeros([5, 3])
    with pytest.raises(ValueError, match="is 4, and the batch has 5 examples"):
        batch_norm(x, True, ghost_batch_size=4, name="bn")
    assert batch_norm(x, False, ghost_batch_size=4).shape.as_list() == [5, 3]


# ---------------------------------------------------------------------- renormalisation


class Renormalized:
    """The state of a renormalised layer, updated as the paper says."""

    def __init__(self, decay, renorm_decay, epsilon):
        self.decay, self.renorm_decay, self.epsilon = decay, renorm_decay, epsilon
        self.moving_mean = self.renorm_mean = np.zeros(3)
        self.moving_stddev = self.renorm_stddev = np.ones(3)

    def step(self, batch, rmin, rmax, dmax):
        moments = reference.moments(batch)
        stddev = np.sqrt(moments.variance + self.epsilon)
        r = np.clip(stddev / self.renorm_stddev, rmin, rmax)
        d = np.clip((moments.mean - self.renorm_mean) / self.renorm_stddev, -dmax, dmax)
        output = ((batch - moments.mean) / stddev * r + d) * GAMMA + BETA
        for key, value, decay in [
            ("moving_mean", moments.mean, self.decay),
            ("moving_stddev", stddev, self.decay),
            ("renorm_mean", moments.mean, self.renorm_decay),
            ("renorm_stddev", stddev, self.renorm_decay),
        ]:
            (moved,) = reference.moving_average(getattr(self, key), [value], decay)
            setattr(self, key, moved)
        return output

    @property
    def moving_variance(self):
        return np.maximum(self.moving_stddev**2 - self.epsilon, 0)


@pytest.mark.parametrize("bounds", [(0.0, np.inf, np.inf), (0.9, 1.1, 0.1)])
def test_renormalisation(dtype, bounds, start, variable):
    rmin, rmax, dmax = bounds
    x, training = tf.placeholder(dtype, [8, 3]), tf.placeholder(tf.bool, [])
    renorm = Renormalization(decay=0.6)
    if np.isfinite(rmax):
        renorm = Renormalization(decay=0.6, rmin=rmin, rmax=rmax, dmax=dmax)
    y = batch_norm(
        x,
        training,
        decay=0.8,
        epsilon=0.01,
        renorm=renorm,
        initializers=initial(gamma=GAMMA, beta=BETA),
    )
    oracle, session = Renormalized(0.8, 0.6, 0.01), start()
    for step in range(4):
        batch = make_batch(8, 3, seed=step)
        output, _ = session.run([y, update_ops()], {x: batch, training: True})
        close(output, oracle.step(batch, rmin, rmax, dmax), dtype)
        for key in ("moving_mean", "moving_stddev", "renorm_mean", "renorm_stddev"):
            actual = session.run(variable("batch_norm/" + key))
            close(actual, getattr(oracle, key), dtype)
        actual = session.run(variable("batch_norm/moving_variance"))
        close(actual, oracle.moving_variance, dtype)
    output = session.run(y, {x: batch, training: False})
    expected = reference.normalize(
        batch, oracle.moving_mean, oracle.moving_variance, GAMMA, BETA, epsilon=0.01
    )
    close(output, expected, dtype)


def test_renormalised_training_is_inference(start):
    """What renormalisation is for: without bounds, both give the same output."""
    x, training = tf.placeholder(tf.float64, [8, 3]), tf.placeholder(tf.bool, [])
    y = batch_norm(x, training, decay=0.9, renorm=Renormalization(decay=0.9))
    session = start()
    for step in range(3):
        feed = {x: make_batch(8, 3, seed=step), training: True}
        session.run([y, update_ops()], feed)
    inference, trained = (session.run(y, {**feed, training: t}) for t in (False, True))
    np.testing.assert_allclose(trained, inference, rtol=1e-9)


def test_renormalisation_passes_no_gradient_through_the_correction(session):
    """dx is that of batch normalization with gamma * r for gamma."""
    batch = make_batch(6, 3)
    dy = reference.make_output_gradient(reference.Case((6, 3), -1))
    x = tf.constant(batch)
    y = batch_norm(x, True, renorm=Renormalization(), initializers=initial(gamma=GAMMA))
    (gradient,) = tf.gradients(tf.reduce_sum(y * dy), [x])
    session.run(tf.global_variables_initializer())
    r = np.sqrt(reference.moments(batch).variance + 1e-3)  # renorm_stddev starts at 1
    expected = reference.training_gradients(batch, dy, GAMMA * r).x
    close(session.run(gradient), expected, "float64")


# ---------------------------------------------------------------------- the other options


def test_an_adjustment_comes_before_gamma_and_beta_in_training_only(start):
    batch, training = make_batch(6, 3), tf.placeholder(tf.bool, [])
    scale, offset = np.array([1.1, 0.9, 1.0]), np.array([0.2, 0.0, -0.1])
    y = batch_norm(
        tf.constant(batch),
        training,
        adjustment=lambda shape: (scale, offset),
        initializers=initial(gamma=GAMMA, beta=BETA),
    )
    session = start()
    adjusted = reference.training_output(batch) * scale + offset
    close(session.run(y, {training: True}), adjusted * GAMMA + BETA, "float64")
    expected = batch / np.sqrt(1.001) * GAMMA + BETA
    close(session.run(y, {training: False}), expected, "float64")


def test_a_tensor_trainable(start, variable):
    trainable = tf.placeholder(tf.bool, [])
    x = tf.constant(make_batch(6, 3))
    y = batch_norm(x, True, trainable=trainable)
    gradients = tf.gradients(tf.reduce_sum(y**3 + y), tf.trainable_variables())
    assert len(gradients) == 2
    session = start()
    frozen = session.run([gradients, update_ops()], {trainable: False})[0]
    np.testing.assert_array_equal(frozen, np.zeros([2, 3]))
    moving_mean = variable("batch_norm/moving_mean")
    np.testing.assert_array_equal(session.run(moving_mean), np.zeros(3))
    free = session.run([gradients, update_ops()], {trainable: True})[0]
    assert np.all(np.array(free)[1] != 0)
    assert np.all(session.run(moving_mean) != 0)


def test_a_constraint_holds_after_a_step(start, variable):
    y = batch_norm(
        tf.constant(make_batch(6, 3)),
        True,
        constraints={"gamma": lambda gamma: tf.clip_by_value(gamma, 0.0, 0.5)},
    )
    step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_sum(y))
    session = start()
    session.run(step)
    gamma = session.run(variable("batch_norm/gamma"))
    np.testing.assert_array_equal(gamma, [0.5] * 3)


def test_several_channel_axes(start, variable):
    batch = make_batch(5, 2, 4, 3)
    y = batch_norm(tf.constant(batch), True, axis=(1, -1), decay=0.0)
    session = start()
    output, _ = session.run([y, update_ops()])
    mean, variance = batch.mean((0, 2), keepdims=True), batch.var((0, 2), keepdims=True)
    close(output, (batch - mean) / np.sqrt(variance + 1e-3), "float64")
    close(session.run(variable("batch_norm/moving_mean")), mean, "float64")
    close(session.run(variable("batch_norm/moving_variance")), variance, "float64")


OPTIONS = {
    "weights": lambda: {"weights": tf.ones([6])},
    "ghost_batches": lambda: {"ghost_batch_size": 3},
    "renorm": lambda: {"renorm": Renormalization()},
}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_evaluation_leaves_every_bit(option, start, control_flow, variable_kind):
    x, training = tf.placeholder(tf.float32, [6, 3]), tf.placeholder(tf.bool, [])
    y = batch_norm(x, training, **OPTIONS[option]())
    session = start()
    session.run([y, update_ops()], {x: make_batch(6, 3), training: True})
    variables = tf.global_variables()
    before = session.run(variables)
    session.run([y, update_ops()], {x: make_batch(6, 3, seed=1), training: False})
    for one, other in zip(session.run(variables), before):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("option", list(OPTIONS))
def test_a_record_of_every_call(option):
    batch_norm(tf.zeros([6, 3]), True, **OPTIONS[option]())
    (call,) = batch_norm_calls()
    assert list(call.updates) == update_ops()
    assert call.batch_mean.shape.as_list() == [3]


def one():
    return tf.ones([6])


ERRORS = {
    "weights_shape": (lambda: {"weights": tf.ones([5])}, "`weights` is .*shape"),
    "weights_rank": (lambda: {"weights": tf.ones([6, 3])}, "`weights` is .*size 1"),
    "weights_dtype": (
        lambda: {"weights": tf.ones([6], tf.int32)},
        "`weights` is .*float tensor",
    ),
    "ghost_negative": (lambda: {"ghost_batch_size": -1}, "is -1, but must be an int"),
    "ghost_bool": (lambda: {"ghost_batch_size": True}, "is True, but must be an int"),
    "ghost_axis": (lambda: {"ghost_batch_size": 2, "axis": 0}, "`axis` is 0, but"),
    "ghost_weights": (
        lambda: {"ghost_batch_size": 2, "weights": one()},
        "`weights` is .*must be None with `ghost_batch_size`",
    ),
    "ghost_adjustment": (
        lambda: {"ghost_batch_size": 2, "adjustment": abs},
        "`adjustment` is .*must be None with `ghost_batch_size`",
    ),
    "renorm_unbiased": (
        lambda: {"renorm": Renormalization(), "ema_variance": "unbiased"},
        "`ema_variance` is 'unbiased'",
    ),
    "renorm_debiased": (
        lambda: {"renorm": Renormalization(), "zero_debias": True},
        "`zero_debias` True",
    ),
    "axis_twice": (lambda: {"axis": [1, -1]}, "must not name an axis twice"),
    "constraint": (lambda: {"constraints": {"gama": abs}}, "has the key 'gama'"),
}


@pytest.mark.parametrize("options, message", list(ERRORS.values()), ids=list(ERRORS))
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(tf.zeros([6, 3]), True, **options())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"renorm": True}, "`renorm` is True, but must be a bn_tf1.Renormalization"),
        ({"trainable": "yes"}, "`trainable` is 'yes', but must be a Python bool"),
        ({"axis": [1.0]}, "must be an int or several"),
    ],
)
def test_types(options, message):
    with pytest.raises(TypeError, match=message):
        batch_norm(tf.zeros([6, 3]), True, **options)
