"""The audit of a checkpoint: each planted defect is found in its layer, its twin is not.

The checkpoints are those of the original libraries (tests/fixtures), as if trained for
long; a defect is planted in the numbers of one layer.
"""

import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.checkpoints.dialects import DIALECTS, find_layers
from bn_tf1.checkpoints.reader_writer import CheckpointError
from tests.checkpoints import checkpoint_forge as forge

_DIALECT = {"contrib": "slim", "tf_slim": "slim"}


def _layers(origin, values):
    """The layers by the names of their dialect: not by what is under test."""
    shapes = {name: value.shape for name, value in values.items()}
    return find_layers(shapes, _DIALECT.get(origin, origin))


def _audit(tmp_path, values):
    return bn_tf1.audit(forge.write(tmp_path / "model.ckpt", values))


def _checks(findings, *gravities):
    gravities = gravities or ("error", "warning")
    return {(f.check, f.layer) for f in findings if f.gravity in gravities}


def _assert_told(findings):
    for finding in findings:
        assert finding.what
        assert finding.why
        assert finding.remedy
        assert finding.where


@pytest.mark.parametrize("origin", forge.ORIGINS)
def test_a_healthy_checkpoint_of_any_library(tmp_path, origin):
    findings = _audit(tmp_path, forge.converged(origin))
    assert not _checks(findings), findings


@pytest.mark.parametrize("origin", forge.ORIGINS)
def test_a_fixture_with_its_graph_has_no_error(origin):
    findings = bn_tf1.audit(str(forge.FIXTURES / origin / "model.ckpt"))
    assert not _checks(findings, "error")
    # Five steps are too few: the graph tells the decay.
    assert {check for check, _ in _checks(findings)} == {"not-converged"}


@pytest.mark.parametrize("version", ["1.15.5", "2.21.0"])
def test_a_trained_checkpoint_of_this_project(version):
    prefix = forge.FIXTURES / "trained" / f"tensorflow-{version}" / "model.ckpt"
    # They were trained with a rate at which the last layer lost most of its channels.
    findings = bn_tf1.audit(str(prefix))
    assert [finding[:4] for finding in findings] == [
        ("silent-channels", "note", "possible", "conv4/batch_norm")
    ]


def _set(role, value):
    def plant(values, layer):
        name = layer.names[role]
        values[name] = np.full_like(values[name], value)

    return plant


def _set_channel(role, value):
    def plant(values, layer):
        changed = values[layer.names[role]].copy()
        changed.reshape(-1)[1] = value
        values[layer.names[role]] = changed

    return plant


def _reset(values, layer):
    for role, value in (("moving_mean", 0), ("moving_variance", 1)):
        _set(role, value)(values, layer)


def _drop(*roles):
    def plant(values, layer):
        for role in roles:
            values.pop(layer.names[role])

    return plant


def _shorten(role):
    def plant(values, layer):
        values[layer.names[role]] = values[layer.names[role]].reshape(-1)[:3]

    return plant


_DEFECTS = {
    "never updated": (_reset, "never-updated", "error"),
    "variance never updated": (_set("moving_variance", 1), "never-updated", "error"),
    "mean never updated": (_set("moving_mean", 0), "never-updated", "error"),
    "NaN mean": (_set_channel("moving_mean", np.nan), "not-finite", "error"),
    "infinite variance": (
        _set_channel("moving_variance", np.inf),
        "not-finite",
        "error",
    ),
    "NaN beta": (_set_channel("beta", np.nan), "not-finite", "error"),
    "negative": (_set_channel("moving_variance", -0.5), "negative-variance", "error"),
    "dead": (_set_channel("moving_variance", 0), "dead-channels", "warning"),
    "below epsilon": (
        _set_channel("moving_variance", 1e-7),
        "dead-channels",
        "warning",
    ),
    "far mean": (_set_channel("moving_mean", 1e4), "mean-far-outside", "warning"),
    "variance missing": (_drop("moving_variance"), "statistics-missing", "error"),
    "mean missing": (_drop("moving_mean"), "statistics-missing", "error"),
    "both missing": (
        _drop("moving_mean", "moving_variance"),
        "statistics-missing",
        "error",
    ),
    "variance too short": (_shorten("moving_variance"), "sizes-differ", "error"),
    "beta too short": (_shorten("beta"), "sizes-differ", "error"),
}


