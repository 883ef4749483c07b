"""Graph files of our layers, trained on by programs that import `bn_tf1` and that do not."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.graphs.migrate import migrate_graph
from tests import ROOT

SHAPE = (16, 6, 6, 32)
BATCH = np.random.RandomState(2).normal(1, 2, SHAPE).astype(np.float32)
OPTIONS = {
    "fused": {"kernel": "fused"},
    "composed": {"kernel": "composed"},
    "nchw": {"axis": 1},
    "weights": {"weights": np.arange(16, dtype=np.float32)},
}


def layer(name, x):
    if name == "loop":
        return tf.while_loop(
            lambda step, h: step < 2,
            lambda step, h: (
                step + 1,
                bn_tf1.batch_norm(
                    h, True, kernel="composed", update="in_place", name="bn"
                ),
            ),
            [0, x],
        )[1]
    if name == "tensor":
        mode = tf.placeholder_with_default(True, [])
        return bn_tf1.batch_norm(x, mode, kernel="composed")
    return bn_tf1.batch_norm(x, True, **OPTIONS[name])


def slopes_of(loss):
    return tf.gradients(loss, tf.trainable_variables())


def write(name, path):
    """Exports the graph of a layer; returns the gradients of another graph like it.

    TensorFlow 2 cannot differentiate a cond twice in a process, under the name it had.
    """
    for _ in range(2):
        with tf.Graph().as_default(), tf.Session() as session:
            x = tf.constant(BATCH) * tf.get_variable("w", initializer=np.ones(32, "f"))
            if name == "nchw":
                x = tf.transpose(x, [0, 3, 1, 2])
            y = layer(name, x)
            loss = tf.reduce_mean(y * tf.sin(3 * y))
            tf.add_to_collection("loss", loss)
            if not path.exists():
                tf.train.export_meta_graph(str(path), strip_default_attrs=True)
                continue
            slopes = slopes_of(loss)
            session.run(tf.global_variables_initializer())
            return session.run(slopes)


@pytest.mark.usefixtures("control_flow")
@pytest.mark.parametrize("name", [*OPTIONS, "tensor", "loop"])
def test_a_migrated_graph_has_tensorflows_own_gradients(name, tmp_path):
    if name == "loop":
        tf.enable_resource_variables()
    try:
        expected = write(name, tmp_path / "old.meta")
    finally:
        tf.disable_resource_variables()
    migration = migrate_graph(str(tmp_path / "old.meta"), str(tmp_path / "new.meta"))
    by_hand = name != "fused" or tf.version.VERSION.startswith("1.")
    assert ("own gradient" in str(migration)) == by_hand
    with tf.Graph().as_default() as graph, tf.Session() as session:
        tf.train.import_meta_graph(str(tmp_path / "new.meta"))
        definition = graph.as_graph_def()
        assert b"bn_tf1." not in definition.SerializeToString()
        slopes = slopes_of(tf.get_collection("loss")[0])
        session.run(tf.global_variables_initializer())
        for one, other in zip(session.run(slopes), expected):
            np.testing.assert_allclose(
                one, other, rtol=0, atol=2e-4 * np.abs(other).max() + 1e-7
            )


PROGRAM = """
import sys
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
for way in ("new", "old"):
    if way == "old":
        import bn_tf1
    for name in sys.argv[1:]:
        with tf.Graph().as_default(), tf.Session() as session:
            tf.train.import_meta_graph(f"{name}.{way}.meta")
            loss = tf.get_collection("loss")[0]
            slopes = tf.gradients(loss, tf.trainable_variables())
            session.run(tf.global_variables_initializer())
            np.savez(f"{name}.{way}.npz", *session.run(slopes))
assert "bn_tf1" in sys.modules
"""


def test_another_process_trains_them_on(tmp_path):
    """Without `bn_tf1` after `migrate_graph`, and with it the file as it is."""
    names = ["composed", "nchw"]
    expected = {name: write(name, tmp_path / f"{name}.old.meta") for name in names}
    for name in names:
        old, new = (str(tmp_path / f"{name}.{way}.meta") for way in ("old", "new"))
        migrate_graph(old, new)
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append({str(ROOT)!r})\n" + PROGRAM,
        ]
        + names,
        cwd=str(tmp_path),
        check=True,
    )
    for name in names:
        for way in ("new", "old"):
            found = np.load(str(tmp_path / f"{name}.{way}.npz"))
            for key, other in zip(found.files, expected[name]):
                allowed = 2e-4 * np.abs(other).max() + 1e-7
                np.testing.assert_allclose(found[key], other, rtol=0, atol=allowed)
