"""The models: shapes, what is normalised, what is penalised, how weights start."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs.models import MODELS, Settings, _subsample

_LAYERS = {"mlp": 3, "convnet": 4, "resnet": 7}  # batch norms, for resnet_n=1


def _build(model, images=None, is_training=True, **settings):
    if images is None:
        images = tf.zeros([4, 8, 8, 1])
    return MODELS[model](
        images, is_training, Settings(num_classes=10, resnet_n=1, **settings)
    )


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_logits_have_one_column_per_class(model, shape):
    images = tf.placeholder(tf.float32, (None,) + shape)
    logits = _build(model, images)
    assert logits.shape.as_list() == [None, 10]
    assert logits.dtype == tf.float32


@pytest.mark.parametrize("size", [(32, 32), (7, 9), (1, 1)])
def test_the_shortcut_of_a_resnet_is_subsampled_bit_for_bit(size, session):
    generator = np.random.RandomState(0)
    x = tf.constant(generator.normal(size=(2, *size, 3)).astype(np.float32))
    sampled, expected = _subsample(x, 2), x[:, ::2, ::2, :]
    dy = tf.random.stateless_normal(tf.shape(expected), [1, 2])
    slopes = [tf.gradients(y, x, dy)[0] for y in (sampled, expected)]
    np.testing.assert_array_equal(*session.run([sampled, expected]))
    np.testing.assert_array_equal(*session.run(slopes))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_normalised_layer_has_no_bias(model):
    _build(model)
    assert len(bn_tf1.batch_norm_calls()) == _LAYERS[model]
    biases = [v.op.name for v in tf.trainable_variables() if "bias" in v.op.name]
    assert biases == ["logits/bias"]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_without_normalization_each_layer_has_a_bias_instead(model):
    _build(model, normalization="none")
    assert bn_tf1.batch_norm_calls() == ()
    biases = [v for v in tf.trainable_variables() if "bias" in v.op.name]
    assert len(biases) == _LAYERS[model] + 1


@pytest.mark.parametrize("model", sorted(MODELS))
def test_what_enters_the_logits_has_one_size_for_images_of_any(model, session):
    """The largest stable learning rate goes with the inverse of its squared norm."""
    generator = np.random.RandomState(0)
    norms = []
    for i, size in enumerate((8, 28, 48)):
        images = generator.uniform(size=[8, size, size, 1]).astype(np.float32)
        with tf.variable_scope(f"net{i}"):
            logits = _build(model, tf.constant(images))
        (product,) = [
            op
            for op in tf.get_default_graph().get_operations()
            if op.type == "MatMul" and op.name.startswith(f"net{i}/logits/")
        ]
        norms.append(tf.reduce_mean(tf.reduce_sum(product.inputs[0] ** 2, axis=1)))
        assert logits.shape[1] == 10
    session.run(tf.global_variables_initializer())
    norms = session.run(norms)
    # Without it the convnet's grow by 12 and 36.
    assert max(norms) < 1.5 * min(norms)
    assert max(norms) < 120


def test_features_of_older_runs_stay_as_they_were(session):
    images = tf.constant(
        np.random.RandomState(0).uniform(size=[4, 16, 16, 1]), tf.float32
    )
    for model, build in (("convnet", lambda x: x / 4), ("mlp", lambda x: 2 * x - 1)):
        features = []
        for scale in (False, True):
            with tf.variable_scope(model, reuse=scale):
                logits = _build(model, images, scale_features=scale)
            features.append(logits.op.inputs[0].op.inputs[0])
        session.run(tf.global_variables_initializer())
        old, new = session.run(features)
        np.testing.assert_allclose(new, build(old), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_resnet_has_6n_plus_2_layers_with_weights(n):
    settings = Settings(num_classes=10, resnet_n=n)
    MODELS["resnet"](tf.zeros([4, 32, 32, 3]), True, settings)
    weights = [v for v in tf.trainable_variables() if "weights" in v.op.name]
    assert len(weights) == 6 * n + 2


@pytest.mark.parametrize("is_training", [True, False])
def test_the_kernel_of_batch_norm_is_the_one_that_is_asked_for(is_training, graph):
    """The recipe's y is x * scale + offset, of an AddV2 that `tf.nn` names."""
    _build("convnet", is_training=is_training, bn_kernel="recipe")
    drawn = [op for op in graph.get_operations() if op.name.endswith("batchnorm/add_1")]
    assert len(drawn) == _LAYERS["convnet"]


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("bn_weight_decay", [False, True])
def test_weight_decay_leaves_gamma_and_beta_out_unless_asked(model, bn_weight_decay):
    _build(model, weight_decay=0.5, bn_weight_decay=bn_weight_decay)
    penalised = [
        variable
        for variable in tf.trainable_variables()
        if "weights" in variable.op.name
        or (bn_weight_decay and variable.op.name.endswith(("gamma", "beta")))
    ]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        penalty, values = session.run([tf.losses.get_regularization_loss(), penalised])
    expected = sum(0.25 * np.sum(np.square(value, dtype="f8")) for value in values)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_inference_of_an_example_does_not_depend_on_its_batch(model):
    images = np.random.RandomState(0).uniform(size=[4, 8, 8, 1]).astype("f4")
    fed = tf.placeholder(tf.float32, [None, 8, 8, 1])
    logits = _build(model, fed, is_training=False)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        together = session.run(logits, {fed: images})
        alone = session.run(logits, {fed: images[:1]})
    # Another batch size may sum in another order: a few units of 2^-24 per layer.
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-5)


