"""What looks like a batch norm and is none, and batch norms that look like something else."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import view_of
from tests.doctor.test_lint import checks, finding
from tests.graphs import graph_zoo
from tests.graphs.graph_zoo import convolution, images, loss_of, make_train_op

LAST = graph_zoo.CHANNELS


def vector(name, size=LAST):
    return tf.get_variable(name, [size], initializer=tf.ones_initializer())


def features(x):
    return tf.reduce_mean(convolution(x), [1, 2])


# ------------------------------------------------------------------------ no batch norm


def layer_norm(axes):
    x = convolution(images())
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return tf.nn.batch_normalization(
        x, mean, variance, vector("beta"), vector("gamma"), 1e-5
    )


def layer_norm_of_features():
    x = tf.placeholder(tf.float32, [None, 16])
    mean = tf.reduce_mean(x, -1, keepdims=True)
    deviation = tf.sqrt(tf.reduce_mean(tf.square(x - mean), -1, keepdims=True))
    return vector("gamma", 16) * (x - mean) / (deviation + 1e-6) + vector("beta", 16)


def group_norm():
    x = tf.reshape(convolution(images()), [-1, 25, 2, LAST // 2])
    mean, variance = tf.nn.moments(x, [1, 3], keepdims=True)
    y = tf.reshape((x - mean) * tf.rsqrt(variance + 1e-5), [-1, 5, 5, LAST])
    return y * vector("gamma") + vector("beta")


def instance_norm_by_the_fused_kernel():
    x = tf.reshape(tf.transpose(convolution(images()), [0, 3, 1, 2]), [1, 32, 5, 5])
    y, _, _ = tf.nn.fused_batch_norm(
        x, tf.ones([32]), tf.zeros([32]), data_format="NCHW"
    )
    y = tf.transpose(tf.reshape(y, [8, LAST, 5, 5]), [0, 2, 3, 1])
    return y * vector("gamma") + vector("beta")


def root_mean_square_norm():
    x = features(images())
    square = tf.reduce_mean(tf.square(x), -1, keepdims=True)
    return x * tf.rsqrt(square + 1e-6) * vector("gamma")


def l2_normalized():
    x = convolution(images())
    return tf.nn.l2_normalize(x, -1) + tf.nn.l2_normalize(x, 0)


def weight_norm():
    weights = tf.get_variable("v", [3, 3, 3, LAST])
    weights = vector("g") * tf.nn.l2_normalize(weights, [0, 1, 2])
    return tf.nn.conv2d(images(), weights, [1, 1, 1, 1], "SAME")


def weight_standardization():
    weights = tf.get_variable("v", [3, 3, 3, LAST])
    mean, variance = tf.nn.moments(weights, [0, 1, 2], keepdims=True)
    weights = (weights - mean) / tf.sqrt(variance + 1e-5) * vector("gain")
    return tf.nn.conv2d(images(), weights, [1, 1, 1, 1], "SAME")


def input_standardization():
    x = (images() - tf.constant([0.5, 0.4, 0.3])) / tf.sqrt(
        tf.constant([0.1, 0.2, 0.3])
    )
    return convolution(x)


def image_standardization():
    return convolution(tf.map_fn(tf.image.per_image_standardization, images()))


def advantages():
    x = tf.placeholder(tf.float32, [None])
    mean, variance = tf.nn.moments(x, [0])
    weight = (x - mean) / tf.sqrt(variance + 1e-8)
    return features(images(batch=None)) * tf.reduce_mean(weight)


def deviation_of_the_batch():
    x = convolution(images())
    deviation = tf.sqrt(tf.reduce_mean(tf.square(x - tf.reduce_mean(x, 0)), 0) + 1e-8)
    return tf.concat([x, tf.reduce_mean(deviation) * tf.ones([8, 5, 5, 1])], -1)


OTHERS = {
    "layer norm": lambda: layer_norm([1, 2, 3]),
    "instance norm": lambda: layer_norm([1, 2]),
    "layer norm of pixels": lambda: layer_norm([-1]),
}
OTHERS.update(
    {
        function.__name__: function
        for function in (
            layer_norm_of_features,
            group_norm,
            instance_norm_by_the_fused_kernel,
            root_mean_square_norm,
            l2_normalized,
            weight_norm,
            weight_standardization,
            input_standardization,
            image_standardization,
            advantages,
            deviation_of_the_batch,
        )
    }
)


def pooled(y):
    return y if y.shape.ndims == 4 else y[:, tf.newaxis, tf.newaxis]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_another_normalisation_is_no_batch_norm(name):
    make_train_op(loss_of(pooled(OTHERS[name]())))
    tf.train.Saver()
    assert find_layers(view_of(tf.get_default_graph())) == []
    assert checks() == []


def adam(variable, gradient):
    first = tf.get_variable("m", variable.shape, trainable=False)
    second = tf.get_variable("v", variable.shape, trainable=False)
    mean, square = first / (1 - 0.9), second / (1 - 0.999)
    step = tf.assign_sub(variable, 1e-3 * mean * tf.rsqrt(square + 1e-8))
    update = tf.assign(second, 0.999 * second + 0.001 * tf.square(gradient))
    return tf.group(step, update)


def centered_rms(variable, gradient):
    mean = tf.get_variable("m", variable.shape, trainable=False)
    square = tf.get_variable("v", variable.shape, trainable=False)
    variance = square - tf.square(mean)
    return tf.assign_sub(variable, 0.1 * gradient / tf.sqrt(variance + 1e-8))


@pytest.mark.parametrize("rule", [adam, centered_rms])
def test_an_optimizer_written_by_hand_is_no_batch_norm(rule):
    bias = vector("bias")
    loss = loss_of(convolution(images()) + bias)
    rule(bias, *tf.gradients(loss, bias))
    assert find_layers(view_of(tf.get_default_graph())) == []


# --------------------------------------------------------------- batch norm of what is pooled


WRITTEN = (
    "with_nn",
    "with_ema_class",
    "with_pop_variables",
    "raw_arithmetic",
    "textbook",
)


@pytest.fixture(
    params=WRITTEN + (("tf_layers", "contrib", "keras") if graph_zoo.IS_1 else ())
)
def maker(request):
    return graph_zoo.MAKERS[request.param]


def loss_after(maker, is_training):
    return loss_of(pooled(maker(features(images()), is_training)))


def test_a_batch_norm_of_pooled_features_is_healthy(maker):
    make_train_op(loss_after(maker, True))
    tf.train.Saver()
    (layer,) = find_layers(view_of(tf.get_default_graph()))
    assert (layer.name, layer.mode) == ("bn", "training")
    assert checks() == []


def test_a_batch_norm_of_pooled_features_in_the_wrong_mode(maker):
    loss_after(maker, True)
    assert finding("training-mode-in-inference").layer == "bn"


@pytest.mark.parametrize("name", ["with_nn", "raw_arithmetic", "textbook"])
def test_a_batch_norm_of_pooled_features_that_is_never_updated(name):
    make_train_op(loss_after(graph_zoo.MAKERS[name], True), updates=[])
    assert finding("update-not-run").layer == "bn"


# ----------------------------------------------------------------- loops of control flow v1


def looped_loss(maker):
    """The layer in the body of a loop; a resource variable, which a body may write."""
    tf.disable_control_flow_v2()
    tf.enable_resource_variables()
    _, y = tf.while_loop(
        lambda i, x: i < 3,
        lambda i, x: (i + 1, maker(convolution(x, 3), True)),
        [0, images()],
    )
    tf.disable_resource_variables()
    return loss_of(y)


def test_updates_in_the_body_of_a_loop_that_nothing_waits_for():
    make_train_op(looped_loss(graph_zoo.with_nn), updates=[])
    found = finding("update-in-branch")
    assert (found.layer, found.gravity) == ("bn", "warning")
    assert finding("update-not-run").layer == "bn"


def test_updates_in_place_in_the_body_of_a_loop_are_healthy():
    def in_place(x, is_training):
        return graph_zoo.ours(x, is_training, update="in_place")

    make_train_op(looped_loss(in_place))
    assert checks() == []
