"""Every kernel that normalises is recognised, also as other builds rewrite it."""

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.doctor.lint import lint
from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.view import view_of
from tests.doctor.test_lint import checks, finding
from tests.graphs import graph_zoo
from tests.graphs.graph_zoo import convolution, images, loss_of, make_train_op

NAMES = ("gamma", "beta", "moving_mean", "moving_variance")
REWRITTEN = (
    "_MklFusedBatchNorm",
    "_MklFusedBatchNormV3",
    "_MklNativeFusedBatchNormV2",
    "_MklNativeFusedBatchNormV3",
    "_FusedBatchNormEx",
    "_MklNativeFusedBatchNormEx",
    "_MklFusedBatchNormEx",
)


def layer(op, is_training, decay=0.95):
    """A kernel by its own name, with the updates of its outputs in the collection."""
    with tf.variable_scope("bn"):
        gamma, beta, mean, variance = graph_zoo._variables(graph_zoo.CHANNELS)
        empty = tf.zeros([0])
        outputs = getattr(tf.raw_ops, op)(
            x=convolution(images()),
            scale=gamma,
            offset=beta,
            mean=empty if is_training else mean,
            variance=empty if is_training else variance,
            epsilon=0.002,
            is_training=is_training,
        )
        if is_training:
            batch = (outputs.batch_mean, outputs.batch_variance)
            for moving, statistic in zip((mean, variance), batch):
                update = tf.assign_sub(moving, (1 - decay) * (moving - statistic))
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    return outputs.y


def only_layer(graph_def):
    (found,) = find_layers(view_of(graph_def))
    return found


@pytest.fixture(params=["FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"])
def kernel(request):
    return request.param


@pytest.mark.parametrize("is_training", [True, False])
def test_each_version_of_the_fused_kernel(kernel, is_training):
    y = layer(kernel, is_training)
    if is_training:
        make_train_op(loss_of(y))
    tf.train.Saver()
    found = only_layer(tf.get_default_graph())
    assert (found.name, found.kind, found.op) == ("bn", "fused", kernel)
    assert found.mode == ("training" if is_training else "inference")
    assert [getattr(found, name) for name in NAMES] == [f"bn/{n}" for n in NAMES]
    assert found.epsilon == pytest.approx(0.002, rel=1e-6)
    assert found.decay == (pytest.approx(0.95) if is_training else None)
    assert checks() == []


def test_updates_of_each_version_that_no_train_op_runs(kernel):
    make_train_op(loss_of(layer(kernel, True)), updates=[])
    found = finding("update-not-run")
    assert (found.gravity, found.layer) == ("error", "bn")


def test_batch_statistics_of_each_version_in_an_inference_graph(kernel):
    graph_zoo.logits_of(layer(kernel, True))
    assert finding("training-mode-in-inference").layer == "bn"


def rewritten(op, is_training):
    """The graph as a build with oneDNN, or a remapper, hands it to the executor."""
    y = layer("FusedBatchNormV3", is_training)
    graph_zoo.logits_of(y)
    graph_def = tf.get_default_graph().as_graph_def()
    for node in graph_def.node:
        if node.op == "FusedBatchNormV3":
            node.op = op
            if "MklFused" in op:  # a second tensor tells the layout of each
                node.input.extend([node.input[0]] * 5)
    return graph_def


@pytest.mark.parametrize("op", REWRITTEN)
def test_a_rewritten_kernel(op):
    graph_def = rewritten(op, is_training=False)
    found = only_layer(graph_def)
    assert (found.name, found.op, found.mode) == ("bn", op, "inference")
    assert found.moving_variance == "bn/moving_variance"
    assert [f for f in lint(graph_def) if f.gravity != "note"] == []


@pytest.mark.parametrize("op", REWRITTEN)
def test_a_rewritten_kernel_that_uses_batch_statistics(op):
    errors = [f for f in lint(rewritten(op, True)) if f.gravity == "error"]
    assert [(f.check, f.layer) for f in errors] == [
        ("training-mode-in-inference", "bn")
    ]


def node(graph_def, op, name, inputs, **texts):
    added = graph_def.node.add(op=op, name=name)
    added.input.extend(inputs)
    for key, values in texts.items():
        added.attr[key].list.s.extend(values)
    return added