@pytest.mark.parametrize("origin", forge.ORIGINS)
@pytest.mark.parametrize("defect", list(_DEFECTS))
def test_a_defect_is_found_in_its_layer_and_nowhere_else(tmp_path, origin, defect):
    plant, check, gravity = _DEFECTS[defect]
    values = forge.converged(origin)
    layer = _layers(origin, values)[1]
    plant(values, layer)
    findings = _audit(tmp_path, values)
    assert (check, layer.scope) in _checks(findings, gravity), findings
    assert {name for _, name in _checks(findings)} == {layer.scope}
    _assert_told(findings)


def test_the_share_of_dead_channels_is_told(tmp_path):
    values = forge.converged("tf_layers")
    layer = _layers("tf_layers", values)[0]
    _set_channel("moving_variance", 0)(values, layer)
    (finding,) = [f for f in _audit(tmp_path, values) if f.gravity == "warning"]
    assert "1 of 4 channels (25.0%)" in finding.what
    assert "1 of them exactly 0" in finding.what


@pytest.mark.parametrize(
    "step, trained, gravity, certainty",
    [
        (0, False, "note", "possible"),
        (None, False, "note", "possible"),
        (500, False, "error", "likely"),
        (0, True, "error", "certain"),
    ],
)
def test_initial_values_are_an_error_only_after_training(
    tmp_path, step, trained, gravity, certainty
):
    values = {
        "bn/gamma": np.ones(3, np.float32),
        "bn/beta": np.zeros(3, np.float32) + np.arange(3) * np.float32(trained),
        "bn/moving_mean": np.zeros(3, np.float32),
        "bn/moving_variance": np.ones(3, np.float32),
    }
    if step is not None:
        values["global_step"] = np.int64(step)
    (finding,) = _audit(tmp_path, values)
    assert finding[:4] == ("never-updated", gravity, certainty, "bn")


_NORM = {"gamma": np.float32([1, 2]), "beta": np.float32([3, 4])}
_STATISTICS = {
    "moving_mean": np.float32([1, 2]),
    "moving_variance": np.float32([3, 0.5]),
}


def _under(scope, values):
    return {f"{scope}/{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    "scope",
    [
        "encoder/LayerNorm",
        "encoder/layer_normalization_3",
        "block/InstanceNorm",
        "block/group_norm",
        "transformer/ln_1",
    ],
)
def test_other_normalisations_need_no_statistics(tmp_path, scope):
    values = {**_under(scope, _NORM), **_under("bn", {**_NORM, **_STATISTICS})}
    values["global_step"] = np.int64(9000)
    assert _audit(tmp_path, values) == []


@pytest.mark.parametrize(
    "scope",
    ["conv/BatchNorm", "batch_normalization_7", "res2a/bn2a_branch2a", "conv_bn"],
)
def test_a_saver_of_the_trainable_variables_is_recognised(tmp_path, scope):
    (finding,) = _audit(tmp_path, _under(scope, _NORM))
    assert finding[:4] == ("statistics-missing", "error", "likely", scope)


@pytest.mark.parametrize(
    "mean, variance, scope",
    [
        ("bn/pop_mean", "bn/pop_var", "bn"),
        ("bn/running_mean", "bn/running_variance", "bn"),
        ("bn/moving_mean", "bn/moving_var", "bn"),
        ("pop_mean_1", "pop_var_1", "pop_mean_1"),
        (
            "conv/bn/moments/Squeeze/ExponentialMovingAverage",
            "conv/bn/moments/Squeeze_1/ExponentialMovingAverage",
            "conv/bn",
        ),
        (
            "l2/moments_1/Squeeze/ExponentialMovingAverage",
            "l2/moments_1/Squeeze_1/ExponentialMovingAverage",
            "l2",
        ),
    ],
)
def test_hand_written_names(tmp_path, mean, variance, scope):
    values = {
        mean: np.float32([0.5, -1]),
        variance: np.float32([2, 3]),
        "global_step": np.int64(10_000),
    }
    assert _audit(tmp_path, values) == []
    values[variance] = np.float32([2, -3])
    path = forge.write(tmp_path / "sick", values)
    assert _checks(bn_tf1.audit(path)) == {("negative-variance", scope)}


def test_hand_written_averages_that_begin_at_zero(tmp_path):
    names = [
        f"bn/moments/{name}/ExponentialMovingAverage"
        for name in ("Squeeze", "Squeeze_1")
    ]
    values = {name: np.zeros(3, np.float32) for name in names}
    values["global_step"] = np.int64(10_000)
    assert _checks(_audit(tmp_path, values)) == {("never-updated", "bn")}


