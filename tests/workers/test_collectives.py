"""Which collectives a graph has, and which of them a run holds."""

import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.workers import collectives
from bn_tf1.workers.cluster import Workers


def test_collectives_are_numbered_and_told():
    workers = Workers(["a:1", "b:1", "c:1"], 2)
    workers.total(tf.zeros([4]))
    bn_tf1.batch_norm(tf.zeros([8, 5]), True, sync=workers)
    assert collectives.listed(tf.get_default_graph()) == [
        "CollectiveReduce 1 of float32, 3 in group 1",
        "CollectiveGather 2 of float32 [33], 3 in group 1",
    ]
    with tf.Graph().as_default() as other:
        workers.total(tf.zeros([4]))
        assert collectives.listed(other)[0].startswith("CollectiveReduce 1 ")


def test_a_run_holds_what_its_fetches_depend_on():
    workers = Workers(["a:1", "b:1"], 0)
    graph = tf.get_default_graph()
    first = workers.total(tf.zeros([4]))
    with tf.control_dependencies([first]):
        after = tf.constant(1)
    behind = workers.total(first + 1)
    assert collectives.reached(graph, [after]) == [1]
    assert collectives.reached(graph, [behind.op]) == [1, 2]
    assert collectives.reached(graph, [behind], fed=[first]) == [2]
    assert collectives.reached(graph, [tf.constant(2)]) == []


def test_a_branch_holds_its_own():
    """Of control flow v1 it is in the graph, of v2 in a function."""
    workers = Workers(["a:1", "b:1"], 0)
    for enable in (tf.disable_control_flow_v2, tf.enable_control_flow_v2):
        enable()
        try:
            with tf.Graph().as_default() as graph:
                inner = tf.cond(
                    tf.placeholder(tf.bool, []),
                    lambda: workers.total(tf.zeros([2])),
                    lambda: tf.zeros([2]),
                )
                assert collectives.reached(graph, [inner]) == [1]
                assert len(collectives.listed(graph)) == 1
        finally:
            tf.disable_control_flow_v2()
