"""The kernels of `batch_norm`: each right, each chosen where it can be, and refused
where it cannot."""

import itertools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import statistics
from bn_tf1.statistics import channels_for_arithmetic
from bn_tf1.statistics import plan as planning
from tests import reference

EPSILON = 1e-3
IS_TENSORFLOW_1 = tf.version.VERSION.startswith("1.")


def normalize_by(kernel, x, gamma, beta, axis, unbiased=False):
    axes = statistics.channel_axes(x.shape.ndims, axis)
    plan = statistics.plan_of(x, axes, epsilon=EPSILON, kernel=kernel)
    is_fused = plan.kernel == "fused"
    normalize = (
        statistics.normalize_fused if is_fused else statistics.normalize_composed
    )
    return normalize(x, gamma, beta, plan, epsilon=EPSILON, unbiased=unbiased)


def seen(x, axis=-1):
    return channels_for_arithmetic(x, statistics.channel_axes(x.shape.ndims, axis))


def fused_cases():
    for name, case in reference.CASES.items():
        last = case.axis in (-1, len(case.shape) - 1)
        if last or not IS_TENSORFLOW_1:
            yield name


# ------------------------------------------------------------ both kernels, one answer


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize(
    "kernel, name",
    [("composed", name) for name in reference.CASES]
    + [("fused", name) for name in fused_cases()],
)
def test_output_statistics_and_gradients(kernel, name, unbiased, session):
    case = reference.CASES[name]
    batch = reference.make_batch(case, "float32")
    weights = reference.make_output_gradient(case)
    gamma, beta = reference.make_parameters(case.shape[case.axis])
    inputs = [tf.constant(array, tf.float32) for array in (batch, gamma, beta)]
    y, mean, variance, _ = normalize_by(kernel, *inputs, case.axis, unbiased)
    gradients = tf.gradients(y, inputs, tf.constant(weights, tf.float32))
    output, mean, variance, actual = session.run([y, mean, variance, gradients])

    moments = reference.moments(batch, case.axis)
    exact = reference.training_gradients(batch, weights, gamma, case.axis, EPSILON)
    settings = (moments.mean, moments.variance, gamma, case.axis, EPSILON, "float32")
    expected = reference.training_output(batch, gamma, beta, case.axis, EPSILON)
    allowed = reference.output_tolerance(batch, expected, *settings)
    reference.assert_within(output, expected, allowed, "output")
    allowed = reference.mean_tolerance(batch, case.axis, "float32")
    reference.assert_within(mean, moments.mean, allowed, "mean")
    allowed = reference.variance_tolerance(batch, case.axis, "float32")
    expected = moments.variance
    if unbiased:
        expected = reference.unbiased(expected, moments.count)
        allowed = reference.unbiased(allowed, moments.count)
    reference.assert_within(variance, expected, allowed, "variance")
    allowed = reference.gradient_tolerances(batch, weights, *settings)
    for field, value in zip(exact._fields, actual):
        reference.assert_within(
            value, getattr(exact, field), getattr(allowed, field), field
        )


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("sizes", ["known_sizes", "unknown_sizes"])
@pytest.mark.parametrize("axis", [-1, 1], ids=["last", "middle"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_composed_mean_of_300_deviations_is_closer_than_the_recipes(
    rank, axis, sizes, session
):
    """Whole digits closer: the residues take the first sum's rounding error out."""
    shape = {2: (4096, 8), 3: (64, 8, 64), 4: (16, 8, 16, 16), 5: (4, 8, 8, 8, 16)}[
        rank
    ]
    if rank > 2 and axis == -1:
        shape = (*shape[:1], *shape[2:], 8)
    batch = (300 + np.random.RandomState(0).normal(size=shape)).astype(np.float32)
    known = [None] * rank if sizes == "unknown_sizes" else list(shape)
    known[axis] = 8
    x = tf.placeholder(tf.float32, known)
    ours = normalize_by("composed", x, None, None, axis)[:3]
    axes = list(reference.reduction_axes(rank, axis))
    recipe = tf.nn.moments(x, axes)
    (y, mean, variance), theirs = session.run([ours, recipe], {x: batch})

    exact = reference.moments(batch, axis)
    assert np.abs(mean - exact.mean).max() <= 2 * np.spacing(np.float32(300))
    assert np.abs(mean - exact.mean).max() <= np.abs(theirs[0] - exact.mean).max()
    # One rounding of the mean, halved, over the deviation, and y's own.
    expected = reference.training_output(batch, axis=axis)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(variance, exact.variance, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "shape, axis, first",
    [
        ((2**17, 8), -1, 2**17),
        ((2**17 - 1, 8), -1, 2**17 - 1),  # a prime, which has no parts
        ((32, 64, 64, 8), -1, None),
        ((32, 8, 4096), 1, None),
        ((8, 2**17), 0, 8),
    ],
    ids=["flat", "prime", "image", "middle", "first"],
)
def test_a_mean_of_many_values_is_rounded_once(shape, axis, first, weighted, session):
    """Of 131,072 values of 300 deviations: one long sum is 2e-3 off, or more."""
    generator = np.random.RandomState(0)
    batch = (300 + generator.normal(size=shape)).astype(np.float32)
    x = tf.placeholder(tf.float32, [first, *shape[1:]])
    axes = reference.reduction_axes(len(shape), axis)
    weights = np.ones([1 if a not in axes else n for a, n in enumerate(shape)], "f")
    if weighted:
        weights = generator.randint(0, 3, weights.shape).astype(np.float32)
        moments = statistics.weighted_moments(x, seen(x, axis), tf.constant(weights))
    else:
        moments = statistics.batch_moments(x, seen(x, axis))
    mean = session.run(moments.mean, {x: batch})
    weights, batch = weights.astype(np.float64), batch.astype(np.float64)
    exact = (weights * batch).sum(axes) / weights.sum()
    # Half a unit of its last digit from rounding it, and as much for the parts.
    assert np.abs(mean - exact).max() <= np.spacing(np.float32(300))


@pytest.mark.parametrize("first", [5, None], ids=["known_batch", "unknown_batch"])
@pytest.mark.parametrize(
    "axes", [(1, 2), (3, 4), (2, 4), (1, 3), (2, 3, 4), (1, 2, 4)], ids=str
)
def test_several_channel_axes_are_normalised_as_one(axes, first, session, monkeypatch):
    monkeypatch.setattr(planning, "_SMALL", 0)
    generator = np.random.RandomState(0)
    shape = (5, 3, 4, 2, 6)
    values = (3 + generator.normal(size=shape)).astype(np.float32)
    dy = generator.normal(size=shape).astype(np.float32)
    reduced = tuple(a for a in range(5) if a not in axes)
    gamma = generator.normal(size=[shape[a] for a in axes]).astype(np.float32)
    x = tf.placeholder(tf.float32, (first, *shape[1:]))
    moments = statistics.batch_moments(x, seen(x, axes))
    y = statistics.normalize_with_moments(
        x, moments, tf.constant(gamma), None, seen(x, axes), epsilon=EPSILON
    )
    (dx,) = tf.gradients(y, x, tf.constant(dy))
    found = session.run([moments.mean, y, dx], {x: values})

    # As one channel axis, the last one, in float64.
    order = (*reduced, *axes)
    count = np.prod([shape[a] for a in axes])
    flat, dy = (t.transpose(order).reshape(-1, count) for t in (values, dy))
    back = np.argsort(order)
    sizes = [shape[a] for a in order]
    expected = [
        flat.astype(np.float64).mean(0).reshape(gamma.shape),
        reference.training_output(flat, gamma.ravel(), epsilon=EPSILON),
        reference.training_gradients(flat, dy, gamma.ravel(), epsilon=EPSILON).x,
    ]
    expected[1:] = [t.reshape(sizes).transpose(back) for t in expected[1:]]
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_variance_of_constant_examples_has_its_gradients(session):
    """The norm of what is 0 has none; its square has."""
    x = tf.constant([[[1.0, 1.0], [2.0, 5.0]], [[3.0, 3.0], [2.0, 2.0]]])
    variance = statistics.batch_moments(x, seen(x, 1)).variance
    centred = [[[-1.0, -1.0], [-0.75, 2.25]], [[1.0, 1.0], [-0.75, -0.75]]]
    (slope,) = tf.gradients(variance, x)
    (curvature,) = tf.gradients(slope[0, 0, 0], x)
    slope, curvature = session.run([slope, curvature])
    # 2 (x - mean) / 4, and 2 (1 - 1 / 4) / 4 and 2 (0 - 1 / 4) / 4.
    np.testing.assert_allclose(slope, np.array(centred) / 2, rtol=1e-6)
    np.testing.assert_allclose(curvature[:, 0], [[3 / 8, -1 / 8], [-1 / 8, -1 / 8]])
    np.testing.assert_array_equal(curvature[:, 1], 0)


@pytest.mark.usefixtures("small_and_large")
def test_a_weighted_mean_of_300_deviations_is_closer_than_the_recipes(session):
    generator = np.random.RandomState(0)
    batch = (300 + generator.normal(size=(64, 32, 32, 8))).astype(np.float32)
    weights = generator.randint(0, 3, (64, 32, 1, 1)).astype(np.float32)
    axes = (0, 1, 2)
    x = tf.constant(batch)
    ours = statistics.weighted_moments(x, seen(x), tf.constant(weights))
    recipe = tf.nn.weighted_moments(tf.constant(batch), axes, tf.constant(weights))
    (mean, variance, _), theirs = session.run([ours, recipe])

    weights, batch = weights.astype(np.float64), batch.astype(np.float64)
    shares = np.broadcast_to(weights, batch.shape) / (weights.sum() * 32)
    exact = (shares * batch).sum(axes)
    exact_variance = (shares * (batch - exact) ** 2).sum(axes)
    assert np.abs(mean - exact).max() <= 2 * np.spacing(np.float32(300))
    assert np.abs(mean - exact).max() <= np.abs(theirs[0] - exact).max()
    np.testing.assert_allclose(variance, exact_variance, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0, 300])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("batch", [64, None], ids=["known_batch", "unknown_batch"])
def test_a_composed_variance_is_as_close_as_the_recipes(
    batch, channels, weighted, ratio, session
):
    """Sums of 65,536 squares: made in one go, they are ten times further off."""
    generator = np.random.RandomState(0)
    shape = (64, 32, 32, channels)
    values = (ratio + generator.normal(size=shape)).astype(np.float32)
    weights = generator.randint(0, 3, (64, 1, 1, 1)).astype(np.float32)
    x = tf.placeholder(tf.float32, [batch, *shape[1:]])
    axes = (0, 1, 2)
    if weighted:
        ours = statistics.weighted_moments(x, seen(x), tf.constant(weights)).variance
        recipe = tf.nn.weighted_moments(x, axes, tf.constant(weights))[1]
    else:
        ours = statistics.batch_moments(x, seen(x)).variance
        recipe = tf.nn.moments(x, axes)[1]
    variance, theirs = session.run([ours, recipe], {x: values})

    values, weights = values.astype(np.float64), weights.astype(np.float64)
    shares = weights / weights.mean() if weighted else np.ones_like(weights)
    mean = (shares * values).mean(axes)
    exact = (shares * (values - mean) ** 2).mean(axes)
    error, their_error = (
        np.sqrt(np.mean((found / exact - 1) ** 2)) for found in (variance, theirs)
    )
    assert error <= their_error
    # With it comes the square of the rounding error of the first sum of the mean.
    assert error <= (6e-7 if ratio else 3e-7)


# ------------------------------------------------------------ gradients of gradients


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize(
    "kernel, shape, axis, dtype",
    [
        ("composed", (4, 3), -1, "float64"),
        ("composed", (2, 3, 2), 1, "float64"),
        ("composed", (2, 2, 2, 3), -1, "float64"),
        ("composed", (3, 2, 2), 0, "float64"),
        ("composed", (2, 2, 2, 3), -1, "float32"),
        ("fused", (2, 2, 2, 3), -1, "float32"),
        ("fused", (4, 3), -1, "float32"),
    ],
)
def test_the_gradient_of_a_gradient_penalty(kernel, shape, axis, dtype, session):
    """As WGAN-GP takes it: the gradient for x of |d sum(w * y^2) / dx|^2."""
    case = reference.Case(shape, axis)
    batch = reference.make_batch(case, "float32")
    weights = reference.make_output_gradient(case)
    gamma, beta = reference.make_parameters(3)

    def penalty(x):
        y = reference.training_output(x, gamma, beta, axis, EPSILON)
        slopes = reference.training_gradients(x, 2 * weights * y, gamma, axis, EPSILON)
        return (slopes.x**2).sum()

    expected = reference.central_differences(penalty, batch)
    x, gamma_, beta_ = (tf.constant(a, dtype) for a in (batch, gamma, beta))
    y = normalize_by(kernel, x, gamma_, beta_, axis).y
    slope = tf.gradients(tf.constant(weights, dtype) * y**2, x)[0]
    actual = session.run(tf.gradients(tf.reduce_sum(slope**2), x)[0])
    scale = np.abs(expected).max()
    tolerance = {"float64": 1e-6, "float32": 2e-4}[dtype]
    np.testing.assert_allclose(actual / scale, expected / scale, atol=tolerance)


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize(
    "kernel, dtype",
    [("composed", "float64"), ("composed", "float32")]
    + [("fused", "float32")] * IS_TENSORFLOW_1,
)
def test_a_loss_on_the_statistics_has_a_gradient(kernel, dtype, unbiased, session):
    """Not with the gradient of the fused kernel itself, which 1.15 does not take."""
    case = reference.CASES["rank4_nhwc"]
    batch = reference.make_batch(case, dtype)
    x = tf.placeholder(dtype, [None, *batch.shape[1:]])
    normalized = normalize_by(kernel, x, None, None, -1, unbiased)
    slopes = tf.gradients([normalized.mean, 3 * normalized.variance], x)[0]
    actual = session.run(slopes, {x: batch})
    moments = reference.moments(batch)
    divisor = moments.count - unbiased
    expected = 1 / moments.count + 6 * (batch - moments.mean) / divisor
    tolerance = 1e-9 if dtype == "float64" else 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def large_operations(x, since):
    """The types of the operations made after `since` that give a tensor of the size of `x`."""
    made = tf.get_default_graph().get_operations()[since:]
    size = x.shape.num_elements()
    return sorted(
        op.type
        for op in made
        if any(tensor.shape.num_elements() == size for tensor in op.outputs)
        and op.type not in ("Reshape", "Fill", "ZerosLike")
    )


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("kernel", ["composed"] + ["fused"] * IS_TENSORFLOW_1)
def test_a_gradient_by_hand_makes_as_few_tensors_as_it_can(kernel, graph):
    """x - mean, and six operations that write over it or only read."""
    x = tf.placeholder(
        tf.float32, [4, 6, 5, 5] if kernel == "composed" else [4, 5, 5, 6]
    )
    axis = 1 if kernel == "composed" else -1
    y = normalize_by(kernel, x, tf.ones([6]), tf.zeros([6]), axis).y
    since = len(graph.get_operations())
    tf.gradients(y, x)
    expected = ["AddV2", "BiasAdd", "BiasAdd", "Mul", "Mul"]
    if kernel == "composed":
        expected += ["Mul"]  # for the sum of products, which is no convolution there
    assert large_operations(x, since) == expected


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("kernel", ["composed", "fused"])
@pytest.mark.parametrize("known", [[None, 4, 4, 3], [None] * 3 + [3]])
def test_a_gradient_may_know_more_of_its_shape_than_x(known, kernel, session):
    """Where the loss compares the output with a constant, say."""
    x = tf.placeholder(tf.float32, known)
    batch = np.random.RandomState(0).normal(size=[8, 4, 4, 3]).astype(np.float32)
    dy = np.random.RandomState(1).normal(size=batch.shape).astype(np.float32)
    y = normalize_by(kernel, x, None, None, -1).y
    slope = session.run(tf.gradients(y, x, tf.constant(dy))[0], {x: batch})
    expected = reference.training_gradients(batch, dy, epsilon=EPSILON).x
    np.testing.assert_allclose(slope, expected, atol=1e-5)


# --------------------------------------------------------------------------- weights


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "shape, axis",
    [((16, 3), -1), ((8, 5, 3), -1), ((4, 3, 3, 3), -1), ((8, 3, 5), 1), ((3, 8), 0)],
)
def test_gradients_with_weighted_moments(shape, axis, dtype, session):
    """By hand or by a kernel, in `dtype`, against TensorFlow's own in float64.

    And the gradients of the gradients: of |d(y * dy)|^2 for all operands.
    """
    case = reference.Case(shape, axis)
    batch = reference.make_batch(case, "float32")
    dy = reference.make_output_gradient(case)
    sizes = [1 if a == axis % len(shape) else n for a, n in enumerate(shape)]
    values = [
        batch,
        *reference.make_parameters(shape[axis]),
        np.random.RandomState(1).randint(0, 3, sizes) / 2.0,
    ]
    axes = reference.reduction_axes(len(shape), axis)
    channel_axes = statistics.channel_axes(len(shape), axis)

    def output(x, gamma, beta, weights, by_itself):
        mean, variance = tf.nn.weighted_moments(x, axes, weights)
        if by_itself:
            return statistics.normalize(
                x, mean, variance, gamma, beta, axes=channel_axes, epsilon=EPSILON
            )
        moments = statistics.Moments(mean, variance, tf.reduce_sum(weights))
        return statistics.normalize_with_moments(
            x, moments, gamma, beta, seen(x, axis), epsilon=EPSILON, weights=weights
        )

    def derivatives(dtype, by_itself):
        x, gamma, beta, weights = (tf.constant(value, dtype) for value in values)
        inputs = [x, gamma, beta]
        y = output(x, gamma, beta, weights, by_itself)
        slopes = tf.gradients(y, inputs, tf.constant(dy, dtype))
        size = tf.add_n([tf.reduce_sum(slope**2) for slope in slopes])
        return [y, *slopes, *tf.gradients(size, [x, gamma])]

    actual, expected = session.run(
        [derivatives(dtype, False), derivatives("float64", True)]
    )
    tolerance = {"float64": 1e-9, "float32": 2e-4}[dtype]
    for one, other in zip(actual, expected):
        np.testing.assert_allclose(
            one, other, rtol=0, atol=tolerance * np.abs(other).max()
        )


