"""What a layer costs in the graph: nodes, and time to build."""

from __future__ import annotations

import time

import tensorflow.compat.v1 as tf

from tests.benchmarks import peers, timing

MODES = {"True": True, "False": False, "tensor": None}


def measure(layers: int, rounds: int) -> list[timing.Row]:
    """Nodes and milliseconds per layer, averaged over a stack of `layers`."""
    contenders = {peers.OURS: peers.ours, "recipe": peers.recipe}
    if peers.ON_TENSORFLOW_1:
        contenders["tf.layers"] = peers.tf_layers
    found = []
    for mode, is_training in MODES.items():
        nodes = {}

        def build(name, layer, is_training=is_training, nodes=nodes):
            nodes[name] = _nodes_of_a_stack(layer, is_training, layers) / layers

        calls = {
            name: lambda name=name, layer=layer, build=build: build(name, layer)
            for name, layer in contenders.items()
            if is_training is not None or layer is not peers.recipe
        }
        timings = timing.in_turns(calls, rounds)
        case = f"graph of a layer, is_training={mode}"
        for row in timing.rows(case, timings):
            found.append(
                timing.Row(case, row.contender, nodes[row.contender], 0, "nodes")
            )
            found.append(
                row._replace(value=row.value / layers, spread=row.spread / layers)
            )
    return found


def _nodes_of_a_stack(layer, is_training, layers):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 8, 8, 16])
        mode = tf.placeholder(tf.bool, []) if is_training is None else is_training
        before = len(graph.get_operations())
        for _ in range(layers):
            x = layer(x, mode)
        return len(graph.get_operations()) - before


def growth(blocks: int) -> float:
    """Seconds of CPU to build a residual network with that many batch-norm layers."""
    start = time.process_time()  # not the clock, which counts what others run meanwhile
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 8, 8, 16])
        for _ in range(blocks):
            x += tf.nn.relu(peers.ours(x, True))
    return time.process_time() - start
