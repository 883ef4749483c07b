"""Graphs that are parsed node by node, against the messages parsed as a whole."""

import os
import random

import pytest
import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from bn_tf1.doctor.lint import lint
from bn_tf1.graphs.reading import partial_parsing
from bn_tf1.graphs.reading.graph_files import load_graph_file
from bn_tf1.graphs.reading.partial_parsing import parsed_graph, unparsed_graph, whole
from bn_tf1.graphs.view import read_graph, view_of
from tests import FIXTURES

ORIGINS = ("tf_layers", "contrib", "while_v1", "while_v2")


def meta_bytes(origin):
    return (FIXTURES / origin / "model.ckpt.meta").read_bytes()


def written(folder, content):
    path = str(folder / "graph.meta")
    with open(path, "wb") as file:
        file.write(content)
    return path


def small_graph(count, op="Identity"):
    graph_def = tf.GraphDef()
    for i in range(count):
        graph_def.node.add(name=f"n{i}", op=op, input=[f"n{i - 1}"] if i else [])
    return graph_def


def assert_same_graph(found, expected):
    assert list(found.nodes) == list(expected.node)
    functions = expected.library.function
    assert [list(f.nodes) for f in found.functions] == [
        list(f.node_def) for f in functions
    ]
    for function, whole_function in zip(found.functions, functions):
        without_nodes = type(whole_function)()
        without_nodes.CopyFrom(whole_function)
        del without_nodes.node_def[:]
        assert function.definition == without_nodes


def edges_of(view):
    """What each node takes and waits for, by name."""
    return {
        name: (
            view.ops[node],
            [(view.names[r >> 16], r & 0xFFFF) for r in view.inputs[node]],
            sorted(awaited_by(view, node)),
        )
        for node, name in enumerate(view.names)
        if view.ops[node] != "_Controls"
    }


def awaited_by(view, node):
    for control in view.controls[node]:
        if view.ops[control] == "_Controls":
            yield from awaited_by(view, control)
        else:
            yield view.names[control]


# ---------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_file_holds_what_the_messages_hold(origin):
    content = meta_bytes(origin)
    meta = tf.MetaGraphDef.FromString(content)
    loaded = load_graph_file(str(FIXTURES / origin / "model.ckpt.meta"))
    assert loaded.kind == "meta"
    assert_same_graph(loaded.graph, meta.graph_def)
    assert bool(loaded.graph.functions) == (origin == "while_v2")
    meta.ClearField("graph_def")
    assert loaded.meta == meta


@pytest.mark.parametrize("origin", ORIGINS)
def test_views_of_a_file_and_of_its_messages_are_the_same(origin):
    one = read_graph(str(FIXTURES / origin / "model.ckpt.meta"))
    other = view_of(tf.MetaGraphDef.FromString(meta_bytes(origin)))
    for field in ("names", "ops", "inputs", "controls", "bodies", "called", "callers"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.collections == other.collections
    assert one.saver == other.saver
    for node in range(len(one)):
        for name in ("dtype", "value", "T"):
            assert one.attribute(node, name) == other.attribute(node, name)


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_order_of_the_nodes_does_not_matter(origin):
    meta = tf.MetaGraphDef.FromString(meta_bytes(origin))
    expected = edges_of(view_of(meta))
    nodes = list(meta.graph_def.node)
    random.Random(7).shuffle(nodes)
    shuffled = tf.MetaGraphDef()
    shuffled.CopyFrom(meta)
    del shuffled.graph_def.node[:]
    shuffled.graph_def.node.extend(nodes)
    assert edges_of(view_of(shuffled)) == expected


def test_a_graph_in_parts_is_joined_as_the_library_joins_it(tmp_path):
    """Protocol buffers may be written one after the other: repeated fields are joined."""
    content = meta_bytes("while_v2") + meta_bytes("while_v1")
    meta = tf.MetaGraphDef.FromString(content)
    loaded = load_graph_file(written(tmp_path, content))
    assert_same_graph(loaded.graph, meta.graph_def)
    assert loaded.meta.collection_def == meta.collection_def
    assert loaded.meta.saver_def == meta.saver_def


def test_a_frozen_graph_with_fields_that_are_not_known(tmp_path):
    graph_def = small_graph(3)
    content = graph_def.SerializeToString() + b"\xf8\x07\x01\xfa\x07\x02ab"
    loaded = load_graph_file(written(tmp_path, content))
    assert (loaded.kind, loaded.meta) == ("graph", None)
    assert_same_graph(loaded.graph, graph_def)


def test_nodes_are_a_sequence(monkeypatch):
    monkeypatch.setattr(partial_parsing, "_KEPT_BYTES", 30)
    graph_def = small_graph(20)
    data = graph_def.SerializeToString()
    nodes = unparsed_graph(data, [whole(data)]).nodes
    for _ in range(2):
        assert [nodes[i] for i in range(20)] == list(graph_def.node)
    assert (len(nodes), nodes[-1].name, nodes[:2][1].name) == (20, "n19", "n1")
    for index in (20, -21):
        with pytest.raises(IndexError, match="of 20"):
            nodes[index]
    assert_same_graph(parsed_graph(graph_def), graph_def)


# ------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize(
    "node",
    [
        b"\x0a\x03\xff\xff\xff",  # a name that is no UTF-8
        b"\x0a\x01n\x12\x01o\x5c",  # the end of a group that was never begun
        b"\x0a\x7fn",
    ],
)
def test_a_damaged_node_far_behind_the_first(node, tmp_path):
    good = small_graph(150).SerializeToString()
    path = written(tmp_path, good + b"\x0a" + bytes([len(node)]) + node)
    message = f"{path}: the NodeDef at byte {len(good) + 2} is damaged"
    with pytest.raises(ValueError, match=message):
        lint(path)


