"""Set-up of every test: TensorFlow in graph mode, a fresh graph for each test.

The library itself changes no global state, so that the tests do it, once, here.
Nothing is filtered: what `bn_tf1` logs or warns about stays visible.
"""

import os
import re

# C++ information lines only; Python warnings and errors are left alone. It must be
# set before TensorFlow is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.statistics import plan

tf.disable_v2_behavior()


@pytest.fixture(autouse=True)
def graph():
    """A fresh default graph with a fixed seed, for this test alone."""
    with tf.Graph().as_default() as fresh:
        tf.set_random_seed(1)
        yield fresh


@pytest.fixture(params=["small", "large"][tf.version.VERSION.startswith("1.") :])
def small_and_large(request, monkeypatch):
    """The test twice: its tensors are small, and taken for large.

    On TensorFlow 1.15, which makes no difference, once.
    """
    if request.param == "large":
        monkeypatch.setattr(plan, "_SMALL", 0)


@pytest.fixture
def session(graph):
    """A session on the test's graph; the graph may grow after it was opened."""
    options = tf.ConfigProto(
        intra_op_parallelism_threads=2, inter_op_parallelism_threads=2
    )
    with tf.Session(graph=graph, config=options) as opened:
        yield opened


@pytest.fixture
def start(session):
    """start() initialises the graph's variables and returns the session."""

    def initialised():
        session.run([tf.global_variables_initializer(), tf.tables_initializer()])
        return session

    return initialised


@pytest.fixture
def variable(graph):
    """variable("batch_norm/gamma") is the graph's only variable of that name."""

    def by_name(name):
        found = [v for v in tf.global_variables() if v.op.name == name]
        names = [v.op.name for v in tf.global_variables()]
        assert len(found) == 1, f"{name} is not once in {names}"
        return found[0]

    return by_name


@pytest.fixture(params=["control_flow_v1", "control_flow_v2"])
def control_flow(request):
    """Runs a test with both implementations of tf.cond and tf.while_loop."""
    if not hasattr(tf, "enable_control_flow_v2"):
        if request.param == "control_flow_v2":
            pytest.skip("TensorFlow 1.14 has control flow v1 alone")
        yield request.param
        return
    was_v2 = tf.control_flow_v2_enabled()
    set_control_flow(request.param == "control_flow_v2")
    yield request.param
    set_control_flow(was_v2)


def set_control_flow(v2):
    if v2:
        tf.enable_control_flow_v2()
    else:
        tf.disable_control_flow_v2()


@pytest.fixture(params=["reference_variables", "resource_variables"])
def variable_kind(request):
    """Runs a test with variables by reference and by resource."""
    were_resources = tf.resource_variables_enabled()
    set_resource_variables(request.param == "resource_variables")
    yield request.param
    set_resource_variables(were_resources)


def set_resource_variables(resource):
    if resource:
        tf.enable_resource_variables()
    else:
        tf.disable_resource_variables()


@pytest.fixture
def executed_op_types(session):
    """executed_op_types(fetches, feed) is the set of op types that one run executes.

    It reads the run's own trace, so that an op in a branch not taken is not in it.
    Where oneDNN runs an op in TensorFlow's place (by default on CPUs with AVX512-VNNI),
    it counts under TensorFlow's name.
    """

    def run(fetches, feed=None):
        metadata = tf.RunMetadata()
        options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
        session.run(fetches, feed, options=options, run_metadata=metadata)
        labels = [
            stats.timeline_label
            for device in metadata.step_stats.dev_stats
            for stats in device.node_stats
        ]
        return {
            re.sub("^_Mkl(Native)?", "", label.split(" = ", 1)[1].split("(", 1)[0])
            for label in labels
            if " = " in label
        }

    return run
