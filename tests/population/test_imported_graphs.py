"""Recalibration of .meta files of 1.15, against the network computed in NumPy.

`fixtures/network.py` tells the network: a convolution, a layer, a matrix product, a layer.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.population.imported_graphs import FedExamples, recalibrate_graph
from bn_tf1.population.pooling import PooledStatistics
from tests import FIXTURES
from tests.checkpoints import checkpoint_forge as forge

# The epsilon of the first layer, as each library has it by default.
_ORIGINS = {
    "tf_layers": 1e-3,
    "contrib": 1e-3,
    "tf_slim": 1e-3,
    "sonnet": 1e-3,
    "sonnet_v2": 1e-3,
    "tensorpack": 1e-5,
    "keras": 1e-3,
}
_IMAGES = np.load(str(FIXTURES / "inputs.npz"))["images"].reshape(-1, 6, 6, 1)


def _convolved(images, kernel):
    """The 3x3 convolution without padding, float64."""
    windows = [images[:, i : i + 4, j : j + 4, 0] for i in range(3) for j in range(3)]
    return np.stack(windows, -1).astype(np.float64) @ kernel.reshape(9, 4)


def _statistics(x):
    axes = tuple(range(x.ndim - 1))
    return PooledStatistics(x.mean(axes), x.var(axes))


def _hidden(x, statistics, values, layer, epsilon):
    """What the second layer sees, behind the first with the given statistics."""
    y = (x - statistics.mean) / np.sqrt(statistics.variance + epsilon)
    scope = layer.variables[0][0].rsplit("/", 1)[0].replace("/mean", "")
    y = y * np.ravel(values.get(f"{scope}/gamma", 1.0))
    y = y + np.ravel(values[f"{scope}/beta"])
    return np.maximum(y, 0).reshape(len(x), 64) @ np.float64(values["hidden/kernel"])


def _recalibrate(origin, destination, **options):
    prefix = str(FIXTURES / origin / "model.ckpt")
    arguments = {"examples": FedExamples({"images": _IMAGES}), **options}
    return recalibrate_graph(
        prefix + ".meta", str(destination), checkpoint=prefix, **arguments
    )


def _close(actual, expected, tolerance=2e-5):
    for one, other in zip(actual, expected):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("origin", _ORIGINS)
def test_the_graph_of_every_library(tmp_path, origin):
    """All examples in one batch, whose `images:0` may be named without its `:0`."""
    report, added = _recalibrate(origin, tmp_path / "new")
    before = forge.read_all(FIXTURES / origin / "model.ckpt")
    after = forge.read_all(tmp_path / "new")
    assert added == () and report.skipped == {}
    x = _convolved(_IMAGES, before["conv/kernel"])
    first, second = report.layers
    expected = _statistics(x)
    _close(first.after, expected)
    hidden = _hidden(x, expected, before, first, _ORIGINS[origin])
    _close(second.after, _statistics(hidden), 1e-4)
    assert max(first.mismatch, second.mismatch) < 1e-4
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert set(before) == set(after)
    assert changed == {n for r in report.layers for names in r.variables for n in names}
    for layer in report.layers:
        for names, values in zip(layer.variables, layer.after):
            np.testing.assert_array_equal(after[names[0]].ravel(), np.float32(values))


def test_examples_of_another_shape(tmp_path):
    examples = FedExamples({"images": _IMAGES[:, :5]})
    message = r"'images' of shape \[\d+, 5, 6, 1\], but in .* it is \("
    with pytest.raises(ValueError, match=message):
        _recalibrate("tf_layers", tmp_path / "new", examples=examples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("origin", ["contrib", "sonnet", "tensorpack"])
def test_exact_is_behind_the_final_statistics_of_the_first_layer(tmp_path, origin):
    options = {"examples": FedExamples({"images:0": _IMAGES}, batch_size=5)}
    report, _ = _recalibrate(origin, tmp_path / "new", exact=True, **options)
    by_batch, _ = _recalibrate(origin, tmp_path / "one_pass", **options)
    values = forge.read_all(FIXTURES / origin / "model.ckpt")
    x = _convolved(_IMAGES, values["conv/kernel"])
    first, second = report.layers
    hidden = _hidden(x, _statistics(x), values, first, _ORIGINS[origin])
    _close(second.after, _statistics(hidden), 1e-4)
    assert second.mismatch < 1e-6
    assert by_batch.layers[1].mismatch > 1e-3
    # And the mismatch of one pass is what the exact mean says it is.
    one_pass = by_batch.layers[1].after
    distance = np.abs(second.after.mean - one_pass.mean) / np.sqrt(one_pass.variance)
    assert by_batch.layers[1].mismatch == pytest.approx(distance.max(), rel=0.05)


class _Graph:
    """A graph written by hand and its checkpoint: x -> dropout -> matmul -> layer."""

    def __init__(self, folder, normalize, batch=None, average=False):
        self.prefix = str(folder / "old")
        with tf.Graph().as_default() as graph, tf.Session() as session:
            x = tf.placeholder(tf.float32, [batch, 3], "x")
            keep = tf.placeholder(tf.float32, [], "keep_prob")
            is_training = tf.placeholder(tf.bool, [], "is_training")
            x = tf.cond(is_training, lambda: x * 100.0, lambda: x * keep)  # a "dropout"
            kernel = tf.get_variable("kernel", initializer=np.float32(np.eye(3) * 2))
            normalize(tf.matmul(x, kernel), is_training)
            variables = tf.global_variables()
            if average:
                averages = tf.train.ExponentialMovingAverage(0.5)
                with tf.control_dependencies([kernel.assign(kernel * 3)]):
                    update = averages.apply([kernel])
                variables = tf.global_variables()
            session.run(tf.global_variables_initializer())
            if average:
                session.run(update)
            tf.train.Saver(variables).save(session, self.prefix, write_state=False)
            graph.finalize()

    def recalibrate(self, x, settings=None, **options):
        settings = {"keep_prob": "1"} if settings is None else settings
        return recalibrate_graph(
            self.prefix + ".meta",
            self.prefix + "_new",
            checkpoint=self.prefix,
            examples=FedExamples({"x": x, **options.pop("more", {})}, settings),
            **options,
        )


def _switched(x, is_training):
    """With moving statistics under names that nobody knows."""
    mean = tf.get_variable("m", [3], trainable=False)
    variance = tf.get_variable("v", [3], trainable=False)
    batch = tf.nn.moments(x, [0])
    used = tf.cond(
        is_training,
        lambda: tuple(tf.identity(b) for b in batch),
        lambda: (tf.identity(mean), tf.identity(variance)),
    )
    return tf.nn.batch_normalization(x, *used, None, None, 1e-3)


def _always_by_the_batch(x, is_training):
    """No moving statistics, twice: a network that evaluates with the batch."""
    for scope in ("one", "two"):
        with tf.variable_scope(scope):
            beta = tf.get_variable("beta", [3], initializer=tf.ones_initializer())
            mean, variance = tf.nn.moments(x, [0], name="moments")
            x = tf.nn.batch_normalization(x, mean, variance, beta, None, 1e-3)
            x = 3.0 * x


_X = np.random.RandomState(0).normal(2.0, 1.0, [40, 3]).astype(np.float32)


def test_dropout_stays_off_and_inputs_are_set(tmp_path):
    graph = _Graph(tmp_path, _switched)
    report, added = graph.recalibrate(_X)
    (layer,) = report.layers
    _close(layer.after, _statistics(np.float64(_X) * 2), 1e-6)
    assert layer.variables == (("m",), ("v",)) and added == ()


def test_a_network_without_moving_statistics_gets_them(tmp_path):
    graph = _Graph(tmp_path, _always_by_the_batch)
    settings = {"keep_prob": "1", "is_training": "0"}
    report, added = graph.recalibrate(_X, settings)
    assert added == (
        *("one/moving_mean", "one/moving_variance"),
        *("two/moving_mean", "two/moving_variance"),
    )
    values = forge.read_all(graph.prefix + "_new")
    x = np.float64(_X) * 2
    _close([values["one/moving_mean"]], [x.mean(0)], 1e-6)
    _close([values["one/moving_variance"]], [x.var(0)], 1e-6)
    _close([values["two/moving_mean"]], [np.full(3, 3.0)], 1e-5)
    assert report.layers[0].before is None and report.layers[0].distance is None
    assert report.layers[1].mismatch < 1e-5


def test_averages_become_the_weights(tmp_path):
    """The shadow began with the kernel, 2, and took the mean of that and 6."""
    graph = _Graph(tmp_path, _switched, average=True)
    report, _ = graph.recalibrate(_X, ema=True)
    values = forge.read_all(graph.prefix + "_new")
    np.testing.assert_array_equal(values["kernel"], np.eye(3) * 4)
    np.testing.assert_array_equal(
        values["kernel/ExponentialMovingAverage"], np.eye(3) * 4
    )
    _close(report.layers[0].after, _statistics(np.float64(_X) * 4), 1e-6)


def test_a_fixed_batch_is_kept(tmp_path):
    graph = _Graph(tmp_path, _switched, batch=8)
    with pytest.raises(ValueError, match="takes 8 examples at once"):
        graph.recalibrate(_X[:5])
    with pytest.raises(ValueError, match="39 is no multiple of 8: give 32"):
        graph.recalibrate(_X[:39])
    report, _ = graph.recalibrate(_X)
    assert report.layers[0].count == 40


@pytest.mark.parametrize(
    "x, settings, more, message",
    [
        (_X, {"keep": "1"}, {}, "'keep' is no tensor of .* x, keep_prob, is_training"),
        (_X, {}, {}, "no batch feeds keep_prob"),
        (
            _X,
            {"keep_prob": "much"},
            {},
            "keep_prob is set to 'much', but is a float",
        ),
        (_X, {"keep_prob": "1", "is_training": "maybe"}, {}, "'maybe', but is a bool"),
        (_X[:0], None, {}, "the examples are none"),
        (_X, None, {"is_training": np.ones(3, bool)}, "first axes of"),
        (_X * np.nan, None, {}, "batch 0 has statistics of the layer .* not finite"),
    ],
)
def test_wrong_inputs_are_named_and_nothing_is_written(
    tmp_path, x, settings, more, message
):
    graph = _Graph(tmp_path, _switched)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        graph.recalibrate(x, settings, more=more)
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("kernel", ["fused", "composed"])
def test_a_graph_of_ours_and_its_session_agree(tmp_path, start, control_flow, kernel):
    """In one pass and exactly, behind a layer that sees pixels as channels."""
    x = tf.placeholder(tf.float32, [None, 4, 4, 2], "x")
    is_training = tf.placeholder(tf.bool, [])
    y = bn_tf1.batch_norm(2 * x + 1, is_training, kernel=kernel, name="a")
    y = tf.reshape(tf.nn.relu(y), [-1, 32])
    bn_tf1.batch_norm(y, is_training, kernel=kernel, name="b", update="in_place")
    session, prefix = start(), str(tmp_path / "old")
    tf.train.Saver().save(session, prefix, write_state=False)
    images = np.random.RandomState(0).normal(1, 2, [12, 4, 4, 2]).astype(np.float32)
    feeds = [{x: images[i : i + 4], is_training: True} for i in (0, 4, 8)]
    for exact in (False, True):
        live = bn_tf1.recalibrate(
            session, feeds, inference={is_training: False}, exact=exact
        )
        imported, _ = recalibrate_graph(
            prefix + ".meta",
            str(tmp_path / f"new_{exact}"),
            checkpoint=prefix,
            examples=FedExamples({"x": images}, batch_size=4),
            exact=exact,
        )
        for one, other in zip(imported.layers, live.layers):
            assert one.name == other.name
            _close(one.after, other.after, 2e-6)
            assert one.mismatch == pytest.approx(other.mismatch, rel=1e-3, abs=1e-6)


def _saved(session, prefix):
    session.run(tf.global_variables_initializer())
    return tf.train.Saver().save(session, prefix, write_state=False)


def test_one_bank_of_a_graph_that_chooses_it(tmp_path, session):
    x = tf.placeholder(tf.float32, [None, 3], "x")
    bank = tf.placeholder(tf.int32, [], "bank")
    is_training = tf.placeholder(tf.bool, [], "is_training")
    bn_tf1.batch_norm(2 * x, is_training, bank=bank, banks=2, name="bn")
    prefix = _saved(session, str(tmp_path / "old"))
    how = {"checkpoint": prefix}
    examples = FedExamples({"x": _X}, {"is_training": "1"})
    with pytest.raises(
        ValueError, match="one of bn/moving_mean, bn/bank_1/moving_mean"
    ):
        recalibrate_graph(prefix + ".meta", prefix + "_no", examples=examples, **how)
    # In a session on such a graph, too.
    with tf.Graph().as_default(), tf.Session() as other:
        tf.train.import_meta_graph(prefix + ".meta").restore(other, prefix)
        feeds = [{"x:0": _X, "bank:0": 1, "is_training:0": True}]
        with pytest.raises(
            ValueError, match="layer 'bn': each run chooses one of bn/mov"
        ):
            bn_tf1.recalibrate(other, feeds)
    examples = FedExamples({"x": _X}, {"bank": "1"})
    report, added = recalibrate_graph(
        prefix + ".meta", prefix + "_new", examples=examples, **how
    )
    (layer,) = report.layers
    assert layer.name == "bn/bank_1" and added == ()
    _close(layer.after, _statistics(np.float64(_X) * 2), 1e-6)
    before, after = forge.read_all(prefix), forge.read_all(prefix + "_new")
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert changed == {"bn/bank_1/moving_mean", "bn/bank_1/moving_variance"}


@pytest.mark.parametrize("maker", ["ours", "towers", "by_hand"])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 2, 3)], ids=str)
def test_a_mask_is_refused_by_name(tmp_path, session, maker, shape):
    """The graph in inference mode would not show it."""
    x = tf.placeholder(tf.float32, [None, *shape], "x")
    mask = tf.placeholder(tf.float32, [None], "mask")
    is_training = tf.placeholder(tf.bool, [], "is_training")
    if maker == "ours":
        bn_tf1.batch_norm(x, is_training, weights=mask, name="bn")
    elif maker == "towers":  # whose joint statistics are divided by sums of sizes alone
        bn_tf1.batch_norm([2 * x, x], is_training, name="bn")
    else:
        with tf.variable_scope("bn"):
            _masked(x, mask, is_training)
    bn_tf1.batch_norm(x, is_training, name="plain")
    prefix = _saved(session, str(tmp_path / "old"))
    data = np.random.RandomState(0).normal(size=[6, *shape]).astype(np.float32)
    report, _ = recalibrate_graph(
        prefix + ".meta",
        prefix + "_new",
        checkpoint=prefix,
        examples=FedExamples({"x": data, "mask": np.ones(6, np.float32)}),
    )
    measured = {layer.name for layer in report.layers}
    assert measured == ({"bn", "plain"} if maker == "towers" else {"plain"})
    assert all("a mask" in reason for reason in report.skipped.values())


def _masked(x, mask, is_training):
    weights = tf.reshape(mask, [-1] + [1] * (x.shape.ndims - 1)) * tf.ones_like(x)
    axes = list(range(x.shape.ndims - 1))
    batch = tf.nn.weighted_moments(x, axes, weights)
    moving = [
        tf.get_variable(name, [3], trainable=False)
        for name in ("moving_mean", "moving_variance")
    ]
    used = tf.cond(
        is_training, lambda: batch, lambda: tuple(tf.identity(v) for v in moving)
    )
    return tf.nn.batch_normalization(x, *used, None, None, 1e-3)
