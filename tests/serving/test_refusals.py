"""Graphs of which no model can be made that is surely right: a sentence, and nothing else.

Each is a training graph with one fault, built here; `prepare` must refuse it by name.
"""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.serving.checking import read_examples
from bn_tf1.serving.graph_sources import open_source
from bn_tf1.serving.preparing import ExportError, Wishes, prepare
from tests.graphs.graph_zoo import convolution, images, loss_of, make_train_op, with_nn


def saved(folder, build, saver=tf.train.Saver):
    """The .meta file of a training graph; `build` gives the activations."""
    prefix = str(folder / "model.ckpt")
    with tf.Graph().as_default(), tf.Session() as session:
        make_train_op(loss_of(build()))
        session.run(tf.global_variables_initializer())
        saver().save(session, prefix)
    return prefix + ".meta"


def refused(meta, **wishes):
    with pytest.raises(ValueError) as error:
        wishes.setdefault("outputs", ["logits/logits"])
        prepare(open_source(meta), Wishes(**wishes))
    assert "\n" not in str(error.value).split("\n  ")[0]
    return str(error.value)


def plain():
    return with_nn(convolution(images()), True)


def without_updates():
    x = convolution(images())
    mean, variance = tf.nn.moments(x, [0, 1, 2])
    gamma = tf.get_variable("bn/gamma", [4], initializer=tf.ones_initializer())
    return tf.nn.batch_normalization(x, mean, variance, None, gamma, 1e-3)


def test_a_layer_without_moving_statistics(tmp_path):
    told = refused(saved(tmp_path, without_updates))
    assert "bn take the statistics of the batch" in told
    assert "--recalibrate" in told


def test_variables_that_are_not_in_the_checkpoint(tmp_path):
    def of_trainable():
        return tf.train.Saver(tf.trainable_variables())

    told = refused(saved(tmp_path, plain, of_trainable))
    assert "bn/moving_mean, bn/moving_variance" in told
    assert "--checkpoint" in told


def test_no_checkpoint_at_all(tmp_path):
    meta = saved(tmp_path, plain)
    for path in tmp_path.glob("model.ckpt.*"):
        if path.suffix != ".meta":
            path.unlink()
    assert "no checkpoint beside it, and 6 variables" in refused(meta)


def test_an_output_that_depends_on_a_label(tmp_path):
    outputs = ["sparse_softmax_cross_entropy_loss/xentropy/xentropy"]
    told = refused(saved(tmp_path, plain), outputs=outputs)
    assert "depend on labels int64 [?], which looks like a label" in told


def test_a_python_function(tmp_path):
    def build():
        x = tf.py_func(lambda v: v, [convolution(images())], tf.float32, name="mine")
        return with_nn(tf.ensure_shape(x, [8, 5, 5, 4]), True)

    told = refused(saved(tmp_path, build))
    assert "'mine', a Python function" in told
    assert "--inputs mine" in told


def test_noise_that_nothing_turns_off(tmp_path):
    def build():
        y = plain()
        return y + tf.random_normal(tf.shape(y), name="noise")

    assert "random numbers ('noise/RandomStandardNormal'" in refused(
        saved(tmp_path, build)
    )


def test_a_number_that_nobody_gives(tmp_path):
    def build():
        return plain() * tf.placeholder(tf.float32, [], name="temperature")

    meta = saved(tmp_path, build)
    assert "`--set temperature=VALUE`" in refused(meta)
    model = prepare(
        open_source(meta), Wishes(None, ["logits/logits"], {"temperature": 2})
    )
    assert [c.tensor for c in model.inputs] == ["images:0"]


@pytest.mark.parametrize(
    "wishes, told",
    [
        ({"outputs": ["logit"]}, "`--outputs logit` names no tensor"),
        ({"inputs": ["image"]}, "`--inputs image` names no tensor"),
        ({"inputs": ["labels"]}, "`--inputs labels:0`: no output needs it"),
        ({"settings": {"keep": 1}}, "`--set keep` names no placeholder"),
    ],
)
def test_names_that_there_are_not(wishes, told, tmp_path):
    assert told in refused(saved(tmp_path, plain), **wishes)


