"""What the layers of a graph share, and what keeps a layer from sharing."""

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.shared_constants import shared_constants


def shared_in(graph):
    return [
        op
        for op in graph.get_operations()
        if op.name.startswith("bn_tf1_constants/") and op.type == "Const"
    ]


def made_by(build):
    """The operations that `build` makes."""
    graph = tf.get_default_graph()
    before = set(graph.get_operations())
    build()
    return [op for op in graph.get_operations() if op not in before]


def layer(x=None, is_training=True, **options):
    x = tf.placeholder(tf.float32, [None, 8, 8, 16]) if x is None else x
    return lambda: bn_tf1.batch_norm(x, is_training, **options)


def test_the_layers_of_a_graph_share_constants(graph):
    first, second = made_by(layer()), made_by(layer())
    assert len(second) == len(first) - 6
    shared = {op.outputs[0].name for op in shared_in(graph)}
    assert len(shared) == 4
    assert shared <= {tensor.name for op in second for tensor in op.inputs}


def test_each_graph_has_its_own(graph):
    made_by(layer())
    with tf.Graph().as_default() as other:
        made_by(layer())
        assert len(shared_in(other)) == len(shared_in(graph)) > 0


def test_constants_are_shared_by_value_and_dtype(graph):
    constant = shared_constants(tf.constant(0).op)
    assert constant(1.0, tf.float32) is constant(1.0, tf.float32)
    assert constant([0, 1], tf.int32) is constant([0, 1], tf.int32)
    others = [(2.0, tf.float32), (1.0, tf.float64), ([1.0], tf.float32), (1, tf.int32)]
    tensors = {constant(1.0, tf.float32).name}
    tensors |= {constant(value, dtype).name for value, dtype in others}
    assert len(tensors) == 5


def test_layers_on_two_devices_share_nothing(graph):
    with tf.device("/cpu:0"):
        made_by(layer())
    here = set(shared_in(graph))
    with tf.device("/cpu:1"):
        made_by(layer())
    there = set(shared_in(graph)) - here
    assert len(here) == len(there) > 0
    assert {tf.DeviceSpec.from_string(op.device).device_index for op in here} == {0}
    assert {tf.DeviceSpec.from_string(op.device).device_index for op in there} == {1}


def test_a_colocated_layer_shares_nothing(graph):
    anchor = tf.constant(0.0)
    with graph.colocate_with(anchor.op):
        made_by(layer())
    assert shared_in(graph) == []


def test_what_the_first_layer_waits_for_does_not_hold_up_the_others(graph):
    with tf.control_dependencies([tf.no_op()]):
        made_by(layer())
    assert shared_in(graph)
    assert all(not op.control_inputs for op in shared_in(graph))


def in_cond(build):
    return tf.cond(tf.placeholder(tf.bool, []), build, lambda: tf.zeros([2, 3]))


def in_loop(build):
    def body(step, _):
        return step + 1, build()

    return tf.while_loop(lambda step, _: step < 2, body, [0, tf.zeros([2, 3])])[1]


@pytest.mark.parametrize("inside", [in_cond, in_loop])
@pytest.mark.parametrize("v2", [False, True])
def test_in_control_flow_a_layer_shares_nothing(inside, v2, graph):
    (tf.enable_control_flow_v2 if v2 else tf.disable_control_flow_v2)()
    try:
        x = tf.random.stateless_normal([2, 3], [1, 2])
        y = inside(layer(x, update="in_place"))
    finally:
        tf.disable_control_flow_v2()
    assert shared_in(graph) == []
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        assert session.run(
            y, {"Placeholder:0": True} if inside is in_cond else {}
        ).any()


def test_a_layer_in_a_branch_has_no_part_in_what_others_share(graph):
    """Inside, the value of a constant from outside is not known."""
    made_by(layer())
    shared = {op.outputs[0].name for op in shared_in(graph)}
    x = tf.random.stateless_normal([2, 3], [1, 2])
    inside = made_by(lambda: in_cond(layer(x, update="in_place")))
    assert not shared & {tensor.name for op in inside for tensor in op.inputs}


def test_initial_values_belong_to_no_device(graph):
    with tf.device("/cpu:1"):
        made_by(layer())
    values = {v.initial_value.op for v in tf.global_variables()}
    assert len(values) == 2
    assert {op.device for op in values} == {""}


def test_what_is_shared_does_not_show_in_an_export(graph, tmp_path):
    made_by(layer())
    made_by(layer())
    exported = tf.train.export_meta_graph(str(tmp_path / "model.meta"))
    assert not [key for key in exported.collection_def if key.startswith("bn_tf1")]
    with tf.Graph().as_default():
        tf.train.import_meta_graph(exported)
        third = made_by(layer())
        fourth = made_by(layer())
    assert len(fourth) == len(third) - 6
