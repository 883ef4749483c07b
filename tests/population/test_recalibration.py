"""Recalibration in a session, against the population in float64 NumPy."""

import itertools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1 import LayerTensors, recalibrate
from tests.graphs import graph_zoo
from tests.reference import normalize

_GROWING = [2, 2, 4, 8, 16, 32, 64]
_EPSILON = 1e-3


def _batches(sizes, shape, seed=0):
    random = np.random.RandomState(seed)
    return [random.normal(1.5, 1.0, [n, *shape]).astype(np.float32) for n in sizes]


def _population(batches):
    everything = np.float64(np.concatenate(batches))
    axes = tuple(range(everything.ndim - 1))
    return everything.mean(axes), everything.var(axes)


def _close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


class _Chain:
    """Two layers: x -> one -> 2 y + 1 -> relu -> two; the second updates in place."""

    def __init__(self, session, shape=(4,)):
        self.x = tf.placeholder(tf.float32, [None, *shape])
        self.is_training = tf.placeholder(tf.bool, [])
        self.y = bn_tf1.batch_norm(self.x, self.is_training, name="one")
        self.y = tf.nn.relu(2 * self.y + 1)
        self.y = bn_tf1.batch_norm(
            self.y, self.is_training, name="two", update="in_place", zero_debias=True
        )
        # A third one behind it makes the updates of the second run.
        self.y = bn_tf1.batch_norm(self.y, self.is_training, name="three")
        session.run(tf.global_variables_initializer())

    def feeds(self, batches, is_training=True):
        return [{self.x: batch, self.is_training: is_training} for batch in batches]


def _values(session):
    variables = session.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
    return {v.op.name: session.run(v) for v in variables}


def _changed(before, after):
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


_STATISTICS = {
    f"{layer}/moving_{statistic}"
    for layer in ("one", "two", "three")
    for statistic in ("mean", "variance")
}


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ([3], _GROWING),
        ([5, 3], _GROWING),
        ([2, 4, 3], _GROWING),
        ([2, 4, 3], [16] * 4),
        ([2, 2, 3, 3], _GROWING),
    ],
    ids=["rank_2", "rank_3", "rank_4", "rank_4_equal_batches", "rank_5"],
)
def test_a_layer_gets_the_statistics_of_the_population(session, shape, sizes):
    network = _Chain(session, shape)
    before = _values(session)
    batches = _batches(sizes, shape)
    report = recalibrate(session, network.feeds(batches), num_batches=len(sizes))
    mean, variance = _population(batches)
    after = _values(session)
    _close(after["one/moving_mean"], mean)
    _close(after["one/moving_variance"], variance)
    assert _changed(before, after) == _STATISTICS
    first = report.layers[0]
    assert first.name == "one" and first.count == np.concatenate(batches).size / 3
    np.testing.assert_array_equal(first.before.mean, np.zeros(3))
    np.testing.assert_array_equal(
        np.float32(first.after.mean), after["one/moving_mean"]
    )
    assert first.distance == pytest.approx(
        np.max(np.abs(mean) / np.sqrt(variance + _EPSILON)), rel=1e-4
    )


def _interrupted(feeds, name):
    yield from itertools.islice(feeds, 2)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "spoil, options, error, message",
    [
        (None, {"num_batches": 4}, ValueError, "`num_batches` is 4, but .* has 3"),
        (np.nan, {}, ValueError, "batch 2 has statistics of the layer 'one' that"),
        (None, {"watch": _interrupted}, KeyboardInterrupt, None),
    ],
    ids=["too_few", "not_finite", "interrupted"],
)
def test_after_an_error_all_is_as_it_was(session, spoil, options, error, message):
    network = _Chain(session)
    batches = _batches([8, 8, 8], [4])
    if spoil is not None:
        batches[2][3, 1] = spoil
    before = _values(session)
    with pytest.raises(error, match=message):
        recalibrate(session, iter(network.feeds(batches)), **options)
    assert not _changed(before, _values(session))


def test_batches_that_do_not_train_are_an_error(session):
    network = _Chain(session)
    feeds = network.feeds(_batches([8], [4]), is_training=False)
    with pytest.raises(
        ValueError, match="batch 0 runs the layer 'one' with its moving"
    ):
        recalibrate(session, feeds)
    with pytest.raises(ValueError, match="`batches` is empty"):
        recalibrate(session, [])
    with pytest.raises(ValueError, match="`exact` is True, but `inference` is None"):
        recalibrate(session, feeds, exact=True)
    with pytest.raises(ValueError, match="`num_batches` is 0"):
        recalibrate(session, feeds, num_batches=0)


