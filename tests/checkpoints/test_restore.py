"""`restore`: what it restores, what it reports, what it refuses."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.checkpoints.conversion import convert
from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.restore import WrongShape, restore
from tests import FIXTURES
from tests.checkpoints import checkpoint_forge as forge
from tests.fixtures.network import network

# dialect, scopes of the two layers, their epsilons.
ORIGINS = {
    "tf_layers": (
        "tf_layers",
        ["batch_normalization", "batch_normalization_1"],
        [1e-3, 1e-5],
    ),
    "contrib": ("slim", ["BatchNorm", "BatchNorm_1"], [1e-3, 1e-5]),
    "tf_slim": ("slim", ["BatchNorm", "BatchNorm_1"], [1e-3, 1e-5]),
    "sonnet": ("sonnet", ["batch_norm", "batch_norm_1"], [1e-3, 1e-3]),
    "sonnet_v2": ("sonnet_v2", ["batch_norm", "batch_norm_1"], [1e-3, 1e-3]),
    "tensorpack": ("tensorpack", ["conv_bn", "hidden_bn"], [1e-5, 1e-3]),
    "keras": (
        "keras",
        ["batch_normalization", "batch_normalization_1"],
        [1e-3, 1e-5],
    ),
}


@pytest.fixture
def saved(graph, session, tmp_path):
    """saved(value_by_name) writes a checkpoint and returns its prefix."""

    def save(values):
        with tf.Graph().as_default(), tf.Session() as other:
            for name, value in values.items():
                tf.get_variable(name, initializer=value, use_resource=False)
            other.run(tf.global_variables_initializer())
            return tf.train.Saver().save(other, str(tmp_path / "saved"))

    return save


def layer_values(scope="bn", channels=3):
    leaves = ["gamma", "beta", "moving_mean", "moving_variance"]
    return {
        f"{scope}/{leaf}": np.arange(1, channels + 1, dtype=np.float32) + i
        for i, leaf in enumerate(leaves)
    }


def build_layer(channels=3, name="bn"):
    x = tf.placeholder(tf.float32, [None, channels])
    return bn_tf1.batch_norm(x, False, name=name)


def test_a_checkpoint_of_the_first_format(session, tmp_path):
    values = layer_values()
    path = forge.write(tmp_path / "model.ckpt", values, write_version=1)
    assert not (tmp_path / "model.ckpt.index").exists()
    build_layer()
    report = restore(session, path)
    assert sorted(report.restored) == sorted(values)
    for variable in tf.global_variables():
        np.testing.assert_array_equal(session.run(variable), values[variable.op.name])


# ----------------------------------------------------------------------------- real networks


@pytest.mark.parametrize("origin", list(ORIGINS))
def test_the_network_of_every_origin_gives_its_logits(origin, session, tmp_path):
    dialect, scopes, epsilons = ORIGINS[origin]
    checkpoint = str(tmp_path / "converted")
    source = str(FIXTURES / origin / "model.ckpt")
    convert(source, checkpoint, from_dialect=dialect, to_dialect="tf_layers")
    images = np.load(str(FIXTURES / "inputs.npz"))["images"][0]

    def normalize(place):
        return lambda x: bn_tf1.batch_norm(
            x, False, name=scopes[place], epsilon=epsilons[place]
        )

    logits = network(tf.constant(images), normalize(0), normalize(1))
    report = restore(session, checkpoint)
    assert not report.missing and not report.wrong_shape
    assert not report.initial_statistics
    assert "conv/kernel" in report.restored
    values = np.load(str(FIXTURES / origin / "values.npz"))
    # Logits of size 1 in float32, after sums of up to 64 terms.
    np.testing.assert_allclose(
        session.run(logits), values["logits_for_inference"], rtol=1e-5, atol=1e-6
    )


# --------------------------------------------------------------------------- what it restores


def test_everything_that_matches(session, saved, variable_kind):
    build_layer()
    prefix = saved(layer_values())
    report = restore(session, prefix)
    assert report.restored == tuple(sorted(layer_values()))
    for variable in tf.global_variables():
        expected = layer_values()[variable.op.name]
        np.testing.assert_array_equal(session.run(variable), expected)
    assert str(report) == "restored: 4 variables"


def test_a_finalized_graph_and_a_directory(session, saved, tmp_path):
    build_layer()
    tf.get_default_graph().finalize()
    saved(layer_values())
    assert len(restore(session, str(tmp_path)).restored) == 4


def test_a_graph_that_was_imported(saved, variable_kind):
    build_layer()
    prefix = saved(layer_values())
    meta = tf.train.export_meta_graph()
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(meta)
        assert len(restore(session, prefix).restored) == 4
        np.testing.assert_array_equal(
            session.run(tf.trainable_variables("bn/gamma")[0]), [1, 2, 3]
        )


def test_partitioned_variables(session, saved):
    value = np.arange(10, dtype=np.float32).reshape(5, 2)
    partitioned = tf.get_variable(
        "kernel", [5, 2], partitioner=tf.fixed_size_partitioner(2)
    )
    report = restore(session, saved({"kernel": value}))
    assert report.restored == ("kernel",)
    np.testing.assert_array_equal(session.run(tf.convert_to_tensor(partitioned)), value)


def test_only_the_variables_given(session, start, saved, variable):
    build_layer()
    start()
    chosen = [variable("bn/moving_mean")]
    report = restore(session, saved(layer_values()), variables=chosen)
    assert report.restored == ("bn/moving_mean",)
    assert report.unused == ("bn/beta", "bn/gamma", "bn/moving_variance")
    np.testing.assert_array_equal(session.run(variable("bn/gamma")), np.ones(3))


def test_name_map(session, saved):
    build_layer(name="encoder/bn")
    prefix = saved(layer_values("backbone/norm"))
    report = restore(session, prefix, name_map={"backbone/norm": "encoder/bn"})
    assert len(report.restored) == 4 and not report.unused


@pytest.mark.parametrize("name_map", [{}, {"old": "bn"}])
def test_averages_become_the_variables(name_map, session, saved):
    build_layer()
    scope = next(iter(name_map), "bn")
    values = layer_values(scope)
    values[f"{scope}/beta/ExponentialMovingAverage"] = np.float32([7, 8, 9])
    prefix = saved(values)
    restore(session, prefix, name_map=name_map, ema="ExponentialMovingAverage")
    variables = {v.op.name: v for v in tf.global_variables()}
    np.testing.assert_array_equal(session.run(variables["bn/beta"]), [7, 8, 9])
    np.testing.assert_array_equal(session.run(variables["bn/gamma"]), [1, 2, 3])
    with pytest.raises(ValueError, match="`ema` is 'x', but in .* VARIABLE/x; what"):
        restore(session, prefix, ema="x")


# ---------------------------------------------------------------------------- what it reports


def test_missing_and_unused(start, saved):
    build_layer()
    tf.get_variable("head/kernel", [2])
    prefix = saved(dict(layer_values(), step=np.int64(1)))
    report = restore(start(), prefix)
    assert report.missing == ("head/kernel",)
    assert report.unused == ("step",)
    assert str(report).splitlines() == [
        "restored: 4 variables",
        "missing in the checkpoint: head/kernel",
        "unused in the checkpoint: step",
    ]


def test_statistics_at_their_initial_values(start, saved):
    build_layer()
    build_layer(name="other/bn")
    values = layer_values()
    values["bn/moving_mean"][:] = 0
    prefix = saved(values)
    report = restore(start(), prefix, allow_missing=["other/*"])
    initial = ("bn/moving_mean", "other/bn/moving_mean", "other/bn/moving_variance")
    assert report.initial_statistics == initial
    assert "statistics at their initial values: bn/moving_mean, other" in str(report)


def test_missing_statistics_that_were_never_initialized(session, saved):
    build_layer()
    values = {"bn/gamma": layer_values()["bn/gamma"]}
    report = restore(session, saved(values), allow_missing=["bn/moving_*"])
    assert report.initial_statistics == ()
    assert report.missing == ("bn/beta", "bn/moving_mean", "bn/moving_variance")


def test_an_allowed_wrong_shape(start, saved, variable):
    build_layer()
    prefix = saved(dict(layer_values(), **{"bn/gamma": np.ones(4, np.float32)}))
    report = restore(start(), prefix, allow_wrong_shape=["bn/gamma"])
    assert report.wrong_shape == (WrongShape("bn/gamma", (3,), (4,)),)
    assert "bn/gamma" not in report.restored + report.unused + report.missing
    assert "wrong shape: bn/gamma [3] (checkpoint: [4])" in str(report)


# ---------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("lost", ["bn/moving_mean", "bn/moving_variance"])
def test_missing_statistics(lost, start, saved, variable):
    build_layer()
    values = layer_values()
    del values[lost]
    session = start()
    with pytest.raises(ValueError, match=f"lacks the moving statistics {lost}: map"):
        restore(session, saved(values))
    # Nothing was changed.
    np.testing.assert_array_equal(session.run(variable("bn/gamma")), np.ones(3))


def test_missing_statistics_of_any_name_of_a_foreign_layer(start, saved):
    tf.get_variable("conv_bn/mean/EMA", [3])
    with pytest.raises(
        ValueError, match="lacks the moving statistics conv_bn/mean/EMA"
    ):
        restore(start(), saved({"step": np.int64(1)}))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"allow_missing": ["head/*"]},
            r"`allow_missing` has 'head/\*', which fits no",
        ),
        ({"allow_wrong_shape": ["x"]}, "`allow_wrong_shape` has 'x', which fits no"),
        ({"allow_missing": "bn/*"}, "`allow_missing` is 'bn/.*', but must be a list"),
        ({"name_map": {"nn": "bn"}}, "`name_map` has 'nn', which is neither"),
        (
            {"name_map": {"bn/gamma": "bn/beta"}},
            "`name_map` gives 'bn/beta' and 'bn/gamma' one name: 'bn/beta'",
        ),
    ],
)
def test_wrong_arguments(options, message, start, saved):
    build_layer()
    with pytest.raises((ValueError, TypeError), match=message):
        restore(start(), saved(layer_values()), **options)


def test_a_wrong_shape_names_both(start, saved):
    build_layer()
    values = layer_values()
    values["bn/moving_mean"] = np.zeros([1, 1, 1, 3], np.float32)
    message = (
        r"bn/moving_mean has shape \[3\], but in .*saved \[1, 1, 1, 3\]: translate"
    )
    with pytest.raises(ValueError, match=message):
        restore(start(), saved(values))


def test_a_wrong_dtype_names_both(start, saved):
    build_layer()
    values = dict(layer_values(), **{"bn/gamma": np.ones(3)})
    message = "bn/gamma has dtype float32, but in .*saved float64"
    with pytest.raises(ValueError, match=message):
        restore(start(), saved(values))


def test_no_checkpoint(start, tmp_path):
    build_layer()
    with pytest.raises(CheckpointError, match="there is no checkpoint .*nowhere"):
        restore(start(), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("argument", ["session", "checkpoint"])
def test_nothing_in_place_of_an_argument(argument):
    arguments = {"session": tf.Session(), "checkpoint": "model.ckpt-1", argument: None}
    with pytest.raises(TypeError, match=f"`{argument}` is None, but must be"):
        restore(**arguments)


def test_banks_from_a_checkpoint_of_one_and_one_from_several(
    graph, session, saved, tmp_path
):
    """The first bank is called as a layer without banks."""
    x = tf.placeholder(tf.float32, [None, 3])
    bn_tf1.batch_norm(x, False, bank=0, banks=2, name="bn")
    one, several = saved(layer_values()), str(tmp_path / "several")
    with pytest.raises(ValueError, match="lacks .* bn/bank_1/moving_mean.* --banks"):
        restore(session, one)
    convert(one, several, from_dialect="bn_tf1", to_dialect="bn_tf1", banks=2)
    assert len(restore(session, several).restored) == 6
    with tf.Graph().as_default(), tf.Session() as other:
        build_layer()
        report = restore(other, several)
        assert len(report.restored) == 4 and len(report.unused) == 2