def dropped(y):
    keep = tf.placeholder(tf.float32, name="keep_prob")
    return tf.nn.dropout(y, rate=1 - keep)


def test_dropout_goes_and_its_placeholder_with_it(tmp_path):
    model = prepare(
        open_source(saved(tmp_path, lambda: dropped(plain()))),
        Wishes(outputs=["logits/logits"]),
    )
    assert [c.tensor for c in model.inputs] == ["images:0"]
    assert any("dropout is taken out" in text for text in model.changed)


def test_an_input_queue_is_cut(tmp_path):
    def build():
        queue = tf.FIFOQueue(8, [tf.float32], [[5, 5, 3]], name="queue")
        queue.enqueue_many(tf.constant(np.zeros([8, 5, 5, 3], np.float32)))
        return with_nn(convolution(queue.dequeue_many(8, name="batch")), True)

    model = prepare(
        open_source(saved(tmp_path, build)), Wishes(outputs=["logits/logits"])
    )
    assert [str(c) for c in model.inputs] == ["batch float32 [8, 5, 5, 3]"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_examples_that_are_none(content, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="`--examples` .*x.npz is no .npz file"):
        read_examples(str(path), [])


def test_functions_that_are_chosen_as_the_graph_runs(tmp_path):
    def build():
        y = plain()
        index = tf.placeholder_with_default(0, [], name="index")
        return tf.switch_case(index, [lambda: y * 2.0, lambda: y * 3.0], name="choice")

    was_enabled = tf.control_flow_v2_enabled()
    tf.enable_control_flow_v2()
    try:
        meta = saved(tmp_path, build)
    finally:
        if not was_enabled:
            tf.disable_control_flow_v2()
    assert "Case), which calls choice_indexed_case_branch" in refused(meta)
    chosen = prepare(open_source(meta), Wishes(None, ["logits/logits"], {"index": 1}))
    assert not chosen.graph.graph_def().library.function


def test_a_checkpoint_of_other_sizes(tmp_path):
    meta = saved(tmp_path, plain)
    with tf.Graph().as_default(), tf.Session() as session:
        for name, shape in tf.train.list_variables(meta[: -len(".meta")]):
            tf.get_variable(name, [1] if name == "bn/gamma" else shape)
        session.run(tf.global_variables_initializer())
        other = tf.train.Saver().save(session, str(tmp_path / "other"))
    with pytest.raises(ExportError, match="'bn/gamma' is float32 .*4.*, but .* .1,"):
        prepare(open_source(meta, other), Wishes(outputs=["logits/logits"]))


def test_a_variance_below_0(tmp_path):
    meta = saved(tmp_path, plain)
    with tf.Graph().as_default(), tf.Session() as session:
        saver = tf.train.import_meta_graph(meta)
        prefix = meta[: -len(".meta")]
        saver.restore(session, prefix)
        (variance,) = (
            v for v in tf.global_variables() if v.op.name.endswith("variance")
        )
        session.run(tf.assign(variance, -variance - 1.0))
        saver.save(session, prefix, write_meta_graph=False)
    assert "bn/moving_variance has values that are below 0" in refused(meta)


def test_weights_that_are_no_numbers(tmp_path):
    def nan():
        return plain() * tf.get_variable("factor", initializer=np.float32("nan"))

    meta = saved(tmp_path, nan)
    with pytest.raises(ExportError, match="logits/logits is NaN for the examples"):
        bn_tf1.export(meta, str(tmp_path / "out"), outputs=["logits/logits"])


@pytest.mark.parametrize("batch", ["", 0])
def test_a_batch_that_is_none_of_the_ways(batch, tmp_path):
    with pytest.raises(ExportError, match=f"`batch` is {batch!r}, but must be one of"):
        bn_tf1.export("model.ckpt", str(tmp_path / "out"), outputs=["y"], batch=batch)
