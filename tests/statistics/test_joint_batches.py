"""Statistics of several batches together: as of one batch, forward and backward."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import statistics

EPSILON = 1e-3


def parts_and_whole(sizes, shape, axes, dtype, weighted):
    """(inputs, [outputs and gradients of the parts joined], [those of the whole])."""
    random = np.random.RandomState(0)
    x = (random.randn(sum(sizes), *shape) * 2 + 5).astype(dtype)
    dy = random.randn(*x.shape).astype(dtype)
    weights = random.rand(*[x.shape[0]] + [1] * len(shape)).astype(dtype)
    count = shape[axes[0] - 1]
    gamma, beta = map(tf.constant, random.rand(2, count).astype(dtype))
    whole = tf.constant(x)
    # Of unknown sizes, as an empty batch is seen when the graph is built.
    xs = [
        tf.placeholder_with_default(part, [None, *shape])
        for part in np.split(x, np.cumsum(sizes)[:-1])
    ]
    ws = np.split(weights, np.cumsum(sizes)[:-1])
    views = [statistics.channels_for_arithmetic(part, axes) for part in xs]
    moments = [
        statistics.part_moments(part, view, tf.constant(w) if weighted else None)
        for part, view, w in zip(xs, views, ws)
    ]
    joint = statistics.joint_of(moments)
    y = tf.concat(
        [
            statistics.normalize_part(part, joint, gamma, beta, view, epsilon=EPSILON)
            for part, view in zip(xs, views)
        ],
        0,
    )
    dxs = tf.gradients(y, [*xs, gamma, beta], [dy])
    ours = [
        y,
        joint.mean,
        joint.variance,
        tf.concat(dxs[: len(xs)], 0),
        *dxs[len(xs) :],
    ]
    view = statistics.channels_for_arithmetic(whole, axes)
    w = tf.constant(weights) if weighted else None
    one = (
        statistics.weighted_moments(whole, view, w)
        if weighted
        else statistics.batch_moments(whole, view)
    )
    expected = statistics.normalize_with_moments(
        whole, one, gamma, beta, view, epsilon=EPSILON, weights=w
    )
    slopes = tf.gradients(expected, [whole, gamma, beta], [dy])
    return ours, [expected, one.mean, one.variance, *slopes]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "sizes, shape, axes",
    [
        ([3, 5], (4, 6, 8), (3,)),
        ([4, 0, 1], (8,), (1,)),
        ([2, 3], (8, 5, 3), (1,)),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_parts_are_as_the_whole(
    sizes, shape, axes, dtype, tolerance, weighted, session
):
    ours, expected = session.run(parts_and_whole(sizes, shape, axes, dtype, weighted))
    for one, other in zip(ours, expected):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_nothing_cancels(session):
    """Batches far from 0 and from each other, in float32: by numpy in float64."""
    x = np.float32([[1000.0, 1000.1, 1000.3], [3000.0, 3000.2, 3000.4]])[
        ..., np.newaxis
    ]
    parts = []
    for part in x:
        view = statistics.channels_for_arithmetic(tf.constant(part), (1,))
        parts.append(statistics.part_moments(tf.constant(part), view))
    mean, variance, count = session.run(statistics.joint_of(parts))
    np.testing.assert_allclose(mean, [x.astype("f8").mean()], rtol=1e-7)
    np.testing.assert_allclose(variance, [x.astype("f8").var()], rtol=1e-6)
    assert count == 6
