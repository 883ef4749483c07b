"""What a model is checked for: a wrong number is refused, and nothing is waited for long."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.graphs.rewriting.editable_graph import EditableGraph
from bn_tf1.serving.checking import measure, read_examples
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.graph_sources import open_source
from bn_tf1.serving.isolated_run import Isolated
from bn_tf1.serving.preparing import Wishes, prepare
from tests.graphs.graph_zoo import (
    convolution,
    loss_of,
    make_train_op,
    with_fused_kernel,
)

LIMIT_SECS = 300.0


def amplified(channels=3):
    """Images near 1, of which a difference by a millionth is made one by a hundredth."""
    images = tf.placeholder(tf.float32, [None, 5, 5, channels], name="images")
    return (images - 1.0) * 1e4


def example_images(count):
    noise = np.random.RandomState(4).normal(size=[count, 5, 5, 3])
    return (1 + 1e-4 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def amplifying(tmp_path_factory):
    """A training graph whose statistics are those of 20 steps."""
    prefix = str(tmp_path_factory.mktemp("amplifying") / "model.ckpt")
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        is_training = tf.placeholder(tf.bool, [], name="is_training")
        y = with_fused_kernel(convolution(amplified()), is_training, epsilon=1e-3)
        train_op = make_train_op(loss_of(y))
        session.run(tf.global_variables_initializer())
        feed = {"images:0": example_images(6), "labels:0": [0, 1, 2, 0, 1, 2]}
        for _ in range(20):
            session.run(train_op, {is_training: True, **feed})
        tf.train.Saver().save(session, prefix)
    return prefix


def constants_of(graph, name):
    return [n for n in graph.nodes if name in n and graph.nodes[n].op == "Const"]


def with_another_epsilon(graph):
    (kernel,) = (n for n in graph.nodes.values() if "FusedBatchNorm" in n.op)
    kernel.attr["epsilon"].f = 1e-5


def with_a_mean_off_by_a_hundredth(graph):
    (name,) = constants_of(graph, "moving_mean")
    value = tf.make_ndarray(graph.nodes[name].attr["value"].tensor).copy()
    value[np.abs(value).argmax()] *= 1.01
    graph.make_constant(name, value)


def with_other_statistics(graph):
    (name,) = constants_of(graph, "moving_variance")
    value = tf.make_ndarray(graph.nodes[name].attr["value"].tensor)
    graph.make_constant(name, value[::-1].copy())


MISTAKES = [
    lambda graph: None,
    with_another_epsilon,
    with_a_mean_off_by_a_hundredth,
    with_other_statistics,
]


def test_a_wrong_number_is_found_also_where_the_network_amplifies_rounding(amplifying):
    told = []
    with Isolated(LIMIT_SECS) as isolated:
        for mistake in MISTAKES:
            model = prepare(open_source(amplifying), Wishes(outputs=["logits/logits"]))
            mistake(model.graph)
            given = read_examples({"images": example_images(8)}, model.inputs)
            try:
                told.append(measure(model, None, given, isolated).notes[2])
            except ExportError as error:
                told.append(str(error))
    assert "the outputs are those of the graph before" in told[0]
    for refused in told[1:]:
        assert (
            "those of the graph before, each part given the same values, diff"
            in refused
        )


def saved(folder, build, statistics=None):
    prefix = str(folder / "model.ckpt")
    with tf.Graph().as_default(), tf.Session() as session:
        build()
        session.run(tf.global_variables_initializer())
        if statistics is not None:
            session.run(
                [_set("moving_mean", statistics[0]), _set("variance", statistics[1])]
            )
        tf.train.Saver().save(session, prefix)
    return prefix


def _set(name, number):
    (variable,) = (v for v in tf.global_variables() if v.op.name.endswith(name))
    return tf.assign(variable, tf.fill(variable.shape, number))


def endless():
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    w = tf.get_variable("w", [3, 2])
    y = tf.while_loop(lambda y: tf.reduce_sum(y) < np.inf, tf.tanh, [tf.matmul(x, w)])
    tf.identity(y, name="logits")


def test_a_graph_that_never_comes_back_is_left(tmp_path):
    with pytest.raises(ExportError, match="did not come back within 3 seconds"):
        bn_tf1.export(
            saved(tmp_path, endless),
            str(tmp_path / "out"),
            outputs=["logits"],
            examples={"x": np.ones([2, 3], np.float32)},
            time_limit_secs=3,
        )
    assert not list(tmp_path.glob("out*"))


def of_batch_size_1():
    """A network that was trained with the statistics of its one image, and no updates."""
    images = tf.placeholder(tf.float32, [1, 5, 5, 3], name="images")
    make_train_op(loss_of(with_fused_kernel(convolution(images), True)), updates=[])


def test_statistics_that_nobody_updated_are_not_taken(tmp_path):
    source, out = saved(tmp_path, of_batch_size_1), str(tmp_path / "model.pb")
    images = np.random.RandomState(2).uniform(size=[6, 5, 5, 3]).astype(np.float32)
    options = {
        "to": "frozen",
        "outputs": ["logits/logits"],
        "examples": {"images": images},
    }
    with pytest.raises(ExportError, match="of bn were never updated.*--recalibrate"):
        bn_tf1.export(source, out, **options)
    made = bn_tf1.export(source, out, recalibrate=True, **options)
    assert made.inputs[0].shape == (None, 5, 5, 3)
    assert any("the rest of its batch by" in text for text in made.checks)


@pytest.mark.parametrize("name", ["rate", "keep_prob"])
def test_the_rate_of_a_dropout_for_good_need_not_be_given(name, tmp_path):
    def build():
        images = tf.placeholder(tf.float32, [None, 5, 5, 3], name="images")
        is_training = tf.placeholder(tf.bool, [], name="is_training")
        given = tf.placeholder(tf.float32, [], name=name)
        y = with_fused_kernel(convolution(images), is_training)
        rate = given if name == "rate" else 1 - given
        make_train_op(loss_of(tf.nn.dropout(y, rate=rate)))

    source, out = saved(tmp_path, build), str(tmp_path / "model.pb")
    images = np.random.RandomState(2).uniform(size=[8, 5, 5, 3]).astype(np.float32)
    options = {"outputs": ["logits/logits"], "examples": {"images": images}}
    made = bn_tf1.export(source, out, to="frozen", **options)
    assert any("without its dropout, to" in text for text in made.checks)


def with_a_rate_in_training():
    images = tf.placeholder(tf.float32, [None, 5, 5, 3], name="images")
    is_training = tf.placeholder(tf.bool, [], name="is_training")
    rate = 1 - tf.placeholder(tf.float32, name="keep_prob")
    y = with_fused_kernel(convolution(images), is_training)
    # In a Switch, which takes its input even where its branch is not taken.
    make_train_op(
        loss_of(tf.cond(is_training, lambda: tf.nn.dropout(y, rate=rate), lambda: y))
    )


def test_a_placeholder_that_only_training_needs_is_no_input(tmp_path):
    source, out = saved(tmp_path, with_a_rate_in_training), str(tmp_path / "model.pb")
    images = np.random.RandomState(2).uniform(size=[8, 5, 5, 3]).astype(np.float32)
    options = {"outputs": ["logits/logits"], "examples": {"images": images}}
    made = bn_tf1.export(source, out, to="frozen", **options)
    assert [c.tensor for c in made.inputs] == ["images:0"]
    assert any("those of the graph before" in text for text in made.checks)


def of_batch_size_4():
    images = tf.placeholder(tf.float32, [4, 5, 5, 3], name="images")
    make_train_op(loss_of(with_fused_kernel(convolution(images), True)))


def test_statistics_over_examples_that_do_not_fill_a_fixed_batch(tmp_path):
    source, out = saved(tmp_path, of_batch_size_4), str(tmp_path / "model.pb")
    images = np.random.RandomState(2).uniform(size=[6, 5, 5, 3]).astype(np.float32)
    with pytest.raises(ExportError, match="6 is no multiple of 4: give 4 to recal"):
        bn_tf1.export(
            source,
            out,
            to="frozen",
            outputs=["logits/logits"],
            batch="keep",
            examples={"images": images},
            recalibrate=True,
        )


@pytest.mark.parametrize("batch", [None, "keep"])
def test_a_prediction_that_depends_on_its_batch_is_refused(batch, tmp_path):
    def build():
        x = tf.placeholder(tf.float32, [4, 3], name="x")
        y = tf.matmul(x, tf.get_variable("w", [3, 2]))
        tf.subtract(y, tf.reduce_mean(y, 0), name="logits")

    with pytest.raises(
        ExportError, match="depends on the rest of its batch: logits ch"
    ):
        bn_tf1.export(
            saved(tmp_path, build),
            str(tmp_path / "out"),
            outputs=["logits"],
            examples={"x": np.random.RandomState(5).normal(size=[4, 3])},
            batch=batch,
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [tf.float32, tf.uint8])
def test_one_example_shows_that_a_prediction_depends_on_its_batch(dtype, tmp_path):
    def build():
        x = tf.placeholder(dtype, [None, 4, 4, 1], name="x")
        y = tf.reshape(tf.cast(x, tf.float32), [-1, 16]) * tf.get_variable("w", [16])
        # Of all the batch, as a layer takes it: it is the same in any order of pixels.
        tf.subtract(y, tf.reduce_mean(y), name="logits")

    with pytest.raises(ExportError, match="depends on the rest of its batch: logits"):
        bn_tf1.export(
            saved(tmp_path, build),
            str(tmp_path / "out"),
            outputs=["logits"],
            examples={"x": np.arange(16).reshape([1, 4, 4, 1]).astype(np.uint8)},
        )


def of_ids(x):
    table = tf.get_variable("table", [50, 4])
    return tf.reduce_sum(tf.gather(table, tf.cast(x, tf.int32)), 1)


def of_odds(x):
    return tf.log(x) - tf.log1p(-x)


DOMAINS = {
    "ids": (of_ids, tf.float32, [[49, 3, 2]]),
    "probabilities": (of_odds, tf.float32, [[0.95, 0.2, 0.6]]),
    "one_value": (of_odds, tf.float32, [[0.95, 0.95, 0.95]]),
}


@pytest.mark.parametrize("case", sorted(DOMAINS))
def test_examples_that_are_made_are_inputs_of_the_model(case, tmp_path):
    layer, dtype, given = DOMAINS[case]

    def build():
        tf.identity(layer(tf.placeholder(dtype, [None, 3], name="x")), name="logits")

    made = bn_tf1.export(
        saved(tmp_path, lambda: [build(), tf.get_variable("other", [])]),
        str(tmp_path / "model.pb"),
        to="frozen",
        outputs=["logits"],
        examples={"x": np.array(given, dtype.as_numpy_dtype)},
    )
    (told,) = (text for text in made.checks if "the rest of its batch" in text)
    assert ("examples that are all alike" in told) == (len(set(given[0])) == 1)


def test_text_beyond_ascii(tmp_path):
    with tf.Graph().as_default() as graph:
        tf.identity(tf.placeholder(tf.string, [None], name="x"), name="y")
    feed = {"x": np.array(["\u00fcber", b"\xfe", "a"], object)}
    with Isolated(LIMIT_SECS) as isolated:
        ((found,),) = isolated.run(EditableGraph(graph.as_graph_def()), [feed], ["y"])
    assert found.tolist() == ["\u00fcber".encode(), b"\xfe", b"a"]


def steps_of_a_sequence():
    """Activations of two steps each of which takes the one before, and dropout for good."""
    x = tf.placeholder(tf.float32, [4, 5, 5, 3], name="images")
    y = with_fused_kernel(convolution(x), True, epsilon=1e-3)
    y = tf.reshape(y, [2, 2, 5, 5, 4])
    y = tf.reshape(tf.cumsum(y, axis=1), [4, 5, 5, 4])
    # Whatever weights are drawn, the logits' relu leaves something of it.
    make_train_op(loss_of(tf.nn.dropout(tf.abs(y), rate=0.5)))


@pytest.mark.parametrize("batch", ["keep", "whole"])
def test_a_batch_that_is_one_example_in_all(batch, tmp_path):
    options = {
        "outputs": ["logits/logits"],
        "examples": {"images": example_images(4)},
        "batch": batch,
    }
    source = saved(tmp_path, steps_of_a_sequence, statistics=(0.5, 2.0))
    if batch == "keep":
        with pytest.raises(ExportError, match="of its batch.*--batch whole"):
            bn_tf1.export(source, str(tmp_path / "out"), **options)
        return
    made = bn_tf1.export(source, str(tmp_path / "out"), **options)
    assert made.inputs[0].shape == (4, 5, 5, 3)
    assert any(text.startswith("a batch is one example in all") for text in made.checks)
    assert any(
        "of 1 layers in plain formulas and without its dropout" in text
        for text in made.checks
    )


def leaky():
    """Convolution, layer and leaky ReLU, which 2.21 makes one kernel where it can."""
    y = tf.placeholder(tf.float32, [None, 8, 8, 3], name="images")
    for number in range(3):
        with tf.variable_scope(f"block_{number}"):
            y = with_fused_kernel(convolution(y), False, epsilon=1e-3)
            y = tf.nn.leaky_relu(y, 0.1)
    tf.identity(y, name="logits")


def test_a_folded_graph_is_compared_part_by_part(tmp_path):
    made = bn_tf1.export(
        saved(tmp_path, leaky),
        str(tmp_path / "model.pb"),
        to="frozen",
        outputs=["logits"],
        examples={"images": np.random.RandomState(6).normal(size=[4, 8, 8, 3])},
        fold=True,
    )
    assert "3 of 3 layers are folded" in made.changed
    assert any(text.startswith("folding changed the outputs") for text in made.checks)
