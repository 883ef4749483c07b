"""kernel="compiled" gives what the other kernels give, in every mode."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import compiled
from bn_tf1.compiled import accuracy, kernel
from tests import ROOT

pytestmark = pytest.mark.usefixtures("cache")

EPSILON = 1e-3


def test_no_output_and_no_gradient_is_farther_from_float64_than_the_recipe():
    results = list(accuracy.measure())
    assert len(results) >= 7 * 7
    assert not [str(result) for result in results if not result.is_good]


# Rows of several places, more channels than places, columns, planes, one value each; sums of
# several pieces, and what is larger than the caches.
SHAPES = [
    ((6, 5, 4, 3), 3),
    ((7, 600), 1),
    ((3, 5, 2, 7), 1),
    ((2, 3, 1100), 1),
    ((4, 9), 0),
    ((700, 1), 1),
    ((3, 2, 2, 2, 5), 4),
    ((30, 100, 7), 2),
    ((16001, 67), 1),
    ((1801, 600), 1),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_every_layout_in_float64(shape, axis, activation, session):
    random = np.random.RandomState(0)
    x, dy, residual = random.normal(size=(3, *shape)) * 2
    gamma, beta, dmean, dvariance = random.normal(size=(4, shape[axis]))
    tensors = [tf.constant(v) for v in (x, gamma, beta, residual)]
    outputs = _normalized(*tensors, axis, activation)
    plain = _plainly(*tensors, axis, activation)
    slopes = [dy, dmean, dvariance]
    found, expected = (
        session.run([*out, *tf.gradients(out, tensors, slopes)])
        for out in (outputs, plain)
    )
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def _normalized(x, gamma, beta, residual=None, axis=1, activation=None):
    plan = bn_tf1.statistics.plan_of(x, (axis,), epsilon=EPSILON, kernel="compiled")
    how = {"activation": activation, "residual": residual}
    return kernel.normalize_batch(
        x, gamma, beta, plan, epsilon=EPSILON, unbiased=True, **how
    )[:3]


def _plainly(x, gamma, beta, residual, axis, activation):
    axes = [a for a in range(x.shape.ndims) if a != axis]
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
    gamma, beta = (tf.reshape(v, mean.shape) for v in (gamma, beta))
    y = gamma * (x - mean) / tf.sqrt(variance + EPSILON) + beta + residual
    y = {None: tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[activation](y)
    count = x.shape.num_elements() // x.shape.as_list()[axis]
    unbiased = variance * count / (count - 1)
    return y, tf.reshape(mean, [-1]), tf.reshape(unbiased, [-1])


@pytest.mark.parametrize("update", ["collection", "in_place"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_switched_layer_follows_its_mode(dtype, update, start):
    is_training = tf.placeholder(tf.bool, [])
    outputs = {}
    for name in ("compiled", "composed"):
        x = tf.cast(tf.constant(_values(0, (6, 4, 3))), dtype)
        y = bn_tf1.batch_norm(
            x,
            is_training,
            update=update,
            kernel=name,
            activation="relu",
            residual=tf.cast(tf.constant(_values(1, (6, 4, 3))), dtype),
            name=name,
        )
        moving = tf.global_variables(f"{name}/moving")
        (slope,) = tf.gradients(tf.cast(y, tf.float32) * _values(2, (6, 4, 3)), x)
        wide = [tf.cast(t, tf.float32) for t in (y, slope)]
        outputs[name] = wide, tf.get_collection("update_ops", name), moving
    session = start()
    tolerance = 1e-5 if dtype == "float32" else 0.04
    for mode in (False, True):
        found = []
        for tensors, updates, moving in outputs.values():
            values = session.run([tensors, updates], {is_training: mode})[0]
            found.append([*values, *session.run(moving)])
        for ours, theirs in zip(*found):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        assert bool(np.any(found[0][2])) is mode


def test_an_inference_graph_contains_none_of_it(graph):
    x = tf.placeholder(tf.float32, [None, 8, 8, 4])
    bn_tf1.batch_norm(x, False, kernel="compiled", activation="relu")
    assert not [op for op in graph.get_operations() if "Compiled" in op.type]


def test_an_empty_batch_and_a_nan_leave_the_statistics(start):
    x = tf.placeholder(tf.float32, [None, 3])
    y = bn_tf1.batch_norm(x, True, kernel="compiled")
    slopes = tf.gradients(y, tf.trainable_variables())
    session = start()
    moving = tf.global_variables("batch_norm/moving")
    before = session.run(moving)
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    empty, found, _ = session.run([y, slopes, updates], {x: np.zeros([0, 3])})
    assert empty.shape == (0, 3)
    np.testing.assert_array_equal(found, np.zeros([2, 3]))
    session.run(updates, {x: np.full([4, 3], np.nan)})
    np.testing.assert_array_equal(session.run(moving), before)
    with pytest.raises(tf.errors.InvalidArgumentError, match="one value per channel"):
        session.run(y, {x: np.ones([1, 3])})


def test_a_mean_that_drifts_within_a_unit_costs_no_digits(session):
    drift = np.where(np.arange(8000) < 100, 1000.0, 0.0)[:, None]
    x = (drift + _values(0, (8000, 4))).astype(np.float32)
    tensors = map(tf.constant, (x, np.ones(4, "f"), np.zeros(4, "f"), np.zeros_like(x)))
    _, _, variance = session.run(_normalized(*tensors, 1, None))
    exact = x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(variance, exact, rtol=2e-7)


@pytest.mark.parametrize("channels", [64, 33])  # whose rows are 16 bytes, or are not
def test_what_the_cache_does_not_hold(channels, session):
    """Written past the caches where they are too small, which Linux tells."""
    told = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kilobytes = int(told.read_text().strip().rstrip("K")) if told.exists() else 1
    rows = kilobytes * 1024 // (2 * 4 * channels) + 1001
    random = np.random.RandomState(0)
    x, dy = random.uniform(size=(2, rows, channels)).astype(np.float32)
    fed = tf.placeholder(tf.float32, [None, channels])
    y = _normalized(fed, tf.ones([channels]), tf.zeros([channels]))[0]
    (dx,) = tf.gradients(y, fed, dy)
    found = session.run([y, dx], {fed: x})
    centred = x - x.mean(0, dtype=np.float64)
    deviation = np.sqrt(np.square(centred).mean(0) + EPSILON)
    exact = centred / deviation
    slope = (dy * exact).mean(0)
    expected = exact, (dy - dy.mean(0, dtype=np.float64) - slope * exact) / deviation
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_second_derivatives_are_an_error():
    x = tf.constant(_values(0, (4, 3)))
    y = bn_tf1.batch_norm(x, True, kernel="compiled", activation="relu")
    (slope,) = tf.gradients(y, x)
    with pytest.raises(ValueError, match="use kernel='composed'"):
        tf.gradients(slope, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": tf.ones}, "'compiled', but the compiled kernel has no weights"),
        ({"ghost_batch_size": 2}, "the compiled kernel has no weights, ghost"),
        ({"axis": [1, 3]}, "'compiled'.* it has one channel axis"),
    ],
)
def test_what_it_cannot_is_refused(options, message):
    options = {k: v([4]) if callable(v) else v for k, v in options.items()}
    x = tf.zeros([4, 2, 2, 3])
    with pytest.raises(ValueError, match=message):
        bn_tf1.batch_norm(x, True, kernel="compiled", **options)


THREADS = """
import hashlib
import numpy as np
import sys
import tensorflow.compat.v1 as tf
import bn_tf1
tf.disable_v2_behavior()
options = tf.ConfigProto(intra_op_parallelism_threads=int(sys.argv[1]))
tensors = []
for shape, axis in (([64, 16, 16, 33], 3), ([40, 24, 30, 31], 1), ([2, 5, 70000], 1)):
    values = np.random.RandomState(0).normal(size=[3, *shape]).astype("f")
    x, dy, residual = map(tf.constant, values)
    y = bn_tf1.batch_norm(
        x, True, axis=axis, kernel="compiled", activation="relu", residual=residual
    )
    variables = tf.trainable_variables()[-2:]
    tensors += [y, *tf.gradients(y, [x, residual, *variables], dy)]