def fused_convolution(op, fused_ops, bias_before):
    """A convolution with what follows it fused into it, as the remapper leaves it."""
    x = images()
    if bias_before:
        x = tf.nn.bias_add(x, tf.get_variable("bias", [3]))
    filters = tf.get_variable("filters", [3, 3, 3, graph_zoo.CHANNELS])
    with tf.variable_scope("bn"):
        operands = graph_zoo._variables(graph_zoo.CHANNELS)
    graph_def = tf.get_default_graph().as_graph_def()
    count = 4 if b"FusedBatchNorm" in fused_ops else 1
    inputs = [x.op.name, filters.op.name + "/read"]
    inputs += [variable.op.name + "/read" for variable in operands[:count]]
    added = node(graph_def, op, "bn/fused", inputs, fused_ops=fused_ops)
    added.attr["epsilon"].f = 0.01
    return graph_def


FUSED_CONVOLUTIONS = (
    "_FusedConv2D",
    "_FusedDepthwiseConv2dNative",
    "_MklFusedConv2D",
    "_MklNativeFusedConv2D",
)


@pytest.mark.parametrize("bias_before", [False, True])
@pytest.mark.parametrize("op", FUSED_CONVOLUTIONS)
def test_a_batch_norm_fused_into_a_convolution(op, bias_before):
    graph_def = fused_convolution(op, [b"FusedBatchNorm", b"Relu"], bias_before)
    found = only_layer(graph_def)
    assert (found.name, found.op, found.mode) == ("bn", op, "inference")
    assert [getattr(found, name) for name in NAMES] == [f"bn/{n}" for n in NAMES]
    assert found.epsilon == pytest.approx(0.01)
    # A bias before the convolution is no bias before the batch norm.
    assert lint(graph_def) == []


@pytest.mark.parametrize("op", FUSED_CONVOLUTIONS)
def test_a_bias_fused_into_a_convolution_is_no_batch_norm(op):
    assert find_layers(view_of(fused_convolution(op, [b"BiasAdd"], False))) == []


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_kernel_from_before_the_fused_one(is_trained):
    with tf.variable_scope("bn"):
        gamma, beta, mean, variance = graph_zoo._variables(graph_zoo.CHANNELS)
    y = convolution(images()) * gamma
    if is_trained:
        make_train_op(loss_of(y))
    graph_def = tf.get_default_graph().as_graph_def()
    operands = [v.op.name + "/read" for v in (mean, variance, beta, gamma)]
    added = node(
        graph_def,
        "BatchNormWithGlobalNormalization",
        "bn/normalized",
        ["conv/Conv2D"] + operands,
    )
    added.attr["variance_epsilon"].f = 0.004
    found = only_layer(graph_def)
    assert (found.name, found.kind, found.mode) == ("bn", "fused", "inference")
    assert [getattr(found, name) for name in NAMES] == [f"bn/{n}" for n in NAMES]
    assert found.epsilon == pytest.approx(0.004)
    expected = ["inference-mode-in-training"] if is_trained else []
    assert [f.check for f in lint(graph_def) if f.gravity != "note"] == expected


@pytest.mark.parametrize("scope", ["", "net/bn_1"])
def test_a_layer_frozen_by_tensorflow_2_is_named_by_its_node(scope):
    # Constants are named after the operation that read the variable.
    graph_def = tf.GraphDef()
    with tf.Graph().as_default() as graph:
        x = convolution(images())
        with tf.name_scope(scope):
            read = "batchnorm/mul/ReadVariableOp/resource"
            statistics = (
                "Cast/ReadVariableOp/resource",
                "Cast_1/ReadVariableOp/resource",
            )
            gamma, mean, variance = (
                tf.identity(tf.constant([0.5, 1.0, 1.5, 2.0], name=name))
                for name in (read, *statistics)
            )
            tf.nn.batch_normalization(x, mean, variance, None, gamma, 1e-3)
        graph_def.CopyFrom(graph.as_graph_def())
    found = only_layer(graph_def)
    assert found.name == (scope or found.node)
    assert "ReadVariableOp" not in found.name