def test_means_and_variances_without_a_gamma_are_other_things(tmp_path):
    values = {
        "input/mean": np.float32([1e9, 2]),
        "input/variance": np.float32([-1, 2]),
        "accuracy/moving_mean": np.float32(0.0),
        "global_step": np.int64(10_000),
    }
    assert _audit(tmp_path, values) == []


def test_object_based_checkpoints(tmp_path):
    """As tf.train.Checkpoint and Keras write them."""

    def write(name, variance):
        with tf.Graph().as_default(), tf.Session() as session:
            values = {**_NORM, "moving_mean": np.float32([1, 2])}
            values["moving_variance"] = np.float32(variance)
            layer = tf.train.Checkpoint(
                **{
                    role: tf.get_variable(role, initializer=value, use_resource=True)
                    for role, value in values.items()
                }
            )
            saver = tf.train.Checkpoint(encoder=tf.train.Checkpoint(bn=layer))
            session.run(tf.global_variables_initializer())
            return saver.save(str(tmp_path / name), session=session)

    assert bn_tf1.audit(write("healthy", [3, 0.5])) == []
    findings = bn_tf1.audit(write("sick", [3, -0.5]))
    assert _checks(findings) == {("negative-variance", "encoder/bn")}


def _debiased(steps, decay=0.99, **changes):
    """A slim layer with zero_debias_moving_mean, after `steps` updates."""
    mean = np.float32([1.5, -2, 0.25])
    values = {
        "bn/beta": np.float32([1, 2, 3]),
        "bn/moving_mean": mean,
        "bn/moving_variance": np.float32([0.5, 0.6, 0.7]),
        "bn/bn/moving_mean/biased": mean * np.float32(1 - decay**steps),
        "bn/bn/moving_mean/local_step": np.float32(steps),
        "global_step": np.int64(steps),
    }
    return {**values, **changes}


@pytest.mark.parametrize("steps", [1, 20, 5000])
def test_zero_debias_counters_that_fit(tmp_path, steps):
    findings = _audit(tmp_path, _debiased(steps))
    assert not [f for f in findings if f.check == "debias-counter"]


@pytest.mark.parametrize(
    "changes",
    [
        {"bn/bn/moving_mean/biased": np.zeros(3, np.float32)},
        {"bn/bn/moving_mean/biased": np.float32([1.5, 2, 0.25])},
        {"bn/bn/moving_mean/local_step": np.float32(0)},
        {"bn/bn/moving_mean/biased": np.float32([1.5, 2])},
    ],
)
def test_zero_debias_counters_that_do_not_fit(tmp_path, changes):
    findings = _audit(tmp_path, _debiased(5000, **changes))
    assert _checks(findings) == {("debias-counter", "bn")}
    _assert_told(findings)


def test_a_wrong_counter_is_found_with_the_decay_of_a_graph(tmp_path):
    """Restored statistics, forgotten counter: tensorflow/tensorflow#6270."""
    x = tf.placeholder(tf.float32, [8, 3])
    y = bn_tf1.batch_norm(x, True, zero_debias=True, decay=0.9, name="BatchNorm")
    step = tf.train.get_or_create_global_step()
    train_op = bn_tf1.make_train_op(
        tf.reduce_mean(tf.square(y - 1)),
        tf.train.GradientDescentOptimizer(0.1),
        global_step=step,
    )
    saver = tf.train.Saver()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        random = np.random.RandomState(0)
        for _ in range(60):
            session.run(train_op, {x: random.normal(3, 1, [8, 3])})
        healthy = saver.save(session, str(tmp_path / "healthy"))
        (counter,) = [
            v
            for v in tf.global_variables()
            if v.op.name.endswith("moving_mean/local_step")
        ]
        counter.load(3.0, session)
        sick = saver.save(session, str(tmp_path / "sick"))
    assert not _checks(bn_tf1.audit(healthy), "error")
    assert ("debias-counter", "BatchNorm") in _checks(bn_tf1.audit(sick))