# ------------------------------------------------------------------------- the choice


def op_types(graph):
    return {op.type for op in graph.get_operations()}


def has_fused_statistics(graph):
    """Whether the fused kernel makes statistics, and is not just given them."""
    types = ("FusedBatchNormV2", "FusedBatchNormV3")
    kernels = [op for op in graph.get_operations() if op.type in types]
    return any(kernel.get_attr("is_training") for kernel in kernels)


LARGE_SHAPES = [(1024, 128), (64, 16, 128), (8, 16, 16, 64), (2, 8, 16, 16, 64)]


@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_auto_takes_the_fused_kernel_where_it_is_the_fastest(shape, graph):
    y = bn_tf1.batch_norm(tf.zeros(shape), True)
    assert has_fused_statistics(graph)
    tf.gradients(y, tf.trainable_variables())
    assert ("FusedBatchNormGradV3" in op_types(graph)) != IS_TENSORFLOW_1


@pytest.mark.skipif(IS_TENSORFLOW_1, reason="its kernels start faster")
@pytest.mark.parametrize("shape", [(None, 100), (256, 256), (16, 4, 4, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_kernel_of_2_is_worth_its_start_for_a_small_tensor(shape, dtype, graph):
    x = tf.placeholder(dtype, shape)
    for is_training in (True, False):
        y = bn_tf1.batch_norm(x, is_training)
        tf.gradients(y, [x, *tf.trainable_variables()])
    kernels = {"FusedBatchNormV3", "FusedBatchNormGradV3", "DepthwiseConv2dNative"}
    assert not kernels & op_types(graph)


@pytest.mark.skipif(not IS_TENSORFLOW_1, reason="TensorFlow 2 is slow elsewhere")
@pytest.mark.parametrize(
    "dtype, channels", [("float16", 16), ("float64", 16), ("float32", 3)]
)
def test_auto_on_1_15_is_composed_where_the_kernel_is_slow(dtype, channels, graph):
    bn_tf1.batch_norm(tf.zeros([2, 4, 4, channels], dtype), True)
    assert not has_fused_statistics(graph)


@pytest.mark.skipif(not IS_TENSORFLOW_1, reason="its kernel is slow")
@pytest.mark.parametrize(
    "shape, is_fused",
    [
        ((64, 32, 32, 64), False),
        ((None, 32, 32, 64), False),
        ((8192, 512), False),
        ((64, 32, 32, 32), True),
        ((None, None, None, 64), True),
    ],
)
def test_auto_on_1_15_is_composed_for_what_is_large(shape, is_fused, graph):
    bn_tf1.batch_norm(tf.placeholder(tf.float32, shape), True)
    assert has_fused_statistics(graph) == is_fused


@pytest.mark.skipif(IS_TENSORFLOW_1, reason="1.15 is slow elsewhere")
@pytest.mark.parametrize(
    "dtype, channels, is_fused",
    [
        ("float32", 3, False),
        ("float32", 12, True),
        ("float32", 50, False),
        ("float16", 50, False),
        ("bfloat16", 12, False),
        ("bfloat16", 24, False),
        ("bfloat16", 32, True),
    ],
)
def test_auto_on_2_is_composed_for_numbers_of_channels_that_are_slow(
    dtype, channels, is_fused, graph
):
    bn_tf1.batch_norm(tf.zeros([128, 16, 16, channels], dtype), True)
    assert has_fused_statistics(graph) == is_fused


@pytest.mark.parametrize(
    "shape", [(None, 1023), (None, 15, 15, 50), (None, None, None, 3)]
)
def test_auto_is_fused_where_neighbours_cannot_be_seen_as_one(shape, graph):
    bn_tf1.batch_norm(tf.placeholder(tf.float32, shape), True)
    assert has_fused_statistics(graph)


def test_auto_on_a_cpu_is_composed_for_channels_that_are_not_last(graph):
    bn_tf1.batch_norm(tf.zeros([2, 3, 4, 4]), True, axis=1)
    assert not {"FusedBatchNormV2", "FusedBatchNormV3"} & op_types(graph)


@pytest.mark.parametrize("axis", [-1, 1], ids=["nhwc", "nchw"])
def test_auto_on_a_gpu_is_fused(axis, graph):
    with tf.device("/gpu:0"):
        x = tf.zeros([2, 3, 4, 3])
    bn_tf1.batch_norm(x, True, axis=axis)
    assert has_fused_statistics(graph)


@pytest.mark.parametrize(
    "x, options, reason",
    [
        ((tf.float64, [4, 3]), {}, "float64"),
        ((tf.float32, [None, 3, None]), {"axis": 1}, "shape"),
    ],
    ids=["float64", "unknown_sizes"],
)
def test_a_fused_kernel_that_cannot_be(x, options, reason):
    with pytest.raises(ValueError) as caught:
        bn_tf1.batch_norm(tf.placeholder(*x), True, kernel="fused", **options)
    for part in ["`kernel`", "'fused'", reason, "'auto'"]:
        assert part in str(caught.value)


@pytest.mark.skipif(not IS_TENSORFLOW_1, reason="TensorFlow 2 has these kernels")
@pytest.mark.parametrize(
    "dtype, axis, reason", [("bfloat16", -1, "bfloat16"), ("float32", 1, "not last")]
)
def test_a_fused_kernel_that_1_15_lacks(dtype, axis, reason):
    x = tf.placeholder(dtype, [2, 3, 4, 5])
    with pytest.raises(ValueError, match=reason):
        bn_tf1.batch_norm(x, True, axis=axis, kernel="fused")


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match="`kernel` is 'fast', but must be one of"):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, kernel="fast")


@pytest.mark.usefixtures("small_and_large")
@pytest.mark.parametrize(
    "kernel, sizes",
    [
        ("auto", "known_sizes"),
        ("composed", "known_sizes"),
        ("composed", "unknown_sizes"),
        ("fused", "unknown_sizes"),
    ],
)
@pytest.mark.parametrize("switch", ["python_bool", "tensor"])
def test_an_empty_batch_leaves_the_statistics(kernel, switch, sizes, start, graph):
    x = tf.placeholder(tf.float32, [0 if sizes == "known_sizes" else None, 4, 3])
    is_training = True if switch == "python_bool" else tf.constant(True)
    y = bn_tf1.batch_norm(x, is_training, kernel=kernel)
    slope, *learned = tf.gradients(y, [x, *tf.trainable_variables()])
    session = start()
    before = session.run(tf.global_variables())
    updates = graph.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    output, slope, learned, _ = session.run(
        [y, slope, learned, updates], {x: np.zeros([0, 4, 3])}
    )
    np.testing.assert_array_equal(learned, np.zeros([2, 3]))
    assert output.shape == slope.shape == (0, 4, 3)
    for one, other in zip(before, session.run(tf.global_variables())):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "batch, sizes, on_1_15, on_2",
    [
        (4, (4, 8, 3), 16, 16),
        (None, (4, 8, 3), 16, 16),
        (4, (7, 7, 16), 4, 4),
        (None, (7, 7, 16), 1, 1),
        (None, (48, 3), 16, 16),
        (4, (1552, 3), 16, 16),
        (4, (8, 300), 1, 4),
        (None, (3, 20), 3, 1),
        (4, (2, 4, 6, 5), 12, 16),
    ],
)
def test_neighbours_seen_as_one_keep_every_value(
    batch, sizes, on_1_15, on_2, session, monkeypatch
):
    monkeypatch.setattr(planning, "_SMALL", 0)
    shape = [4, *sizes]
    values, others = (
        np.random.RandomState(seed).normal(size=shape).astype(np.float32)
        for seed in (0, 1)
    )
    factor = np.random.RandomState(2).normal(size=sizes[-1:]).astype(np.float32)
    x, y = (
        tf.placeholder_with_default(array, [batch, *sizes])
        for array in (values, others)
    )
    channels = seen(x)
    assert channels.places == (on_1_15 if IS_TENSORFLOW_1 else on_2)
    inside, by_channel = channels.enter(x), tf.constant(factor)
    products = channels.dot(inside, channels.enter(y)), channels.sum(inside)
    spread = [
        channels.leave(operation(inside, by_channel), x)
        for operation in (channels.scale, channels.scale_last_read, channels.add)
    ]
    (dot, total), (scaled, scaled_last, added) = session.run([products, spread])
    axes = tuple(range(len(sizes)))
    np.testing.assert_allclose(dot, (values * others).sum(axes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total, values.sum(axes), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(scaled, values * factor)
    np.testing.assert_array_equal(scaled_last, values * factor)
    np.testing.assert_array_equal(added, values + factor)


@pytest.mark.skipif(IS_TENSORFLOW_1, reason="its kernel takes every view as fast")
@pytest.mark.parametrize(
    "shape, view",
    [
        ((2, 4, 4, 64), [2, 4, 4, 64]),
        ((2, 4, 4, 40), [32, 1, 1, 40]),
        ((None, 4, 4, 40), [None, 1, 1, 40]),
        ((2, 4, 4, 12), [2, 16, 1, 12]),
        ((None, None, None, 12), [None, None, None, 12]),
        ((64, 16, 16, 256), [16384, 1, 1, 256]),
        ((None, 16, 16, 256), [None, 16, 16, 256]),
        ((63, 16, 16, 256), [63, 16, 16, 256]),
        ((128, 16, 16, 128), [128, 16, 16, 128]),
        ((64, 256, 256), [16384, 1, 1, 256]),
    ],
)
def test_the_view_that_the_kernel_makes_the_statistics_of(shape, view, graph):
    x = tf.placeholder(tf.float32, shape)
    plan = statistics.plan_of(x, (len(shape) - 1,), epsilon=EPSILON, kernel="fused")
    statistics.normalize_fused(x, None, None, plan, epsilon=EPSILON, unbiased=True)
    (kernel,) = (op for op in graph.get_operations() if "FusedBatchNorm" in op.type)
    assert kernel.inputs[0].shape.as_list() == view


@pytest.mark.usefixtures("small_and_large")
def test_layouts_are_reshapes_that_keep_every_value(session):
    for shape, axis in itertools.product(
        [[6, 3], [4, 5, 3], [2, 3, 4, 3], [2, 3, 2, 2, 3], [3, 3]], [-1, 0, 1]
    ):
        x = tf.random.stateless_uniform(shape, [1, 2])
        channels = seen(x, axis)
        there_and_back = channels.leave(channels.enter(x), x)
        axes = reference.reduction_axes(len(shape), axis)
        values, kept, total = session.run(
            [x, there_and_back, channels.sum(channels.enter(x))]
        )
        np.testing.assert_array_equal(values, kept)
        np.testing.assert_allclose(total, values.sum(axis=axes), rtol=1e-5)