with tf.Session(config=options) as session:
    session.run(tf.global_variables_initializer())
    for value in session.run(tensors):
        print(hashlib.sha256(value.tobytes()).hexdigest())
"""


def test_the_bits_do_not_depend_on_the_number_of_threads():
    found = [
        subprocess.run(
            [sys.executable, "-c", THREADS, threads],
            cwd=str(ROOT),
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        for threads in "124"
    ]
    assert found[0].count(b"\n") == 15
    assert found[0] == found[1] == found[2]


def _values(seed, shape):
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def _forward(operations, x, vector, count):
    return operations.bn_tf1_compiled_batch_norm(
        x=x, gamma=vector, beta=vector, residual=[x] * count, axis=1, epsilon=1e-3
    )


def _backward(operations, x, vector, outputs, moments):
    kept = tf.zeros([2, 3], tf.float64)
    return operations.bn_tf1_compiled_batch_norm_grad(
        dy=x,
        x=x,
        gamma=vector,
        beta=vector,
        kept=kept,
        y=[x] * outputs,
        dmoments=[vector] * moments,
        axis=1,
        epsilon=1e-3,
    )


@pytest.mark.parametrize(
    ("build", "counts"),
    [(_forward, (2,)), (_backward, (2, 0)), (_backward, (0, 1)), (_backward, (1, 3))],
)
def test_what_we_never_build_ends_in_an_error(build, counts, session):
    """The graph of somebody else must not end the process that reads it."""
    made = build(compiled.load(), tf.ones([4, 3]), tf.ones([3]), *counts)
    with pytest.raises(tf.errors.InvalidArgumentError):
        session.run(made[0])