def _train(tmp_path, *, steps, decay, run_updates=True, start=0):
    x = tf.placeholder(tf.float32, [16, 4])
    is_training = tf.placeholder_with_default(False, [])
    y = bn_tf1.batch_norm(x, is_training, decay=decay, name="bn")
    if not run_updates:
        del tf.get_collection_ref(bn_tf1.UPDATE_OPS_COLLECTION)[:]
    global_step = tf.train.get_or_create_global_step()
    optimizer = tf.train.GradientDescentOptimizer(0.01)
    updates = tf.get_collection(bn_tf1.UPDATE_OPS_COLLECTION)
    with tf.control_dependencies(updates):
        train_op = optimizer.minimize(tf.reduce_mean(y**2 + y), global_step)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        (variance,) = [
            v for v in tf.global_variables() if v.op.name == "bn/moving_variance"
        ]
        if start:
            variance.load(np.full([4], start, np.float32), session)
        random = np.random.RandomState(0)
        for _ in range(steps):
            feed = {x: random.normal(2, 3, [16, 4]), is_training: True}
            session.run(train_op, feed)
        return tf.train.Saver().save(session, str(tmp_path / "model.ckpt"))


def test_a_run_that_was_long_enough(tmp_path):
    assert not _checks(bn_tf1.audit(_train(tmp_path, steps=60, decay=0.9)))


def test_a_run_that_was_too_short_for_its_decay(tmp_path):
    findings = bn_tf1.audit(_train(tmp_path, steps=60, decay=0.99))
    assert ("not-converged", "bn") in _checks(findings, "warning")
    (finding,) = [f for f in findings if f.check == "not-converged"]
    assert f"{0.99**60:.1%} of the moving statistics" in finding.what


@pytest.mark.parametrize("step, found", [(20, True), (800, False)])
def test_a_step_that_only_the_name_tells(tmp_path, step, found):
    values = {
        **_under("bn", _NORM),
        "bn/moving_mean": np.float32([0.2, 0.1]),
        "bn/moving_variance": np.float32([0.9, 0.95]),
    }
    findings = bn_tf1.audit(forge.write(tmp_path / f"model-{step}", values))
    assert [f.check for f in findings] == ["not-converged"] * found
    assert all("20 steps (by the name of the file)" in f.what for f in findings)


@pytest.mark.parametrize("slot", ["Adam", "Adam_1", "Momentum", "RMSProp", "shadow"])
def test_slots_of_an_optimizer_beside_moving_statistics(tmp_path, slot):
    values = {**_under("bn", _NORM), **_under("bn", _STATISTICS)}
    values[f"train/bn/moving_mean/{slot}"] = np.float32([0.1, 0.2])
    values[f"bn/gamma/{slot}"] = np.float32([0.1, 0.2])
    values["global_step"] = np.int64(9000)
    findings = _audit(tmp_path, values)
    assert [f.check for f in findings] == ["optimizer-slots"] * (slot != "shadow")
    assert all(f"train/bn/moving_mean/{slot}" in f.what for f in findings)


@pytest.mark.parametrize(
    "variance, checks",
    [
        ([-1e28, 3e27], {"negative-variance", "statistics-diverged"}),
        ([1e28, 3e27], {"statistics-diverged"}),
        ([1e10, 3e9], set()),
    ],
)
def test_statistics_that_many_updates_in_one_step_drove_away(
    tmp_path, variance, checks
):
    """A layer called 30 times a step with decay 0.9, after 200 steps: tf#14353."""
    values = {**_under("bn", _NORM), **_under("bn", _STATISTICS)}
    values["bn/moving_variance"] = np.float32(variance)
    values["global_step"] = np.int64(200)
    findings = [f for f in _audit(tmp_path, values) if f.gravity == "error"]
    assert {f.check for f in findings} == checks
    assert all("N (1 - decay)" in f.remedy for f in findings)


def test_a_run_that_began_with_other_statistics_is_not_too_short(tmp_path):
    """Fine-tuning restarts the global step; a variance below decay^steps shows it."""
    path = _train(tmp_path, steps=20, decay=0.999, start=0.01)
    assert "not-converged" not in {f.check for f in bn_tf1.audit(path)}


def test_updates_that_nobody_ran(tmp_path):
    path = _train(tmp_path, steps=5, decay=0.9, run_updates=False)
    assert ("never-updated", "bn") in _checks(bn_tf1.audit(path), "error")


@pytest.mark.skipif(sys.version_info >= (3, 8), reason="needs tf.layers of 1.15")
@pytest.mark.parametrize("forgotten", [False, True])
def test_tf_layers_with_and_without_its_updates(tmp_path, forgotten):
    x = tf.placeholder(tf.float32, [16, 5, 5, 3])
    y = tf.layers.batch_normalization(x, training=True, momentum=0.5)
    updates = [] if forgotten else tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    step = tf.train.get_or_create_global_step()
    with tf.control_dependencies(updates):
        loss = tf.reduce_mean(y**2 + y)
        train_op = tf.train.GradientDescentOptimizer(0.1).minimize(loss, step)
    saver = tf.train.Saver()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for i in range(20):
            images = np.random.RandomState(i).normal(1, 2, [16, 5, 5, 3])
            session.run(train_op, {x: images})
        path = saver.save(session, str(tmp_path / "model.ckpt"))
    errors = _checks(bn_tf1.audit(path), "error")
    expected = {("never-updated", "batch_normalization")} if forgotten else set()
    assert errors == expected


