"""Every error message of `batch_norm`: the argument, the constraint and the value."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1


def assert_says(caught, *parts):
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def build(x=None, is_training=True, **options):
    x = tf.zeros([4, 3]) if x is None else x
    return bn_tf1.batch_norm(x, is_training, **options)


ARGUMENT_ERRORS = {
    "axis_is_float": ({"axis": 1.0}, TypeError, ["`axis`", "1.0", "int"]),
    "axis_is_str": ({"axis": "last"}, TypeError, ["`axis`", "'last'", "int"]),
    "axis_is_none": ({"axis": None}, TypeError, ["`axis`", "None", "int"]),
    "axis_too_large": ({"axis": 2}, ValueError, ["`axis` is 2", "[-2, 2)"]),
    "axis_too_small": ({"axis": -3}, ValueError, ["`axis` is -3", "[-2, 2)"]),
    "decay_too_large": (
        {"decay": 1.5},
        ValueError,
        ["`decay` is 1.5, but must lie in [0, 1)"],
    ),
    "decay_is_one": (
        {"decay": 1.0},
        ValueError,
        ["`decay` is 1.0, but must lie in [0, 1)"],
    ),
    "decay_is_negative": ({"decay": -0.1}, ValueError, ["`decay`", "-0.1", "[0, 1)"]),
    "decay_is_nan": ({"decay": np.nan}, ValueError, ["`decay`", "nan", "[0, 1)"]),
    "decay_is_str": (
        {"decay": "0.9"},
        ValueError,
        ["`decay` is '0.9', but must be a number in [0, 1) or a scalar float tensor"],
    ),
    "epsilon_is_str": (
        {"epsilon": "1e-3"},
        ValueError,
        ["`epsilon` is '1e-3', but must be a number > 0"],
    ),
    "epsilon_is_zero": ({"epsilon": 0}, ValueError, ["`epsilon` is 0", "> 0"]),
    "epsilon_is_negative": (
        {"epsilon": -1e-3},
        ValueError,
        ["`epsilon` is -0.001", "> 0"],
    ),
    "epsilon_is_nan": ({"epsilon": np.nan}, ValueError, ["`epsilon` is nan", "> 0"]),
    "ema_variance_unknown": (
        {"ema_variance": "sample"},
        ValueError,
        ["`ema_variance`", "'sample'", "'biased'", "'unbiased'"],
    ),
    "update_unknown": (
        {"update": "now"},
        ValueError,
        ["`update`", "'now'", "'collection'", "'in_place'", "'skip'"],
    ),
    "initializer_unknown": (
        {"initializers": {"gama": tf.zeros_initializer()}},
        ValueError,
        ["`initializers`", "'gama'", "gamma", "beta", "moving_mean", "moving_variance"],
    ),
    "regularizer_unknown": (
        {"regularizers": {"moving_mean": tf.nn.l2_loss}},
        ValueError,
        ["`regularizers`", "'moving_mean'", "'gamma'", "'beta'"],
    ),
    "updates_collection_none": (
        {"updates_collection": None},
        ValueError,
        ["`updates_collection`", "None"],
    ),
    "updates_collection_empty": (
        {"updates_collection": ""},
        ValueError,
        ["`updates_collection`", "''"],
    ),
    "updates_collection_not_str": (
        {"updates_collection": 3},
        ValueError,
        ["`updates_collection`", "3"],
    ),
    "is_training_none": (
        {"is_training": None},
        TypeError,
        ["`is_training`", "None", "bool"],
    ),
    "is_training_int": ({"is_training": 1}, TypeError, ["`is_training`", "1", "bool"]),
    "is_training_str": (
        {"is_training": "yes"},
        TypeError,
        ["`is_training`", "'yes'", "bool"],
    ),
}


@pytest.mark.parametrize(
    "options, error, parts", list(ARGUMENT_ERRORS.values()), ids=list(ARGUMENT_ERRORS)
)
def test_argument(options, error, parts, graph):
    with pytest.raises(error) as caught:
        build(**options)
    assert_says(caught, *parts)
    assert not tf.global_variables(), "an error leaves no variables behind"


@pytest.mark.parametrize("is_training", [True, False])
def test_decay_zero_is_in_the_interval(is_training):
    build(is_training=is_training, decay=0.0)


@pytest.mark.parametrize("dtype", [tf.float32, tf.int32], ids=["float32", "int32"])
def test_is_training_of_another_dtype(dtype):
    with pytest.raises(TypeError) as caught:
        build(is_training=tf.placeholder(dtype, [], name="switch"))
    assert_says(caught, "`is_training`", "switch", "bool")


def test_is_training_is_a_vector():
    with pytest.raises((TypeError, ValueError)) as caught:
        build(is_training=tf.placeholder(tf.bool, [2], name="switch"))
    assert_says(caught, "`is_training`", "switch", "scalar")


def test_is_training_has_no_default():
    with pytest.raises(TypeError, match="is_training"):
        bn_tf1.batch_norm(tf.zeros([4, 3]))


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, -1)


def test_decay_is_a_vector():
    with pytest.raises(ValueError) as caught:
        build(decay=tf.placeholder(tf.float32, [2], name="schedule"))
    assert_says(caught, "`decay`", "schedule", "scalar")


def test_decay_is_an_int_tensor():
    with pytest.raises((TypeError, ValueError)) as caught:
        build(decay=tf.placeholder(tf.int32, [], name="schedule"))
    assert_says(caught, "`decay`", "schedule", "float")


def test_rank_unknown():
    with pytest.raises(ValueError) as caught:
        build(tf.placeholder(tf.float32, None))
    assert_says(caught, "`x`", "<unknown>", "rank", "2")


@pytest.mark.parametrize("shape", [[], [3]], ids=["rank0", "rank1"])
def test_rank_too_small(shape):
    with pytest.raises(ValueError) as caught:
        build(tf.zeros(shape))
    assert_says(caught, "`x`", str(tf.TensorShape(shape)), "rank", "2")


@pytest.mark.parametrize("shape, axis", [((4, None), -1), ((4, None, 3), 1)])
def test_channels_unknown(shape, axis):
    x = tf.placeholder(tf.float32, shape)
    with pytest.raises(ValueError) as caught:
        build(x, axis=axis)
    assert_says(caught, "`x`", str(x.shape), "channels", "axis", str(axis))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_dtype_not_float(dtype):
    with pytest.raises(TypeError) as caught:
        build(tf.zeros([4, 3], dtype))
    assert_says(caught, "`x`", dtype, "float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize(
    "shape, axis", [((1, 3), -1), ((1, 1, 1, 3), -1), ((1, 3, 1, 1), 1)]
)
def test_one_value_per_channel(shape, axis):
    with tf.variable_scope("tower"), pytest.raises(ValueError) as caught:
        build(tf.zeros(shape), axis=axis, name="last_layer")
    assert_says(caught, "`x`", str(tf.TensorShape(shape)), "tower/last_layer")


def test_one_value_per_channel_in_inference_is_fine(start):
    y = build(tf.ones([1, 3]), is_training=False)
    np.testing.assert_allclose(start().run(y), [[0.9995] * 3], rtol=1e-5)


OF_LIBRARIES = {
    "name": lambda x, name, **options: build(x, name=name, **options),
    "layers": bn_tf1.layers.batch_normalization,
    "scope": lambda x, name, **options: bn_tf1.slim.batch_norm(
        x, scope=name, scale=True, **options
    ),
}


@pytest.mark.parametrize("library", list(OF_LIBRARIES))
def test_layers_that_cannot_share(library, graph):
    """By accident, with nothing, and with a layer of other channels."""
    make = OF_LIBRARIES[library]
    argument = library if library == "scope" else "name"
    three, four = tf.zeros([4, 3]), tf.zeros([4, 4])
    with pytest.raises(ValueError, match="does not exist") as caught:
        make(three, name="bn", reuse=True)
    assert_says(caught, "layer 'bn': ", "Variable bn/", "`reuse`", f"`{argument}`")
    make(three, name="bn")
    with pytest.raises(ValueError, match="already exists") as caught:
        make(three, name="bn")
    assert_says(caught, "layer 'bn': ", "Variable bn/", "reuse=True", f"`{argument}`")
    with pytest.raises(
        ValueError, match=r"shape \(4,\) and found shape \(3,\)"
    ) as caught:
        make(four, name="bn", reuse=True)
    assert_says(caught, "layer 'bn': ", "channels", f"`{argument}`")
    assert "\n" not in str(caught.value)


def test_an_initializer_that_fails_says_so_itself():
    def failing(*arguments, **options):
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="^no such file$"):
        build(initializers={"gamma": failing})


@pytest.mark.parametrize(
    "options, ours",
    [
        ({"training": True}, "is_training"),
        ({"momentum": 0.9}, "decay"),
        ({"scope": "bn"}, "name"),
        ({"gamma_initializer": tf.ones_initializer()}, "initializers={'gamma'"),
    ],
)
def test_names_that_other_libraries_give_an_argument(options, ours):
    (theirs,) = options
    with pytest.raises(TypeError) as caught:
        bn_tf1.batch_norm(tf.zeros([4, 3]), **options)
    assert f"`{theirs}`" in str(caught.value) and ours in str(caught.value)


@pytest.mark.parametrize(
    "function, given, own",
    [
        (bn_tf1.batch_norm, "ghost_batches", "`ghost_batch_size`"),
        (bn_tf1.batch_norm, "renorm_decay", "`renorm=bn_tf1.Renormalization("),
        (bn_tf1.layers.batch_normalization, "is_training", "`training`"),
        (bn_tf1.layers.batch_normalization, "decay", "`momentum`"),
        (bn_tf1.layers.batch_normalization, "renorm_decay", "`renorm_momentum`"),
        (bn_tf1.layers.batch_normalization, "initializers", "`gamma_initializer, and"),
        (bn_tf1.slim.batch_norm, "momentum", "`decay`"),
        (bn_tf1.slim.batch_norm, "name", "`scope`"),
        (bn_tf1.slim.batch_norm, "axis", '`data_format="NHWC" for'),
        (
            bn_tf1.slim.batch_norm,
            "beta_regularizer",
            "`param_regularizers={'beta': ...}`",
        ),
    ],
)
def test_each_library_says_its_own_name(function, given, own):
    with pytest.raises(TypeError) as caught:
        function(tf.zeros([4, 3]), **{given: 0})
    assert_says(caught, f"{function.__name__} has no argument `{given}`", own)


@pytest.mark.parametrize("argument", ["initializers", "regularizers", "constraints"])
def test_what_must_be_a_function(argument):
    with pytest.raises(ValueError) as caught:
        bn_tf1.batch_norm(tf.zeros([4, 3]), True, **{argument: {"gamma": 0.1}})
    for part in [f"`{argument}`", "0.1", "'gamma'", "function"]:
        assert part in str(caught.value)
    assert tf.global_variables() == []


@pytest.mark.parametrize("decay", [2.0, -0.1, float("nan"), "0.9"])
def test_a_decay_that_a_drop_in_cannot_have(decay):
    """They take 1, as the originals do."""
    x = tf.zeros([4, 3])
    with pytest.raises(ValueError, match="`momentum`"):
        bn_tf1.layers.batch_normalization(x, momentum=decay, training=True)
    with pytest.raises(ValueError, match="`decay`"):
        bn_tf1.slim.batch_norm(x, decay=decay)
    bn_tf1.slim.batch_norm(x, decay=1.0)
    bn_tf1.layers.batch_normalization(x, momentum=1, training=True)


@pytest.mark.parametrize("argument", ["beta_regularizer", "gamma_constraint"])
def test_what_must_be_a_function_of_a_drop_in(argument):
    with pytest.raises(ValueError, match=f"`{argument}` is 0.1"):
        bn_tf1.layers.batch_normalization(tf.zeros([4, 3]), **{argument: 0.1})
    group = "param_regularizers" if "regularizer" in argument else "param_initializers"
    with pytest.raises(ValueError, match=f"`{group}` has 0.1 for 'beta'"):
        bn_tf1.slim.batch_norm(tf.zeros([4, 3]), **{group: {"beta": 0.1}})


@pytest.mark.parametrize("argument", ["param_initializers", "param_regularizers"])
def test_a_misspelt_variable_of_slim(argument):
    with pytest.raises(ValueError) as caught:
        bn_tf1.slim.batch_norm(
            tf.zeros([4, 3]), **{argument: {"gama": tf.ones_initializer()}}
        )
    assert_says(caught, f"`{argument}` has the key 'gama'", "'gamma'", "'moving_mean'")
    assert tf.global_variables() == []
