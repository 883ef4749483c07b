"""Measures reading and linting a large graph: python -m tests.graphs.graph_scale [LAYERS].

Writes the .meta of a training graph of LAYERS dense layers (1,000 by default), each with
a batch norm made of tf.nn.moments, with Adam and a saver, reads and lints it in a second
process, and prints the time and the memory beyond TensorFlow's import. TensorFlow itself
takes minutes to build such a graph: it is made of copies of one of 50 layers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import tensorflow.compat.v1 as tf

_MEASURE = "--measure"
_PART = 50


def write_graph(path: str, layers: int) -> None:
    """Writes the .meta file of a training graph with `layers` batch norms."""
    part = _training_graph(_PART)
    whole = tf.MetaGraphDef()
    whole.CopyFrom(part)
    del whole.graph_def.node[:]
    for copy in range(layers // _PART):
        for node in part.graph_def.node:
            added = whole.graph_def.node.add()
            added.CopyFrom(node)
            added.name = f"copy{copy}/{node.name}"
            del added.input[:]
            for name in node.input:
                control = "^" if name.startswith("^") else ""
                added.input.append(f"{control}copy{copy}/{name.lstrip('^')}")
    with open(path, "wb") as file:
        file.write(whole.SerializeToString())


def _training_graph(layers):
    from tests.graphs import graph_zoo

    tf.disable_v2_behavior()
    x = tf.placeholder(tf.float32, [None, 4], name="x")
    for i in range(layers):
        with tf.variable_scope(f"layer{i}"):
            x = tf.matmul(x, tf.get_variable("weights", [4, 4]))
            x = tf.nn.relu(graph_zoo.with_nn(x, True))
    updates = tf.group(*tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    with tf.control_dependencies([updates]):
        tf.train.AdamOptimizer().minimize(tf.reduce_mean(x))
    tf.train.Saver()
    return tf.train.export_meta_graph()


def measure(path: str) -> str:
    """Reads and lints the graph at `path`; one line of what it took."""
    from bn_tf1.doctor.lint import lint_facts
    from bn_tf1.graphs.facts import Facts
    from bn_tf1.graphs.view import read_graph

    before = _peak_megabytes()
    start, cpu = time.perf_counter(), time.process_time()
    facts = Facts(read_graph(path))
    findings = lint_facts(facts)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    megabytes = _peak_megabytes() - before
    layers = len(facts.layers)
    return (
        f"TensorFlow {tf.version.VERSION}: {os.path.getsize(path) / 2**20:.0f} MiB, "
        f"{len(facts.view)} nodes, {layers} layers, {len(findings)} findings: "
        f"{seconds:.1f} s ({cpu:.1f} s of CPU), {megabytes:.0f} MB beyond TensorFlow's import"
    )


def _peak_megabytes():
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main(arguments):
    if arguments[:1] == [_MEASURE]:
        print(measure(arguments[1]))
        return
    layers = int(arguments[0]) if arguments else 1000
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "graph.meta")
        write_graph(path, layers)
        command = [sys.executable, "-m", "tests.graphs.graph_scale", _MEASURE, path]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