def _silent(tmp_path, beta, *, gamma=(1.0, -0.5, 2.0, 0.0), follow=None):
    """The findings on channels that a ReLU ends, after a layer was saved."""
    values = {"beta": beta, "gamma": gamma}
    values.update(moving_mean=[1, 2, 3, 4], moving_variance=[4, 3, 2, 1])
    if follow is not None:
        follow(bn_tf1.batch_norm(tf.placeholder(tf.float32, [8, 4]), True, name="bn"))
        tf.train.export_meta_graph(str(tmp_path / "model.ckpt.meta"))
    values = {f"bn/{name}": np.float32(value) for name, value in values.items()}
    values["global_step"] = np.int64(10_000)
    findings = bn_tf1.audit(forge.write(tmp_path / "model.ckpt", values))
    return [f for f in findings if f.check == "silent-channels"]


_BETA = (-3.1, -1.4, 7.0, -0.1)  # the first and the last are below -3 |gamma|


def test_channels_that_a_relu_ends_are_certain_where_the_graph_shows_it(tmp_path):
    (finding,) = _silent(tmp_path, _BETA, follow=tf.nn.relu)
    assert finding[:4] == ("silent-channels", "warning", "certain", "bn")
    assert "2 of 4 channels (50.0%)" in finding.what and "-3.1" in finding.what


def test_channels_that_a_relu_would_end_are_a_note_without_a_graph(tmp_path):
    (finding,) = _silent(tmp_path, _BETA)
    assert finding[:4] == ("silent-channels", "note", "possible", "bn")


@pytest.mark.parametrize(
    "beta, follow",
    [
        (_BETA, tf.nn.leaky_relu),
        (_BETA, lambda y: tf.nn.relu(y + tf.placeholder(tf.float32, [8, 4]))),
        (_BETA, tf.identity),
        ((-2.9, -1.4, -5.9, 0.1), tf.nn.relu),
        ((-2.9, -1.4, -5.9, 0.0), None),  # gamma 0: a residual branch at its start
    ],
)
def test_channels_that_are_alive(tmp_path, beta, follow):
    assert _silent(tmp_path, beta, follow=follow) == []


def test_a_gamma_of_zero_before_a_relu_gives_only_zero(tmp_path):
    (finding,) = _silent(tmp_path, (1.0, 1.0, 1.0, 0.0), follow=tf.nn.relu)
    assert "1 of 4 channels" in finding.what


def test_weights_of_nan_are_found_outside_of_layers(tmp_path):
    values = forge.converged("tf_layers")
    values["conv/kernel"] = values["conv/kernel"] * np.float32(np.nan)
    findings = _audit(tmp_path, values)
    assert _checks(findings) == {("weights-not-finite", "")}
    assert "conv/kernel" in findings[0].where


def test_a_damaged_tensor_does_not_hide_the_rest(tmp_path):
    values = forge.converged("tf_layers")
    layer = _layers("tf_layers", values)[1]
    _set_channel("moving_variance", -1)(values, layer)
    prefix = forge.write(tmp_path / "model.ckpt", values)
    with open(prefix + ".data-00000-of-00001", "r+b") as file:
        content = file.read()
        at = content.index(values["conv/kernel"].tobytes())
        file.seek(at)
        file.write(b"\x13\x37")
    checks = {check for check, _ in _checks(bn_tf1.audit(prefix), "error")}
    assert checks == {"damaged-tensor", "negative-variance"}


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is nothing at .*nowhere"):
        bn_tf1.audit(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="neither a checkpoint nor a SavedModel"):
        bn_tf1.audit(str(tmp_path))
    (tmp_path / "model.index").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="model.index is damaged: 7 bytes"):
        bn_tf1.audit(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is a graph and no checkpoint"):
        bn_tf1.audit(str(forge.FIXTURES / "contrib" / "model.ckpt.meta"))


def test_every_dialect_has_a_fixture():
    covered = {_DIALECT.get(origin, origin) for origin in forge.ORIGINS}
    assert covered == set(DIALECTS) - {"bn_tf1"}