def test_the_mismatch_of_one_pass_and_exact(session):
    """In NumPy, the second layer sees the first's output by batch and by population."""
    network = _Chain(session)
    batches = _batches([4, 4, 4], [4], seed=3)
    mean, variance = _population(batches)

    def behind(statistics_of):
        return [
            np.maximum(2 * normalize(b, *statistics_of(b), epsilon=_EPSILON) + 1, 0)
            for b in map(np.float64, batches)
        ]

    by_batch = behind(lambda b: (b.mean(0), b.var(0)))
    by_population = behind(lambda b: (mean, variance))
    options = {"inference": {network.is_training: False}}
    report = recalibrate(session, network.feeds(batches), **options)
    second = report.layers[1]
    expected = _population(by_batch)
    _close(second.after.mean, expected[0], 1e-5)
    difference = np.abs(_population(by_population)[0] - expected[0])
    assert second.mismatch == pytest.approx(
        np.max(difference / np.sqrt(expected[1] + _EPSILON)), rel=1e-3
    )
    assert second.mismatch > 0.01
    assert report.layers[0].mismatch < 1e-5
    exact = recalibrate(session, iter(network.feeds(batches)), exact=True, **options)
    _close(exact.layers[1].after.mean, _population(by_population)[0], 1e-5)
    _close(exact.layers[1].after.variance, _population(by_population)[1], 1e-5)
    assert max(layer.mismatch for layer in exact.layers) < 1e-5
    assert str(report).splitlines()[2].startswith("two ")


@pytest.mark.parametrize("finalized", [False, True])
def test_weights_ghost_batches_and_several_calls(session, finalized):
    batches = _batches([8, 4], [3, 2])
    masks = [np.float32(np.arange(len(b)) % 3 != 0) for b in batches]
    x = tf.placeholder(tf.float32, [None, 3, 2])
    mask = tf.placeholder(tf.float32, [None])
    bn_tf1.batch_norm(x, True, weights=mask, name="masked")
    bn_tf1.batch_norm(x, True, ghost_batch_size=2, name="ghost")
    bn_tf1.batch_norm(x, True, ema_variance="unbiased", name="unbiased")
    bn_tf1.batch_norm(x, True, name="shared")
    bn_tf1.batch_norm(3 * x, True, name="shared", reuse=True)
    bn_tf1.batch_norm([x, 5 * x], True, name="towers")
    session.run(tf.global_variables_initializer())
    if finalized:
        session.graph.finalize()
    feeds = [{x: b, mask: m} for b, m in zip(batches, masks)]
    report = recalibrate(session, feeds)
    populations = {
        "masked": [b[m > 0] for b, m in zip(batches, masks)],
        "ghost": batches,
        "unbiased": batches,
        "shared": batches + [3 * b for b in batches],
        "towers": batches + [5 * b for b in batches],
    }
    assert {layer.name for layer in report.layers} == set(populations)
    for layer in report.layers:
        for actual, expected in zip(layer.after, _population(populations[layer.name])):
            _close(actual, expected, 2e-6)


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("maker", [n for n in graph_zoo.MAKERS if "ours" not in n])
def test_a_layer_of_another_maker_is_found(session, maker, finalized):
    x = tf.placeholder(tf.float32, [None, 3, 3, 4])
    is_training = tf.placeholder(tf.bool, [])
    graph_zoo.MAKERS[maker](x, is_training)
    session.run(tf.global_variables_initializer())
    if finalized:
        session.graph.finalize()
    before = _values(session)
    batches = _batches([4, 8, 12], [3, 3, 4])
    feeds = [{x: batch, is_training: True} for batch in batches]
    (layer,) = recalibrate(session, feeds).layers
    for actual, expected in zip(layer.after, _population(batches)):
        _close(actual, expected, 2e-6)
    after = _values(session)
    names = _changed(before, after)
    assert names == {name for names in layer.variables for name in names}
    for name, value in zip((names[0] for names in layer.variables), layer.after):
        np.testing.assert_array_equal(after[name].ravel(), np.float32(value))


def test_layer_tensors_and_an_input_pipeline(session):
    batches = _batches([4, 4, 4], [2])
    data = tf.data.Dataset.from_tensor_slices(np.stack(batches))
    x = tf.data.make_one_shot_iterator(data).get_next()
    mean = tf.get_variable("pop_mean", [2])
    variance = tf.get_variable("pop_var", [2])
    layer = LayerTensors("hand-written", mean, variance, *tf.nn.moments(x, [0]))
    session.run(tf.global_variables_initializer())
    recalibrate(session, itertools.repeat({}), layers=[layer])
    for actual, expected in zip(session.run([mean, variance]), _population(batches)):
        _close(actual, expected)


_AVERAGED = {} if graph_zoo.IS_1 else {"exponential_avg_factor": 0.5}


@pytest.mark.parametrize("options", [{}, _AVERAGED], ids=["of_batch", "averaged"])
def test_the_outputs_of_the_fused_kernel(session, options):
    """Its second output is unbiased, or averaged; the biased one is meant."""
    x = tf.placeholder(tf.float32, [None, 2, 1, 2])
    mean, variance = tf.get_variable("m", [2]), tf.get_variable("v", [2])
    if options:
        options = {**options, "mean": tf.ones([2]), "variance": tf.ones([2])}
    _, *statistics = tf.nn.fused_batch_norm(
        x, tf.ones([2]), tf.zeros([2]), is_training=True, **options
    )
    session.run(tf.global_variables_initializer())
    batches = _batches([1, 4, 2], [2, 1, 2])
    layer = LayerTensors("fused", mean, variance, *statistics)
    recalibrate(session, [{x: batch} for batch in batches], layers=[layer])
    for actual, expected in zip(session.run([mean, variance]), _population(batches)):
        _close(actual, expected, 2e-6)


