"""`find_layers`: every maker's layer is found, with its variables and its settings."""

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import view_of
from tests.graphs import graph_zoo

TF_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")
# (maker, kind, its variables below the scope, decay, epsilon), from the makers' source
# and the libraries' documented defaults.
MAKERS = [
    ("ours", "fused", TF_NAMES, 0.99, 1e-3),
    ("ours_composed", "composed", TF_NAMES, 0.99, 1e-3),
    ("ours_in_ghost_batches", "composed", TF_NAMES, 0.99, 1e-3),
    ("with_nn", "composed", TF_NAMES, 0.99, 1e-3),
    ("with_ema_class", "composed", ("gamma", "beta", None, None), 0.9, 1e-3),
    ("with_pop_variables", "composed", ("scale", "beta", "pop_mean", "pop_var"), 0.999)
    + (1e-3,),
    ("raw_arithmetic", "composed", TF_NAMES, 0.9, 1e-4),
    ("textbook", "composed", TF_NAMES, 0.9, 1e-5),
    ("with_fused_kernel", "fused", TF_NAMES, 0.9, 1e-3),
    ("tf_layers", "fused", TF_NAMES, 0.99, 1e-3),
    ("tf_layers_composed", "composed", TF_NAMES, 0.99, 1e-3),
    ("tf_layers_renorm", "composed", TF_NAMES, 0.99, 1e-3),
    ("tf_layers_virtual", "composed", TF_NAMES, 0.99, 1e-3),
    ("contrib", "fused", (None,) + TF_NAMES[1:], 0.999, 1e-3),
    ("contrib_composed", "composed", TF_NAMES, 0.999, 1e-3),
    ("contrib_in_place", "fused", (None,) + TF_NAMES[1:], 0.999, 1e-3),
    ("keras", "fused", TF_NAMES, 0.99, 1e-3),
]
MAKERS = [case for case in MAKERS if case[0] in graph_zoo.MAKERS]
TAKES_A_BOOL = ("with_pop_variables", "raw_arithmetic", "textbook", "tf_layers_virtual")


def only_layer():
    (layer,) = find_layers(view_of(tf.get_default_graph()))
    return layer


@pytest.mark.parametrize("mode", ["training", "inference", "switched"])
@pytest.mark.parametrize("maker, kind, names, decay, epsilon", MAKERS)
def test_every_maker_in_every_mode(
    maker, kind, names, decay, epsilon, mode, control_flow, variable_kind
):
    if control_flow == "control_flow_v2" and variable_kind == "reference_variables":
        tf.enable_resource_variables()  # 1.15 cannot do otherwise
    if mode == "switched" and maker in TAKES_A_BOOL:
        mode = "training"
    modes = {"training": True, "inference": False, "switched": None}
    is_training = modes[mode]
    if is_training is None:
        is_training = tf.placeholder(tf.bool, [], name="is_training")
    x = graph_zoo.convolution(graph_zoo.images())
    graph_zoo.MAKERS[maker](x, is_training)
    layer = only_layer()
    if mode == "inference" and maker.startswith("ours"):
        kind = "fused"  # whatever the statistics of a batch need
    gamma, beta, mean, variance = (name and "bn/" + name for name in names)
    assert (layer.name, layer.kind, layer.mode) == ("bn", kind, mode)
    assert (layer.gamma, layer.beta) == (gamma, beta)
    assert layer.epsilon == pytest.approx(epsilon, rel=1e-6)
    assert layer.channels == graph_zoo.CHANNELS
    if mean is not None:
        assert (layer.moving_mean, layer.moving_variance) == (mean, variance)
    else:
        assert "moments" in layer.moving_mean
        assert layer.moving_mean != layer.moving_variance
    if mode != "inference":
        assert layer.decay == pytest.approx(decay, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"weights": True}, {"ghost_batch_size": 4}])
def test_a_kernel_in_a_gradient_is_no_call_of_the_layer(options):
    """It normalises with the batch's statistics as if they were constants."""
    if options.get("weights"):
        options = {"weights": tf.placeholder(tf.float32, [8, 5, 5, 1])}
    graph_zoo.training_graph(graph_zoo.ours_composed, **options)
    layer = only_layer()
    assert (layer.name, layer.kind, layer.mode) == ("bn", "composed", "training")
    assert layer.node.startswith("bn/")


def test_a_layer_behind_another_one_takes_no_kernel_from_it():
    x = graph_zoo.convolution(graph_zoo.images())
    for name, axis in (("one", -1), ("two", (2, 3))):
        x = bn_tf1.batch_norm(x, True, axis=axis, name=name)
    graph_zoo.make_train_op(tf.reduce_mean(x**2))
    found = find_layers(view_of(tf.get_default_graph()))
    assert [(layer.name, layer.mode) for layer in found] == [
        ("one", "training"),
        ("two", "training"),
    ]