def test_a_node_that_is_longer_than_its_graph(tmp_path):
    graph = small_graph(2).SerializeToString()
    # The length of the graph ends within its second node; what follows is no graph.
    content = b"\x12" + bytes([len(graph) - 1]) + graph
    message = rf"damaged near byte \d+ of {len(content)}: give"
    with pytest.raises(ValueError, match=message):
        lint(written(tmp_path, content))


def test_a_damaged_function(tmp_path):
    graph = small_graph(2).SerializeToString()
    library = b"\x12\x06\x0a\x04\x0a\x02\x0a\x7f"  # a signature whose name is cut off
    with pytest.raises(ValueError, match=rf"damaged near byte {len(graph) + 4} of"):
        lint(written(tmp_path, graph + library))


@pytest.mark.parametrize(
    "limit, what", [("MAX_NODES", "nodes"), ("MAX_FUNCTIONS", "functions")]
)
def test_more_than_is_examined_is_refused_while_it_is_read(
    limit, what, tmp_path, monkeypatch
):
    monkeypatch.setattr(partial_parsing, limit, 7)
    graph_def = small_graph(3)
    for i in range(8):
        graph_def.library.function.add().node_def.add(name="n", op="NoOp")
    path = written(tmp_path, graph_def.SerializeToString())
    message = f"the graph has more than 7 {what}, and no more are examined"
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        lint(path)
    with pytest.raises(ValueError, match=f"^{message}"):
        lint(graph_def)


def test_the_meta_graph_that_is_served(tmp_path):
    saved = SavedModel()
    for tags, count in ((["train"], 2), (["gpu", "serve"], 3), (["serve"], 4)):
        meta = saved.meta_graphs.add()
        meta.meta_info_def.tags.extend(tags)
        meta.graph_def.CopyFrom(small_graph(count))
    saved.saved_model_schema_version = 1
    path = os.path.join(str(tmp_path), "saved_model.pb")
    for count in (3, 2):
        with open(path, "wb") as file:
            file.write(saved.SerializeToString())
        assert len(read_graph(str(tmp_path))) == count
        del saved.meta_graphs[1:]  # without one that is served, the first


# ------------------------------------------------------------------------------ its memory


def memory(name):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(name)]
    return int(line.split()[1]) * 1024


def large_graph_bytes(count):
    """About 220 bytes for each node, as in a .meta file."""
    parts = []
    for i in range(count):
        part = tf.GraphDef()
        node = part.node.add(name=f"scope_of_a_layer/part{i}/multiplied", op="Mul")
        node.input.extend([f"scope_of_a_layer/part{max(i - 1, 0)}/multiplied"] * 2)
        node.attr["T"].type = 1
        shape = node.attr["_output_shapes"].list.shape.add()
        for size in (-1, 32, 32, 64):
            shape.dim.add(size=size)
        node.attr["_class"].list.s.append(b"loc:@scope_of_a_layer/gamma")
        parts.append(part.SerializeToString())
    return b"".join(parts)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="only Linux measures a new peak of the memory of a process",
)
def test_memory_in_proportion_to_the_file(tmp_path):
    """The messages of the whole graph took 8 (2.21) and 13 times (1.15.5) the file."""
    path = written(tmp_path, large_graph_bytes(50000))
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    view = read_graph(path)
    growth = memory("VmHWM") - before
    assert len(view) == 50000
    assert growth < 6 * os.path.getsize(path)