def _initial_weights(model, seed, operations_before=0):
    with tf.Graph().as_default(), tf.Session() as session:
        for _ in range(operations_before):
            tf.constant(0.0)  # shifts the seeds that TensorFlow derives by itself
        _build(model, seed=seed)
        session.run(tf.global_variables_initializer())
        return session.run(tf.trainable_variables())


def test_initial_weights_do_not_depend_on_the_rest_of_the_graph():
    alone = _initial_weights("convnet", seed=1)
    later = _initial_weights("convnet", seed=1, operations_before=5)
    for expected, value in zip(alone, later):
        np.testing.assert_array_equal(value, expected)


def test_initial_weights_depend_on_the_seed_and_the_layer():
    first, second = _initial_weights("mlp", 1), _initial_weights("mlp", 2)
    assert not np.array_equal(first[0], second[0])
    hidden = [value for value in first if value.shape == (100, 100)]
    assert len(hidden) == 2 and not np.array_equal(*hidden)


def test_initial_weights_are_the_same_on_every_tensorflow_version():
    # Read off once on TensorFlow 1.15.5; 2.21.0 gives the same bits.
    expected = [-0.30047956109046936, 0.24650420248508453, 0.28477564454078674]
    weights = _initial_weights("mlp", seed=0)[0]
    np.testing.assert_array_equal(weights[0, :3], np.float32(expected))


@pytest.mark.skipif(
    tf.version.VERSION.startswith("1."), reason="no bfloat16 convolution on its CPU"
)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_bfloat16_activations_with_float32_weights_statistics_and_loss(model):
    images = np.random.RandomState(0).uniform(size=[16, 8, 8, 1]).astype("f4")
    exact = _build(model, tf.constant(images))
    with tf.variable_scope("low"):
        logits = _build(model, tf.constant(images), precision="bfloat16")
    assert logits.dtype == tf.float32
    dtypes = {variable.dtype.base_dtype for variable in tf.global_variables()}
    assert dtypes == {tf.float32}
    activations = {"mlp": "Sigmoid", "convnet": "Relu", "resnet": "Relu"}[model]
    low = [
        op.outputs[0].dtype
        for op in tf.get_default_graph().get_operations()
        if op.type == activations and op.name.startswith("low")
    ]
    assert low and set(low) == {tf.bfloat16}
    loss = tf.reduce_sum(tf.square(logits))
    gradients = tf.gradients(loss, tf.trainable_variables("low"))
    copy = [
        low_variable.assign(variable)
        for variable, low_variable in zip(
            tf.trainable_variables()[: len(gradients)], tf.trainable_variables("low")
        )
    ]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        session.run(copy)
        expected, values, slopes = session.run([exact, logits, gradients])
    # bfloat16 keeps 8 bits; each layer normalises, so that errors of a few units of
    # 2^-9 add up over the layers instead of growing.
    scale = np.std(expected)
    assert np.sqrt(np.mean(np.square(values - expected))) < 0.1 * scale
    assert not np.array_equal(values, expected)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
