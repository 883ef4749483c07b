"""Workers as processes on the loopback address: the numbers, and the ends of faults."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.doctor.lint import lint_facts
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.view import view_of
from bn_tf1.workers import collectives
from bn_tf1.workers.cluster import Workers
from bn_tf1.workers.handshake import LOST
from tests import ROOT
from tests.workers import worker_program


def launch(folder, fault=""):
    command = [sys.executable, "-m", "bn_tf1", "launch", "--workers=2", "--"]
    command += [sys.executable, "-m", "tests.workers.worker_program"]
    return subprocess.run(
        [*command, str(folder), fault],
        cwd=str(ROOT),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_workers_have_equal_bits_and_one_process_s_numbers(tmp_path):
    run = launch(tmp_path)
    assert run.returncode == 0, run.stderr
    chief, other = (dict(np.load(str(tmp_path / f"{i}.npz"))) for i in (0, 1))
    expected = worker_program.train(Workers(["localhost:1"], 0))
    assert len(expected) == 14
    for name, value in expected.items():
        key = name.replace("/", "|")
        assert chief[key].tobytes() == other[key].tobytes(), name
        # Rounding of three steps in float64.
        np.testing.assert_allclose(chief[key], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "fault, code, message",
    [
        ("alone", LOST, "worker 1 and the chief made runs with other collectives"),
        ("kill", 137, r"worker 1 at 127.0.0.1:\d+ is gone: "),
    ],
)
def test_a_fault_of_one_ends_all(fault, code, message, tmp_path):
    run = launch(tmp_path, fault)
    assert run.returncode == code
    assert not list(tmp_path.iterdir())
    assert re.search(message, run.stderr), run.stderr


# ----------------------------------------------------------------------- without processes


def test_tf_config(monkeypatch):
    def described(text):
        monkeypatch.setenv(
            "TF_CONFIG", text if isinstance(text, str) else json.dumps(text)
        )
        workers = Workers.from_environment()
        return workers and (workers.hosts, workers.index)

    hosts = ["a:1", "b:2"]
    task = {"type": "worker", "index": 1}
    assert described({"cluster": {"worker": hosts}, "task": task}) == (hosts, 1)
    with_chief = {"cluster": {"chief": ["a:1"], "worker": ["b:2"]}}
    task = {"type": "worker", "index": 0}
    assert described({**with_chief, "task": task}) == (hosts, 1)
    task = {"type": "chief", "index": 0}
    assert described({**with_chief, "task": task}) == (hosts, 0)
    assert described("{}") is None
    assert described("") is None
    for wrong in (
        "nonsense",
        "[]",
        {"cluster": {"worker": hosts, "ps": ["c:3"]}, "task": task},
        {"cluster": {"worker": hosts}, "task": {"type": "evaluator", "index": 0}},
    ):
        with pytest.raises(ValueError, match="TF_CONFIG is '"):
            described(wrong)


@pytest.mark.parametrize(
    "hosts, index, options, message",
    [
        ("a:1", 0, {}, "`hosts` is 'a:1', but must be a list"),
        (["a"], 0, {}, "`hosts` has 'a', but must have host:port"),
        (["a:1", "a:1"], 0, {}, "must not name an address twice"),
        (["a:1", "b:1"], 2, {}, r"`index` is 2, but must lie in \[0, 2\)"),
        (["a:1"], 0, {"join_secs": 0}, "`join_secs` is 0, but must be > 0 seconds"),
    ],
)
def test_wrong_arguments(hosts, index, options, message):
    with pytest.raises(ValueError, match=message):
        Workers(hosts, index, **options)


def test_rows_and_groups():
    workers = [Workers(["a:1", "b:1", "c:1"], i) for i in range(3)]
    assert [w.rows(128) for w in workers] == [(0, 42), (42, 85), (85, 128)]
    four = [Workers([f"a:{p}" for p in range(1, 5)], i) for i in range(4)]
    pairs = [w.group(2)._group for w in four]
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]
    assert {four[0].group(4)._group.key, four[0].group(1)._group.key}.isdisjoint(
        {pairs[0].key, pairs[2].key}
    )
    with pytest.raises(ValueError, match="`size` is 3, but must divide the 4 workers"):
        four[0].group(3)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sync": True}, TypeError, "`sync` is True, but must be a bn_tf1.Workers"),
        ({"ghost_batch_size": 2}, ValueError, "`sync` .* None with `ghost_batch_size`"),
        ({"kernel": "fused"}, ValueError, "the fused kernel has no .*joint statistics"),
    ],
)
def test_what_joint_statistics_refuse(options, error, message):
    x = tf.placeholder(tf.float32, [8, 4])
    options = {"sync": Workers(["a:1"], 0), **options}
    with pytest.raises(error, match=message):
        bn_tf1.batch_norm(x, True, **options)


@pytest.mark.parametrize(
    "drop_in",
    [
        lambda x, sync: bn_tf1.layers.batch_normalization(x, training=True, sync=sync),
        lambda x, sync: bn_tf1.slim.batch_norm(x, is_training=True, sync=sync),
    ],
)
def test_the_drop_ins_join_statistics_too(drop_in):
    x = tf.placeholder(tf.float32, [8, 4])
    y = drop_in(x, Workers(["a:1", "b:1"], 0))
    tf.gradients(y, x)
    held = collectives.listed(tf.get_default_graph())
    assert [text.split(" in ")[0] for text in held] == [
        "CollectiveGather 1 of float32 [18], 2",
        "CollectiveGather 2 of float32 [16], 2",
    ]


@pytest.mark.parametrize(
    "towers, weighted", [(False, False), (False, True), (True, False)]
)
def test_the_doctor_knows_joint_statistics(towers, weighted):
    x = tf.placeholder(tf.float32, [8, 6, 6, 4])
    kernel = tf.get_variable("kernel", [1, 1, 4, 4])
    x = tf.nn.conv2d(x, kernel, [1, 1, 1, 1], "SAME")
    workers = Workers(["a:1", "b:1"], 0)
    options = {"weights": tf.ones([8])} if weighted else {}
    y = bn_tf1.batch_norm([x, x] if towers else x, True, sync=workers, **options)
    loss = tf.reduce_mean(tf.square(y))
    bn_tf1.make_train_op(loss, tf.train.AdamOptimizer(1e-3), workers=workers)
    facts = Facts(view_of(tf.get_default_graph()))
    (layer,) = facts.graph_layers()
    assert (layer.name, layer.mode, layer.decay) == ("batch_norm", "training", 0.99)
    assert not [f for f in lint_facts(facts) if f.gravity != "note"]


def test_second_derivatives_are_refused():
    x = tf.placeholder(tf.float32, [8, 4])
    y = bn_tf1.batch_norm(x, True, sync=Workers(["a:1"], 0))
    (dx,) = tf.gradients(tf.reduce_sum(y**2), x)
    with pytest.raises(LookupError, match="no second derivatives"):
        tf.gradients(dx, x)


def test_penalty_without_workers():
    loss = tf.reduce_sum(tf.get_variable("v", [2]))
    with pytest.raises(ValueError, match="without `workers` they must be None"):
        bn_tf1.make_train_op(loss, tf.train.GradientDescentOptimizer(1.0), penalty=loss)
