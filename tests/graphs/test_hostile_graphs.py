"""Damaged and hostile graphs: a clear error or a report, in bounded time and memory."""

import os
import random
import sys

import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_tf1.doctor.lint import lint, lint_facts
from bn_tf1.graphs.facts import Facts
from bn_tf1.graphs.layer_analysis import find_layers
from bn_tf1.graphs.reading import graph_files
from bn_tf1.graphs.reading.text_graphs import binary_graph
from bn_tf1.graphs.view import read_graph, view_of
from tests import FIXTURES, ROOT
from tests.graphs import graph_zoo

ROOMS = tuple(
    str(ROOT / "bn_tf1" / room)
    for room in ("formats", "checkpoints", "graphs", "doctor")
)
LIMITS = settings(max_examples=40, deadline=None, database=None)


def examine(path):
    """A report, or the ValueError that names the file."""
    try:
        return lint(path)
    except ValueError as error:
        assert path in str(error)
        assert "\n" not in str(error)
        return None


def written(folder, content):
    path = str(folder / "graph.meta")
    with open(path, "wb") as file:
        file.write(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


CONTENTS = [
    (FIXTURES / origin / "model.ckpt.meta").read_bytes()
    for origin in ("tf_layers", "contrib", "while_v1", "while_v2")
]


# -------------------------------------------------------------------------------- damaged


def test_every_truncation(folder):
    for content in CONTENTS:
        for length in range(0, len(content), len(content) // 25):
            examine(written(folder, content[:length]))


@LIMITS
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 50))
def test_flipped_bits(folder, seed, flips):
    chance = random.Random(seed)
    content = bytearray(chance.choice(CONTENTS))
    for _ in range(flips):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    examine(written(folder, bytes(content)))


@LIMITS
@given(content=st.binary(max_size=2000))
def test_random_bytes(folder, content):
    examine(written(folder, content))


