"""`export`: what is written is what was checked, and nothing is left half-written."""

import json

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.__main__ import main
from tests.graphs.graph_zoo import MAKERS
from tests.serving.training_graphs import random_images, run_graph, save_trained


def placeholder():
    return tf.placeholder(tf.bool, [], name="is_training")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(prefix, examples, logits of inference code on them)."""
    folder = tmp_path_factory.mktemp("trained")
    prefix, expected = save_trained(folder, MAKERS["with_fused_kernel"], placeholder)
    examples = str(folder / "examples.npz")
    np.savez(examples, images=random_images(9, [8, 5, 5, 3]))
    return prefix, examples, expected


def test_a_frozen_graph_by_the_command_line(trained, tmp_path, capsys):
    prefix, examples, expected = trained
    out = tmp_path / "model.pb"
    code = main(
        ["export", prefix, str(out), "--to", "frozen", "--outputs", "logits/logits"]
        + ["--examples", examples]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "is_training is False" in printed
    assert "those of the graph before" in printed
    assert "the batch size is any" in printed
    graph_def = tf.GraphDef.FromString(out.read_bytes())
    taken = {source.split(":")[0] for node in graph_def.node for source in node.input}
    assert {node.name for node in graph_def.node} - taken == {"logits/logits"}
    x = np.load(examples)["images"]
    for size in (8, 3):
        (found,) = run_graph(graph_def, {"images": x[:size]}, ["logits/logits"])
        np.testing.assert_allclose(found, expected[:size], rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "model.pb.json").read_text(encoding="utf-8"))
    assert described["inputs"][0]["shape"] == [None, 5, 5, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pb", "model.pb.json"]


def test_a_saved_model(trained, tmp_path):
    prefix, examples, expected = trained
    out = str(tmp_path / "model")
    made = bn_tf1.export(prefix, out, outputs=["logits/logits"], examples=examples)
    assert made.format == "saved_model"
    with tf.Graph().as_default(), tf.Session() as session:
        meta = tf.saved_model.loader.load(session, ["serve"], out)
        signature = meta.signature_def["serving_default"]
        found = session.run(
            signature.outputs["logits"].name,
            {signature.inputs["images"].name: np.load(examples)["images"]},
        )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_written_over(trained, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists, and nothing is written over"):
        bn_tf1.export(trained[0], str(tmp_path / "there"))


def test_the_list_tells_inputs_labels_outputs_and_mode(trained, capsys):
    assert main(["export", trained[0] + ".meta", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "mode: is_training = 0" in printed
    assert "inputs:\n  images float32 [8, 5, 5, 3]" in printed
    assert "labels:\n  labels int64 [?]" in printed
    assert "outputs:\n  logits/logits float32 [8, 3]" in printed


def test_recalibrated_on_the_way(trained, tmp_path):
    """The statistics are those of all examples, whatever the batches; float64 NumPy."""
    prefix, examples, _ = trained
    out = tmp_path / "model.pb"
    made = bn_tf1.export(
        prefix,
        str(out),
        to="frozen",
        outputs=["logits/logits", "conv/Conv2D"],
        examples=examples,
        recalibrate=True,
    )
    assert "1 layers have statistics of 8 examples" in made.changed
    graph_def = tf.GraphDef.FromString(out.read_bytes())
    x = np.load(examples)["images"]
    (y,) = run_graph(graph_def, {"images": x}, ["conv/Conv2D"])
    constants = {
        node.name: tf.make_ndarray(node.attr["value"].tensor)
        for node in graph_def.node
        if "of_examples" in node.name
    }
    y = y.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(constants["bn/of_examples/mean"], y.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        constants["bn/of_examples/variance"], y.var(0), rtol=1e-5
    )


@pytest.mark.parametrize("fold", [False, True])
def test_the_bank_that_is_set(tmp_path, session, fold):
    x = tf.placeholder(tf.float32, [None, 4], "x")
    bank = tf.placeholder(tf.int32, [], "bank")
    is_training = tf.placeholder(tf.bool, [], "is_training")
    h = tf.matmul(x, tf.get_variable("kernel", [4, 3]))
    y = bn_tf1.batch_norm(
        h, is_training, bank=bank, banks=3, bank_affine=True, name="bn"
    )
    tf.nn.relu(y, name="out")
    session.run(tf.global_variables_initializer())
    for i, variable in enumerate(tf.global_variables()):
        variable.load(np.random.RandomState(i).uniform(1, 2, variable.shape), session)
    prefix = tf.train.Saver().save(session, str(tmp_path / "model"))
    data = random_images(0, [5, 4])
    for number in (0, 2):
        expected = session.run("out:0", {x: data, bank: number, is_training: False})
        path = str(tmp_path / f"{number}.pb")
        bn_tf1.export(
            prefix,
            path,
            to="frozen",
            outputs=["out"],
            settings={"bank": number},
            fold=fold,
        )
        with open(path, "rb") as file:
            graph_def = tf.GraphDef.FromString(file.read())
        assert fold != any(
            "Rsqrt" in n.op or "BatchNorm" in n.op for n in graph_def.node
        )
        (found,) = run_graph(graph_def, {"x": data}, ["out"])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
