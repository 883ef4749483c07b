"""`migrate_graph`: the graphs of TensorFlow 1.15 import, restore and train."""

import pathlib

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import CheckpointError, read_meta_graph
from bn_tf1.graphs.migrate import MigrationError, migrate_graph
from tests import FIXTURES

ORIGINS = ["tf_layers", "contrib", "tf_slim", "sonnet", "sonnet_v2", "tensorpack"]
ORIGINS.append("keras")
IS_2 = tf.version.VERSION.startswith("2")


def meta_of(origin):
    return str(FIXTURES / origin / "model.ckpt.meta")


@pytest.fixture
def migrated(tmp_path):
    """migrated(origin) migrates, imports and restores; returns the open session."""
    sessions = []

    def load(origin):
        target = str(tmp_path / "new.meta")
        migrate_graph(meta_of(origin), target)
        saver = tf.train.import_meta_graph(target)
        sessions.append(tf.Session())
        saver.restore(sessions[0], str(FIXTURES / origin / "model.ckpt"))
        return sessions[0]

    yield load
    for session in sessions:
        session.close()


def write(path, meta):
    path.write_bytes(meta.SerializeToString())
    return str(path)


# -------------------------------------------------------------------------------- real graphs


@pytest.mark.parametrize("origin", ORIGINS)
def test_logits_and_training_of_every_origin(origin, migrated):
    session = migrated(origin)
    inputs = np.load(str(FIXTURES / "inputs.npz"))
    values = np.load(str(FIXTURES / origin / "values.npz"))

    def feed(step, is_training):
        return {
            "images:0": inputs["images"][step],
            "labels:0": inputs["labels"][step],
            "is_training:0": is_training,
        }

    logits = session.run("logits_for_inference:0", feed(0, False))
    np.testing.assert_allclose(logits, values["logits_for_inference"], atol=1e-6)
    losses = [
        session.run(["loss:0", "train_op"], feed(step, True))[0] for step in range(10)
    ]
    np.testing.assert_allclose(losses, values["losses"], rtol=1e-5)
    for key in values.files:
        prefix, _, variable = key.partition("/")
        if prefix == "after_10_steps":
            (found,) = [v for v in tf.global_variables() if v.op.name == variable]
            np.testing.assert_allclose(session.run(found), values[key], atol=1e-5)


@pytest.mark.parametrize("origin", ["while_v1", "while_v2"])
def test_loops(origin, migrated):
    session = migrated(origin)
    values = np.load(str(FIXTURES / origin / "values.npz"))
    feed = {"images:0": values["images"]}
    losses = [session.run(["loss:0", "train_op"], feed)[0] for _ in range(3)]
    np.testing.assert_allclose(losses, values["losses"], rtol=1e-5)


@pytest.mark.skipif(not IS_2, reason="1.15 imports its own graphs")
@pytest.mark.parametrize("origin", ["tf_layers", "contrib", "sonnet", "while_v1"])
def test_the_original_does_not_import(origin):
    with pytest.raises(ValueError, match="FusedBatchNormGradV3' has an _output_shapes"):
        tf.train.import_meta_graph(meta_of(origin))


# -------------------------------------------------------------------------------- what changes


def gradients_of_fused_batch_norm(meta):
    """Their NodeDefs by name, those in a function as function:node."""
    found = {node.name: node for node in meta.graph_def.node}
    for function in meta.graph_def.library.function:
        prefix = function.signature.name + ":"
        found.update({prefix + node.name: node for node in function.node_def})
    return {n: node for n, node in found.items() if node.op == "FusedBatchNormGradV3"}


@pytest.mark.parametrize("origin", ["tf_layers", "while_v1", "while_v2"])
def test_the_changes_are_listed_and_nothing_else_changes(origin, tmp_path):
    target = str(tmp_path / "new.meta")
    migration = migrate_graph(meta_of(origin), target)
    old, new = read_meta_graph(meta_of(origin)), read_meta_graph(target)
    gradients = gradients_of_fused_batch_norm(old)
    assert len(gradients) == 2
    assert sorted(migration.changed) == sorted(gradients)
    if origin == "while_v2":
        assert all(name.startswith("while_body_") for name in gradients)
    for name, node in gradients.items():
        assert f"removed _output_shapes of {name}" in str(migration)
        del node.attr["_output_shapes"]
    assert f"TensorFlow {tf.version.VERSION} imports the result" in str(migration)
    assert old == new


def test_a_graph_without_batch_norm(tmp_path):
    tf.get_variable("w", [2])
    source = write(tmp_path / "old.meta", tf.train.export_meta_graph())
    migration = migrate_graph(source, str(tmp_path / "new.meta"))
    assert migration.changed == ()
    assert "nothing had to be changed" in str(migration)
    assert read_meta_graph(str(tmp_path / "new.meta")) == read_meta_graph(source)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("inside", ["graph", "function"])
def test_unknown_operations_are_named(inside, tmp_path):
    origin = "tf_layers" if inside == "graph" else "while_v2"
    meta = read_meta_graph(meta_of(origin))
    function = ""
    nodes = meta.graph_def.node
    if inside == "function":
        body = max(meta.graph_def.library.function, key=lambda f: len(f.node_def))
        nodes, function = body.node_def, body.signature.name + ":"
    nodes[0].op = "OpOfSomebody"
    nodes[2].op = "OpOfNobody"
    source = write(tmp_path / "old.meta", meta)
    with pytest.raises(MigrationError) as caught:
        migrate_graph(source, str(tmp_path / "new.meta"))
    for node in (nodes[0], nodes[2]):
        assert f"{function}{node.name} ({node.op})" in str(caught.value)
    assert f"that TensorFlow {tf.version.VERSION} does not know" in str(caught.value)
    assert not (tmp_path / "new.meta").exists()


def test_another_reason_names_the_node(tmp_path):
    meta = read_meta_graph(meta_of("tf_layers"))
    (node,) = [n for n in meta.graph_def.node if n.name == "MatMul"]
    node.input[0] = "gone"
    source = write(tmp_path / "old.meta", meta)
    with pytest.raises(MigrationError, match="cannot be imported .*MatMul") as caught:
        migrate_graph(source, str(tmp_path / "new.meta"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new.meta").exists()


@pytest.mark.parametrize("name", ["old.meta", "other.meta"])
def test_nothing_is_written_over(name, tmp_path):
    data = pathlib.Path(meta_of("while_v1")).read_bytes()
    (tmp_path / "old.meta").write_bytes(data)
    (tmp_path / "other.meta").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="exists, and nothing is written over"):
        migrate_graph(str(tmp_path / "old.meta"), str(tmp_path / name))
    assert (tmp_path / "old.meta").read_bytes() == data
    assert (tmp_path / "other.meta").read_bytes() == b"other"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "old.meta cannot be read: No such file"),
        (b"\x0a\xffgarbage", "old.meta is no MetaGraphDef"),
        (b"", "old.meta is no MetaGraphDef with a graph"),
    ],
)
def test_what_is_no_meta_file(content, message, tmp_path):
    if content is not None:
        (tmp_path / "old.meta").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        migrate_graph(str(tmp_path / "old.meta"), str(tmp_path / "new.meta"))


def test_a_destination_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="no directory .*: make it"):
        migrate_graph(meta_of("while_v1"), str(tmp_path / "folder" / "new.meta"))
