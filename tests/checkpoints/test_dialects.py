"""Recognising batch-norm layers and slots among names and shapes."""

import pytest

from bn_tf1.checkpoints import dialects
from bn_tf1.checkpoints.reader_writer import open_checkpoint
from tests import FIXTURES

LAYER = {
    "bn/gamma": (3,),
    "bn/beta": (3,),
    "bn/moving_mean": (3,),
    "bn/moving_variance": (3,),
}


def without(name):
    return {n: shape for n, shape in LAYER.items() if n != name}


@pytest.mark.parametrize(
    "origin, dialect, scopes, shapes",
    [
        (
            "tf_layers",
            "tf_layers",
            ["batch_normalization", "batch_normalization_1"],
            [(4,), (6,)],
        ),
        ("contrib", "slim", ["BatchNorm", "BatchNorm_1"], [(4,), (6,)]),
        ("tf_slim", "slim", ["BatchNorm", "BatchNorm_1"], [(4,), (6,)]),
        ("sonnet", "sonnet", ["batch_norm", "batch_norm_1"], [(1, 1, 1, 4), (1, 6)]),
        ("sonnet_v2", "sonnet_v2", ["batch_norm", "batch_norm_1"], [(4,), (6,)]),
        ("tensorpack", "tensorpack", ["conv_bn", "hidden_bn"], [(4,), (6,)]),
        (
            "keras",
            "keras",
            ["batch_normalization", "batch_normalization_1"],
            [(4,), (6,)],
        ),
    ],
)
def test_the_layers_of_every_origin(origin, dialect, scopes, shapes):
    checkpoint = open_checkpoint(FIXTURES / origin / "model.ckpt")
    layers = dialects.find_layers(checkpoint.shapes, dialect)
    assert [layer.scope for layer in layers] == scopes
    assert [layer.shape for layer in layers] == shapes
    assert [layer.channels for layer in layers] == [4, 6]


def test_a_layer_without_gamma_and_without_a_scope():
    shapes = {"moving_mean": (2,), "moving_variance": (2,), "beta": (2,)}
    (layer,) = dialects.find_layers(shapes, "tf_layers")
    assert layer.scope == ""
    assert set(layer.names) == {"beta", "moving_mean", "moving_variance"}


def test_what_is_no_layer():
    shapes = {
        "layer_norm/gamma": (3,),
        "layer_norm/beta": (3,),
        "bn/moving_mean/ExponentialMovingAverage": (3,),
        "not_a_moving_mean": (3,),
    }
    assert dialects.find_layers(shapes, "tf_layers") == []
    # tensorpack keeps averages of scalars under the same leaf.
    assert dialects.find_layers({"cost/mean/EMA": ()}, "tensorpack") == []


@pytest.mark.parametrize("lost", ["bn/moving_mean", "bn/moving_variance"])
def test_half_a_layer_is_an_error(lost):
    with pytest.raises(ValueError, match=f"has no {lost} beside it"):
        dialects.find_layers(without(lost), "tf_layers")


def test_variables_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"differ in shape: bn/gamma \[4\], bn/beta"):
        dialects.find_layers(dict(LAYER, **{"bn/gamma": (4,)}), "tf_layers")


def test_statistics_that_are_not_per_channel_are_an_error():
    shapes = {"bn/moving_mean": (1, 5, 3), "bn/moving_variance": (1, 5, 3)}
    with pytest.raises(ValueError, match=r"\[1, 5, 3\].*not per channel"):
        dialects.find_layers(shapes, "sonnet")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("bn/gamma/Momentum", ("", "bn/gamma", "Momentum")),
        ("Adam/bn/gamma/m", ("Adam", "bn/gamma", "m")),
        ("training/Adam/bn/gamma/v", ("training/Adam", "bn/gamma", "v")),
        ("bn/bn/moving_mean/biased", ("bn", "bn/moving_mean", "biased")),
        ("bn/gamma", None),
        ("my_bn/gamma/Momentum", None),
        ("bn/gamma/Adam/more", None),
    ],
)
def test_find_slot(name, expected):
    assert dialects.find_slot(name, LAYER) == expected


@pytest.mark.parametrize(
    "name, role",
    [
        ("a/moving_mean", "moving_mean"),
        ("moving_variance", "moving_variance"),
        ("a/mean/EMA", "moving_mean"),
        ("a/variance/EMA", "moving_variance"),
        ("a/gamma", None),
        ("a/my_moving_mean", None),
    ],
)
def test_statistic_role(name, role):
    assert dialects.statistic_role(name) == role


@pytest.mark.parametrize(
    "dialect, lost",
    [
        ("bn_tf1", []),
        ("slim", []),
        ("tf_layers", ["bn/bn/moving_mean/biased"]),
        ("tensorpack", ["bn/bn/moving_mean/biased", "bn/renorm_mean"]),
        ("sonnet", ["bn/bn/moving_mean/biased", "bn/renorm_mean"]),
    ],
)
def test_lost_state(dialect, lost):
    state = {"bn/renorm_mean": (3,), "bn/bn/moving_mean/biased": (3,)}
    shapes = dict(LAYER, other=(3,), **state)
    layers = dialects.find_layers(shapes, "slim")
    assert dialects.lost_state(shapes, layers, dialect) == lost


def test_rename_takes_the_longest_scope():
    moves = {"a": "x", "a/b": "y", "c/d": "z"}
    renamed = [dialects.rename(n, moves) for n in ["a/b/c", "a/c", "ab", "c/d", "c/dd"]]
    assert renamed == ["y/c", "x/c", "ab", "z", "c/dd"]


def test_natural_order_and_unnumbered():
    scopes = ["bn_10", "bn", "bn_2", "conv2/bn"]
    assert sorted(scopes, key=dialects.natural_key) == [
        "bn",
        "bn_2",
        "bn_10",
        "conv2/bn",
    ]
    assert dialects.unnumbered("Conv_3/batch_norm_12/v2") == "Conv/batch_norm/v2"