def test_what_no_batch_reaches_is_named(session):
    fed, other = (tf.placeholder(tf.float32, [None, 2], name) for name in "ab")
    for name, x in (("fed", fed), ("other", other)):
        bn_tf1.batch_norm(x, True, name=name)
    session.run(tf.global_variables_initializer())
    batches = [{fed: np.float32([[1, 2], [3, 4]])}]
    report = recalibrate(session, batches)
    assert [layer.name for layer in report.layers] == ["fed"]
    assert report.skipped == {"other": "no batch feeds b"}
    assert str(report).endswith("not measured: other: no batch feeds b")
    with pytest.raises(ValueError, match="layer 'other': no batch feeds b"):
        recalibrate(session, batches, layers=bn_tf1.batch_norm_calls())


@pytest.mark.parametrize("use_resource", [False, True])
def test_a_variable_without_a_value_is_named(session, use_resource):
    with tf.variable_scope("net", use_resource=use_resource):
        x = tf.placeholder(tf.float32, [None, 2])
        kernel = tf.get_variable("kernel", [2, 2])
        bn_tf1.batch_norm(tf.matmul(x, kernel), True, name="bn")
    feeds = [{x: np.float32([[1, 2], [3, 4]])}]
    with pytest.raises(ValueError, match="variable 'net/bn/moving_.* has no value yet"):
        recalibrate(session, feeds)
    statistics = [v for v in tf.global_variables() if "moving" in v.op.name]
    session.run(tf.variables_initializer(statistics))
    with pytest.raises(
        ValueError, match="variable 'net/(kernel|bn/(gamma|beta))' has no"
    ):
        recalibrate(session, feeds)


def test_a_layer_of_several_workers_is_refused_by_name(session):
    class TwoWorkers:
        size = 2

        def joint_moments(self, moments):
            return moments

    x = tf.placeholder(tf.float32, [None, 2])
    bn_tf1.batch_norm(x, True, sync=TwoWorkers(), name="joint")
    session.run(tf.global_variables_initializer())
    with pytest.raises(
        ValueError, match="layer 'joint': `sync` gives it the statistics"
    ):
        recalibrate(session, [{x: np.float32([[1, 2], [3, 4]])}])


class _Banked:
    """x -> one, with a bank that each run chooses -> two, called for each bank."""

    def __init__(self, session, update):
        self.x, self.other = (tf.placeholder(tf.float32, [None, 3]) for _ in range(2))
        self.bank = tf.placeholder(tf.int32, [])
        self.is_training = tf.placeholder(tf.bool, [])
        options = {"banks": 2, "update": update}
        bn_tf1.batch_norm(
            self.x, self.is_training, bank=self.bank, name="one", **options
        )
        for i, x in enumerate([self.x, self.other]):
            reuse = tf.AUTO_REUSE
            bn_tf1.batch_norm(
                2 * x, self.is_training, bank=i, name="two", reuse=reuse, **options
            )
        session.run(tf.global_variables_initializer())

    def feeds(self, batches, banks):
        return [
            {self.x: b, self.other: 3 * b, self.bank: i, self.is_training: True}
            for b, i in zip(batches, banks)
        ]


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("update", ["collection", "in_place"])
def test_each_bank_gets_the_statistics_of_its_batches(session, update, finalized):
    network = _Banked(session, update)
    if finalized:
        session.graph.finalize()
    batches, banks = _batches([8, 4, 16, 2], [3]), [1, 0, 1, 0]
    report = recalibrate(
        session,
        network.feeds(batches, banks),
        inference={network.is_training: False},
    )
    populations = {
        "one": [b for b, i in zip(batches, banks) if i == 0],
        "one/bank_1": [b for b, i in zip(batches, banks) if i == 1],
        "two": [2 * b for b in batches],
        "two/bank_1": [6 * b for b in batches],
    }
    assert [layer.name for layer in report.layers] == list(populations)
    for layer in report.layers:
        for actual, expected in zip(layer.after, _population(populations[layer.name])):
            _close(actual, expected, 2e-6)
        assert layer.mismatch < 1e-5
    before = _values(session)
    with pytest.raises(ValueError, match="layer 'one', since none chooses this bank"):
        recalibrate(session, network.feeds(batches, [1] * 4))
    assert not _changed(before, _values(session))
    chosen = [call for call in bn_tf1.batch_norm_calls() if call.bank_name != "one"]
    report = recalibrate(session, network.feeds(batches, [1] * 4), layers=chosen)
    assert [layer.name for layer in report.layers] == list(populations)[1:]


@pytest.mark.parametrize("argument", ["session", "batches"])
def test_nothing_in_place_of_an_argument(argument):
    arguments = {"session": tf.Session(), "batches": [{}], argument: None}
    with pytest.raises(TypeError, match=f"`{argument}` is None, but must be"):
        recalibrate(**arguments)