@LIMITS
@given(seed=st.integers(0, 2**32))
def test_shuffled_graphs(folder, seed):
    """Valid protocol buffers whose inputs, operations and attributes are mixed up."""
    chance = random.Random(seed)
    meta = tf.MetaGraphDef.FromString(chance.choice(CONTENTS))
    nodes = meta.graph_def.node
    for _ in range(60):
        one, other = chance.choice(nodes), chance.choice(nodes)
        kind = chance.randrange(4)
        if kind == 0 and one.input:
            one.input[chance.randrange(len(one.input))] = other.name
        elif kind == 1:
            one.op = other.op
        elif kind == 2 and one.input:
            del one.input[:]
        elif kind == 3 and one.attr:
            one.attr.pop(min(one.attr))
    assert examine(written(folder, meta.SerializeToString())) is not None


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is an empty file, and no MetaGraphDef, GraphDef or SavedModel"),
        (b"garbage", "is a text file, and no MetaGraphDef, GraphDef or SavedModel"),
        (b"node { name: 'x' op", "is damaged"),
        (b"node { name: '\xff' }", "is damaged"),
        (b"\x08\x01", "is no MetaGraphDef, GraphDef or SavedModel"),
    ],
)
def test_what_is_no_graph(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        lint(path)
    assert path in str(caught.value)


def test_a_missing_file_and_a_directory_without_a_graph(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        lint(str(tmp_path / "nowhere.meta"))
    with pytest.raises(ValueError, match="has no saved_model.pb"):
        lint(str(tmp_path))


def test_another_kind_of_argument():
    with pytest.raises(TypeError, match="`graph` is a list, but must be a tf.Graph"):
        lint([])


# -------------------------------------------------------------------------------- hostile


def chain(count, op="Identity", close=False):
    graph_def = tf.GraphDef()
    for i in range(count):
        node = graph_def.node.add(name=f"n{i}", op=op)
        if i or close:
            node.input.append(f"n{(i - 1) % count}")
    return graph_def


@pytest.mark.parametrize("op", ["Identity", "Switch", "Merge", "NextIteration", "Add"])
def test_long_chains_and_cycles_of_any_operation(op):
    for close in (False, True):
        graph_def = chain(20000, op, close)
        graph_def.node.add(name="rsqrt", op="Rsqrt", input=["n19999"])
        graph_def.node.add(name="w", op="AssignSub", input=["n19999", "n19999"])
        lint(graph_def)


def test_a_cycle_around_every_node_of_a_layer(graph):
    graph_zoo.training_graph(graph_zoo.with_nn)
    graph_def = graph.as_graph_def()
    for node in graph_def.node:
        node.input.insert(0, graph_def.node[-1].name)
    lint(graph_def)


def test_functions_that_call_themselves_and_each_other():
    graph_def = tf.GraphDef()
    for name, other in (("f", "g"), ("g", "f"), ("h", "h")):
        function = graph_def.library.function.add()
        function.signature.name = name
        function.signature.input_arg.add(name="x")
        function.signature.output_arg.add(name="y")
        call = function.node_def.add(name="call", op="PartitionedCall", input=["x"])
        call.attr["f"].func.name = other
        function.node_def.add(name="root", op="Rsqrt", input=["call:output:0"])
        function.ret["y"] = "call:output:0"
        node = graph_def.node.add(name=name, op="PartitionedCall", input=["rsqrt"])
        node.attr["f"].func.name = name
    graph_def.node.add(name="rsqrt", op="Rsqrt", input=["f"])
    graph_def.node.add(name="branch", op="If", input=["h", "f"])
    graph_def.node[-1].attr["then_branch"].func.name = "h"
    lint(graph_def)


def test_many_functions_with_many_calls():
    graph_def = tf.GraphDef()
    for i in range(300):
        function = graph_def.library.function.add()
        function.signature.name = f"f{i}"
        for j in range(30):
            function.signature.input_arg.add(name=f"x{j}")
        for j in range(3):
            call = function.node_def.add(name=f"call{j}", op="If")
            call.input.extend(f"x{k}" for k in range(30))
            for branch in range(30):
                called = call.attr["branches"].list.func.add()
                called.name = f"f{(i * 7 + j + branch) % 300}"
    node = graph_def.node.add(name="call", op="PartitionedCall")
    node.attr["f"].func.name = "f0"
    lint(graph_def)


def test_calls_whose_arguments_multiply(tmp_path):
    """0.5 MB in which 200 nodes call 100 functions with 300 arguments: 6 million edges."""
    graph_def = tf.GraphDef()
    for i in range(100):
        function = graph_def.library.function.add()
        function.signature.name = f"f{i}"
        for j in range(300):
            function.signature.input_arg.add(name=f"x{j}")
    graph_def.node.add(name="x", op="Placeholder")
    for i in range(200):
        call = graph_def.node.add(name=f"call{i}", op="While", input=["x"] * 300)
        for j in range(100):
            call.attr["bodies"].list.func.add().name = f"f{j}"
    path = written(tmp_path, graph_def.SerializeToString())
    message = f"{path}: the calls of functions take and give more than 4000000 values"
    with pytest.raises(ValueError, match=message):
        lint(path)
    del graph_def.node[101:]  # 100 calls are within the limit
    findings = lint(written(tmp_path, graph_def.SerializeToString()))
    assert [finding.check for finding in findings] == ["no-batch-norm"]


def test_absurd_shapes_and_constants():
    graph_def = tf.GraphDef()
    for i, sizes in enumerate([[2**62, 2**62], [-5], [2**31, 2**31], [0], [3]]):
        node = graph_def.node.add(name=f"c{i}", op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = [1, 999, 3, 20, 7][i]
        for size in sizes:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = b"\x01\x02\x03"
    inputs = ["c0", "c1", "c2", "c3", "c4"]
    graph_def.node.add(name="bn", op="FusedBatchNormV3", input=inputs)
    graph_def.node.add(name="mean", op="Mean", input=["c0", "c2"])
    graph_def.node.add(name="add", op="Add", input=["mean", "c4"])
    graph_def.node.add(name="rsqrt", op="Rsqrt", input=["add"])
    for op in ("FusedBatchNorm", "Rsqrt", "Pow", "SaveV2", "Switch", "Merge", "Assign"):
        graph_def.node.add(name="no_input_" + op, op=op)
        graph_def.node.add(name="one_input_" + op, op=op, input=["c0"])
    view = view_of(graph_def)
    assert [layer.node for layer in find_layers(view)] == ["bn"]
    lint(graph_def)


def test_names_that_clash_and_inputs_from_nowhere():
    graph_def = tf.GraphDef()
    for _ in range(3):
        graph_def.node.add(
            name="x", op="Rsqrt", input=["x", "y:99999999", "^", ":", ""]
        )
    graph_def.node.add(name="bn", op="FusedBatchNormV3", input=["a", "b", "c"])
    lint(graph_def)


def test_messages_that_nest_too_deeply(tmp_path):
    attribute = "attr { key: 'f' value { func { name: 'f' %s } } }"
    text = "%s"
    for _ in range(2000):
        text = text % attribute
    content = "node { name: 'n' op: 'n' %s }" % (text % "")
    path = written(tmp_path, content.encode())
    with pytest.raises(ValueError, match="graph.meta"):
        read_graph(path)


def test_text_is_read_as_well(tmp_path, graph):
    graph_zoo.training_graph(graph_zoo.with_nn, updates=[])
    tf.train.write_graph(graph, str(tmp_path), "graph.pbtxt")
    path = os.path.join(str(tmp_path), "graph.pbtxt")
    assert [f.check for f in lint(path)] == [f.check for f in lint(graph)]


@pytest.mark.parametrize("content", ["whole", "an unknown field", "cut off"])
def test_large_text_is_read_as_small_text_is(tmp_path, graph, monkeypatch, content):
    graph_zoo.training_graph(graph_zoo.with_nn, updates=[])
    text = str(graph.as_graph_def())
    text += {"whole": "", "an unknown field": "not_yet: 3", "cut off": "node {"}[
        content
    ]
    path = written(tmp_path, text.encode())
    slow = examine_or_error(path)
    monkeypatch.setattr(graph_files, "_LARGE_TEXT_BYTES", 0)
    assert examine_or_error(path) == slow
    assert (binary_graph(text.encode()) is not None) == (content == "whole")


def examine_or_error(path):
    try:
        return lint(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "text",
    [
        "node { " * 5000,
        "node < " * 5000,
        'node { name: "}}}}" ' * 5000,
        "node { # }}}}\n" * 5000,
        "node { name: '\\'}}}}' " * 5000,
        'node { name: "\n}}}}" ' * 3 + "node {" * 5000,
    ],
)
def test_deep_text_is_not_given_to_the_parser_of_tensorflow(text):
    assert binary_graph(text.encode()) is None


# ------------------------------------------------------------------- what all nodes share


def assignments_in_a_function(count):
    graph_def = tf.GraphDef()
    function = graph_def.library.function.add()
    function.signature.name = "f"
    function.signature.input_arg.add(name="x")
    for i in range(count):
        value = f"a{i - 1}:o:0" if i else "x"
        function.node_def.add(name=f"a{i}", op="AssignVariableOp", input=["x", value])
    graph_def.node.add(name="x", op="VarHandleOp")
    call = graph_def.node.add(name="call", op="PartitionedCall", input=["x"])
    call.attr["f"].func.name = "f"
    step = ["x", "x", "x", "^call"]
    graph_def.node.add(name="step", op="ApplyGradientDescent", input=step)
    return graph_def


def many_that_share_wide_inputs(count, op):
    """Each walk back from one of `count` nodes meets a node with `count` inputs."""
    graph_def = tf.GraphDef()
    inputs = [f"p{i}" for i in range(count)]
    for name in inputs:
        graph_def.node.add(name=name, op="Placeholder")
    graph_def.node.add(name="wide", op=op, input=inputs)
    for i in range(count):
        graph_def.node.add(name=f"root{i}", op="Rsqrt", input=["wide"])
        graph_def.node.add(name=f"w{i}", op="AssignSub", input=["wide", "wide"])
    return graph_def


def many_that_share_a_wide_call(count):
    graph_def = tf.GraphDef()
    call = graph_def.node.add(name="call", op="Case")
    graph_def.node.add(name="x", op="Placeholder")
    call.input.append("x")
    for i in range(count):
        function = graph_def.library.function.add()
        function.signature.name = f"f{i}"
        function.signature.output_arg.add(name="y")
        function.node_def.add(name="r", op="Placeholder")
        function.ret["y"] = "r:y:0"
        call.attr["branches"].list.func.add().name = f"f{i}"
        graph_def.node.add(name=f"root{i}", op="Rsqrt", input=["call"])
    return graph_def


class Lines:
    """Counts the lines of Python that run in the rooms that read a graph."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error):
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        is_ours = frame.f_code.co_filename.startswith(ROOMS)
        return self._line if is_ours else None

    def _line(self, frame, event, argument):
        self.count += event == "line"
        return self._line


WIDE = {
    "assignments": assignments_in_a_function,
    "sums": lambda count: many_that_share_wide_inputs(count, "AddN"),
    "merges": lambda count: many_that_share_wide_inputs(count, "Merge"),
    "calls": many_that_share_a_wide_call,
}


@pytest.mark.parametrize("kind", sorted(WIDE))
def test_work_grows_as_the_graph(kind):
    """Counted in lines, not in seconds, which depend on the machine."""
    counts = []
    for count in (350, 700):
        view = view_of(WIDE[kind](count))
        with Lines() as lines:
            lint_facts(Facts(view))
        counts.append(lines.count)
    assert counts[0] > 350
    assert counts[1] < 2.5 * counts[0]


def test_conditions_that_nest_too_deeply(tmp_path):
    """3,000 nested conditions: the last of them depends on all, the sum is 4.5 million."""
    graph_def = tf.GraphDef()
    graph_def.node.add(name="s0", op="Placeholder")
    for i in range(1, 3001):
        graph_def.node.add(name=f"p{i}", op="Placeholder")
        graph_def.node.add(name=f"s{i}", op="Switch", input=[f"s{i - 1}", f"p{i}"])
    path = written(tmp_path, graph_def.SerializeToString())
    message = "nested or joined so often that its nodes depend on more than 4000000"
    with pytest.raises(ValueError, match=f"{path}: the conditions .* {message}"):
        lint(path)
    del graph_def.node[2001:]
    findings = lint(written(tmp_path, graph_def.SerializeToString()))
    assert [finding.check for finding in findings] == ["no-batch-norm"]
