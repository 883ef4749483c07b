"""From somebody's training graph to the graph that is served, with its values."""

from __future__ import annotations

import re
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import Analysis, analyse
from bn_tf1.graphs.node_values import ASSIGNMENTS
from bn_tf1.graphs.rewriting.any_batch import unpack_views
from bn_tf1.graphs.rewriting.constant_values import constant_scalar
from bn_tf1.graphs.rewriting.dead_branches import dtype_of, resolve
from bn_tf1.graphs.rewriting.dropout_removal import remove_dropout
from bn_tf1.graphs.rewriting.editable_graph import (
    SWITCHES,
    EditableGraph,
    called_by,
    canonical,
    node_name,
    port_in,
)
from bn_tf1.graphs.rewriting.extraction import (
    clean_attributes,
    cut_at,
    drop_controls,
    extract,
)
from bn_tf1.graphs.rewriting.freezing import freeze, variables_in
from bn_tf1.graphs.rewriting.graph_interface import (
    Candidate,
    Interface,
    find_interface,
)
from bn_tf1.graphs.rewriting.inference_mode import (
    PLACEHOLDERS,
    RANDOM,
    Mode,
    set_inference_mode,
)
from bn_tf1.graphs.rewriting.moving_statistics import (
    take_moving_statistics,
    write_out,
)
from bn_tf1.graphs.training_nodes import Conditions, find_training
from bn_tf1.graphs.view import node_of
from bn_tf1.serving.export_error import ExportError
from bn_tf1.serving.graph_sources import Source
from bn_tf1.serving.model_ends import Ends, Wishes, served_tensors, some

_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_OF_TRAINING = re.compile(
    r"(Resource)?(Sparse)?Apply[A-Z]|(Resource)?Scatter[A-Z]\w*(Add|Sub|Update)$|"
    r"\w+Grad(V\d+)?$"
)


class Reference(NamedTuple):
    """A graph that gives what a model should.

    Attributes:
        graph: the graph of the source, with the mode set and constants for variables.
        what: what it is called, with all else that was changed in it.
    """

    graph: EditableGraph
    what: str


class Model(NamedTuple):
    """A graph that is served.

    Attributes:
        graph: the graph, with constants for variables.
        inputs: its placeholders.
        outputs: its outputs.
        references: what its outputs are compared with, the first that can be.
        unknown: why there is no reference, where there is none.
        keys: what the source's signature calls inputs and outputs, by their names.
        batch_size: that of the source; None where it takes any.
        changed: what was done, a sentence each.
        left: what was left as it was, and why, a sentence each.
    """

    graph: EditableGraph
    inputs: tuple[Candidate, ...]
    outputs: tuple[Candidate, ...]
    references: tuple[Reference, ...]
    unknown: str
    keys: Mapping[str, str]
    batch_size: int | None
    changed: tuple[str, ...]
    left: tuple[str, ...]

    def names(self) -> tuple[list[str], list[str]]:
        """The names of the input and of the output tensors, as inputs have them."""
        return tuple(  # type: ignore[return-value]
            [canonical(candidate.tensor) for candidate in candidates]
            for candidates in (self.inputs, self.outputs)
        )


class NewLayer(NamedTuple):
    """A layer whose statistics are to be computed.

    Attributes:
        name: the layer.
        constants: the names of those that hold its mean and variance.
        x: the input of nodes that it normalises.
        axes: the axes of `x` that are reduced.
    """

    name: str
    constants: tuple[str, ...]
    x: str
    axes: tuple[int, ...]


def interface_of(source: Source, settings: Mapping[str, Any]) -> tuple[Interface, Mode]:
    """What goes into a graph and comes out of it, and the mode that was found."""
    # Without outputs, which are to be found, every layer of the graph counts.
    mode = _set_mode(source, Wishes(settings=settings), [])
    return find_interface(mode.view, mode.values), mode


def prepare(
    source: Source,
    wishes: Wishes,
    take_statistics: Callable[..., list[str]] = take_moving_statistics,
) -> Model:
    """Makes the graph that is served.

    Args:
        source: the source.
        wishes: what is asked of it.
        take_statistics: called with the graph, its view and the layers that the outputs
            need: gives them statistics, and returns the names of those that it changed.

    Raises:
        ExportError: that cannot be done; the error names the node and what to do.
    """
    served = served_tensors(source)
    wished = wishes.outputs or [name for name, _ in served[1]]
    mode = _set_mode(source, wishes, wished)
    graph = mode.graph
    ends = Ends(mode, wishes, served)
    outputs = ends.outputs()
    names = [node_name(canonical(c.tensor)) for c in outputs]
    # First of all: an update that an output waits for counts as needed until then.
    drop_controls(graph, names)
    changed = _mode_notes(mode, wishes)
    layers = _needed_layers(mode, names)
    baked = take_statistics(graph, mode.view, layers)
    if baked:
        changed.append(
            f"{len(baked)} layers take statistics that they did not take in the graph: "
            f"{some(baked)}"
        )
    # Before the inputs are cut: what no data comes to is a mask, and no activation.
    given = [canonical(c.tensor) for c in ends.asked_inputs()]
    dropped = remove_dropout(graph, ends.data(names) + [node_name(n) for n in given])
    if dropped:
        changed.append(f"dropout is taken out: {some(dropped)}")
    inputs = ends.inputs(names)
    size = len(source.graph_def.node)
    made = _extracted(graph, inputs, outputs)
    if baked and take_statistics is not take_moving_statistics:
        made = made._replace(unknown="its layers have new statistics")
    else:
        made = _with_references(made, source, mode, layers, (inputs, outputs), dropped)
    changed.append(f"{size} nodes became {len(made.graph.nodes)}")
    unpack_views(made.graph)
    # Again: what was unpacked left nodes that nobody takes, and OpenVINO calls outputs.
    extract(made.graph, made.names()[1])
    _check_clean(made.graph)
    # Only now: a variable that is for training alone may be in no checkpoint.
    for own in (made.graph, *(reference.graph for reference in made.references)):
        own.definitions = source.definitions
        _freeze(own, source)
        clean_attributes(own)
    left = []
    if take_statistics is take_moving_statistics:
        _check_variances(mode.view, layers, source)
        left = _never_updated(mode.view, layers, baked, source)
    served_keys = {graph.tensor(name): key for pairs in served for name, key in pairs}
    keys = {
        canonical(now.tensor): served_keys.get(canonical(then.tensor))
        for then, now in zip((*inputs, *outputs), (*made.inputs, *made.outputs))
    }
    return made._replace(keys=keys, changed=tuple(changed), left=tuple(left))


def _set_mode(source, wishes, outputs):
    graph = EditableGraph(source.graph_def)
    settings = {
        node_name(canonical(name)): value for name, value in wishes.settings.items()
    }
    for name in settings:
        if name not in graph.nodes or graph.nodes[name].op not in (
            *PLACEHOLDERS,
            "Const",
        ):
            known = [n for n, node in graph.nodes.items() if node.op in PLACEHOLDERS]
            raise ExportError(
                f"`--set {name}` names no placeholder of {source.path}; it has "
                f"{some(known) if known else 'none'}"
            )
    try:
        return set_inference_mode(graph, settings, source.definitions, outputs)
    except ValueError as error:
        raise ExportError(f"{source.path}: {error}") from error


def _mode_notes(mode, wishes):
    own = {name: v for name, v in mode.values.items() if name not in wishes.settings}
    notes = [f"{name} is {bool(value)}: inference" for name, value in own.items()]
    return notes + [f"{name} is {value}" for name, value in wishes.settings.items()]


def _needed_layers(mode: Mode, outputs):
    """The layers that the outputs need, with the calls that they need."""
    needed = mode.graph.ancestors(outputs)
    found: list[Analysis] = []
    for analysis in mode.layers:
        calls = [c for c in analysis.calls if mode.view.names[c.node] in needed]
        if calls:
            found.append(analysis._replace(calls=tuple(calls)))
    return found


# -------------------------------------------------------------------------- extraction


def _extracted(graph, inputs, outputs):
    names = cut_at(graph, inputs)
    made_inputs = tuple(
        c._replace(tensor=f"{name}:0") for c, name in zip(inputs, names)
    )
    made_outputs = tuple(_first_output(graph, c) for c in outputs)
    extract(graph, [node_name(c.tensor) for c in made_outputs])
    sizes = [c.shape[0] for c in (*inputs, *outputs) if c.shape and c.shape[0]]
    size = sizes[0] if sizes else None
    return Model(graph, made_inputs, made_outputs, (), "", {}, size, (), ())


def with_stored_pixels(model: Model, scale: float) -> Model:
    """The model with inputs of uint8, which are multiplied by `scale` in its graph."""
    given = [model.graph, *(reference.graph for reference in model.references)]
    graphs = [graph.copy() for graph in given]
    for graph in graphs:
        factor = graph.constant("pixels/scale", np.float32(scale))
        for candidate in model.inputs:
            if candidate.dtype != tf.float32:
                raise ExportError(f"the input {candidate} is no float32, as pixels are")
            name = canonical(candidate.tensor)
            types = {"SrcT": tf.uint8, "DstT": tf.float32}
            cast = graph.add("Cast", "pixels/cast", [name], **types)
            scaled = graph.add("Mul", "pixels/scaled", [cast, factor], T=tf.float32)
            graph.redirect({name: scaled}, but=[cast])
            graph.nodes[name].attr["dtype"].type = tf.uint8.as_datatype_enum
    return model._replace(
        graph=graphs[0],
        references=tuple(
            reference._replace(graph=graph)
            for reference, graph in zip(model.references, graphs[1:])
        ),
        inputs=tuple(c._replace(dtype=tf.uint8) for c in model.inputs),
        changed=(*model.changed, f"the inputs are stored pixels, times {scale:.6g}"),
    )


def _first_output(graph, candidate):
    """TFLite and ONNX name an output by its node: "x:1" gets a node of its own."""
    tensor = canonical(candidate.tensor)
    if not port_in(tensor):
        return candidate
    name = graph.add("Identity", tensor.replace(":", "_"), [tensor], T=candidate.dtype)
    return candidate._replace(tensor=f"{name}:0")


def _with_references(made, source, mode, layers, ends, dropped):
    """The model with the graph of the source, under TensorFlow's own control flow.

    Layers that have no inference mode there are written out: another way to the same
    numbers than the model's. A dropout that nothing turns off is taken out of a second.
    """
    graph = EditableGraph(source.graph_def)
    # Nothing is given a value but by a constant: TensorFlow chooses the branches itself.
    resolve(graph, {}, source.definitions)
    for name, value in mode.values.items():
        if name in graph.nodes:
            graph.make_constant(name, np.asarray(value, dtype_of(graph, name)))
    inputs, outputs = ends
    names = [node_name(canonical(c.tensor)) for c in outputs]
    what = "the graph before"
    absent = [
        name
        for name in (*names, *(node_name(canonical(c.tensor)) for c in inputs))
        if name not in graph.nodes
    ]
    if absent:  # a condition of v2, which is another node once it is decided
        return made._replace(unknown=f"only a decided condition has {some(absent)}")
    try:
        written = _write_layers_out(graph, source, mode, layers, names)
    except ValueError as error:
        return made._replace(unknown=f"the graph has no inference mode, and {error}")
    if written:
        what += (
            f" with the moving statistics of {len(written)} layers in plain formulas"
        )
    drop_controls(graph, names)
    before = _extracted(graph, inputs, outputs)
    fed = before.names()[0]
    references = []
    if dropped:
        # Before values are filled in, with which dropout may not be recognised.
        without = before.graph.copy()
        remove_dropout(without, fed)
        _fill_in(without, fed)
        references = [Reference(without, f"{what} and without its dropout")]
    # To a dropout that is there, a rate that nobody gave makes a difference.
    if not (_fill_in(before.graph, fed) and dropped):
        references.insert(0, Reference(before.graph, what))
    return made._replace(references=tuple(references))


def _fill_in(graph, inputs):
    """Gives a value to placeholders that only what is not taken needs, as a keep_prob.

    Which one makes no difference: an output that did depend on it would be another than
    the model's. Returns whether there were any.
    """
    is_filled = False
    for name in set(graph.nodes).difference(map(node_name, inputs)):
        node = graph.nodes[name]
        if node.op not in ("Placeholder", "PlaceholderV2"):
            continue
        dtype = dtype_of(graph, name)
        if np.dtype(dtype) != object:  # text: to be fed, as TensorFlow then says
            sizes = [max(dim.size, 1) for dim in node.attr["shape"].shape.dim]
            graph.make_constant(name, np.ones(sizes, dtype))
            is_filled = True
    return is_filled


def _write_layers_out(graph, source, mode, layers, names):
    """Writes out the layers that `names` need and that take the batch; their names.

    Raises:
        ValueError: that cannot be done.
    """
    view = mode.view
    if graph.functions:
        view, layers = _undecided(graph, source, mode.values, names)
    # A `Case` stays a call here, whose layers have no nodes in this graph.
    outside = [a.layer.name for a in layers if not _is_in(graph, view, a)]
    if outside:
        raise ValueError(f"{some(outside)} are in functions that it calls as it runs")
    existing = {id(node): node for node in graph.nodes.values()}
    written = take_moving_statistics(graph, view, layers, write_out)
    _take_living(graph, [n for n in graph.nodes.values() if id(n) not in existing])
    return written


def _undecided(graph, source, values, names):
    """The view, and the layers that `names` need, under the names of `graph`.

    A branch of control flow v2 that a constant decides is inlined in the place of the
    condition, one that TensorFlow chooses beside the other: its nodes have other names.
    """
    decided = graph.copy()
    resolve(decided, {}, source.definitions, names)
    view = decided.view()
    layers = tuple(analyse(view, Conditions(view)))
    drop_controls(decided, names)
    return view, _needed_layers(Mode(decided, values, view, layers), names)


def _take_living(graph, added):
    """Lets nodes that were added take the output of each `Switch` that is there.

    They were made by a view in which such a `Switch`, decided, has one output.
    """
    living = {
        name: f"{name}:1"
        for name, node in graph.nodes.items()
        if node.op in SWITCHES and constant_scalar(graph, node.input[1])
    }
    for node in added:
        node.input[:] = [living.get(source, source) for source in node.input]


def _is_in(graph, view, analysis):
    """Whether `graph` has the nodes of a layer's calls that take the batch."""
    return all(
        view.names[node] in graph.nodes
        for call in analysis.calls
        if call.mode != "inference"
        for node in (call.node, node_of(call.x))
    )


def _check_clean(graph):
    for name, node in graph.nodes.items():
        functions = called_by([node], graph.functions)
        if functions:
            # A layer in there would keep its mode, and a variable could not be frozen.
            raise ExportError(
                f"the outputs need {name!r} ({node.op}), which calls {some(functions)} as "
                "the graph runs: name what it gives as an input with `--inputs`, or name "
                "other outputs"
            )
        if node.op in _PYTHON:
            raise ExportError(
                f"the outputs need {name!r}, a Python function (tf.py_func) that is not "
                f"in the graph: name what it gives as an input: `--inputs {name}`"
            )
        if node.op in RANDOM:
            raise ExportError(
                f"the outputs depend on random numbers ({name!r}, {node.op}): set what "
                "turns them off with `--set NAME=VALUE`, or name other outputs"
            )
        if node.op in ASSIGNMENTS or _OF_TRAINING.match(node.op):
            raise ExportError(
                f"the outputs need {name!r} ({node.op}), which is for training: name "
                "other outputs"
            )


def _check_variances(view, layers, source):
    """Kernels make NaN of them, and a ReLU 0 of NaN: nothing would be seen outside."""
    for analysis in layers:
        for node in analysis.variables["moving_variance"]:
            name = view.names[node]
            value = source.values.read(name) if source.values.has(name) else np.zeros(1)
            if not np.all(value >= 0):
                raise ExportError(
                    f"the moving variance {name} has values that are below 0 or no "
                    "numbers: take another checkpoint, or recalibrate with `--recalibrate "
                    "--examples X.npz`"
                )


def _never_updated(view, layers, baked, source):
    """What is said of layers whose moving statistics are as they began.

    Whoever trained with the statistics of the batch and ran no updates served with them,
    too: with 0 and 1 in their place the model would be another one.
    """
    untouched = [
        analysis
        for analysis in layers
        if _is_constant(view, analysis, "moving_mean", (0,), source)
        and _is_constant(view, analysis, "moving_variance", (0, 1), source)
    ]
    if not untouched:
        return []
    training = find_training(view)
    of_batch = [
        analysis.layer.name
        for analysis in untouched
        if analysis.layer.name in baked
        and training.applies
        and not any(training.runs[update.node] for update in analysis.updates)
    ]
    if of_batch:
        raise ExportError(
            f"the moving statistics of {some(of_batch)} were never updated, and no "
            "training step updates them: recalibrate them with `--recalibrate --examples "
            "X.npz`"
        )
    names = some(analysis.layer.name for analysis in untouched)
    told = "as they began, all means 0 and all variances alike"
    return [f"the moving statistics of {names} {told}: `--recalibrate` computes them"]


def _is_constant(view, analysis, role, values, source):
    names = [view.names[node] for node in analysis.variables[role]]
    found = [source.values.read(name) for name in names if source.values.has(name)]
    return bool(found) and any(
        all(np.all(value == number) for value in found) for number in values
    )


def _freeze(graph, source):
    missing = [n for n in variables_in(graph) if not source.values.has(n)]
    if missing and source.values.prefix is None:
        raise ExportError(
            f"{source.path} has no checkpoint beside it, and {len(missing)} variables "
            f"({some(missing)}): give one with `--checkpoint`"
        )
    if missing:
        raise ExportError(
            f"the checkpoint {source.values.prefix} has no {some(missing)}: give the "
            "checkpoint of this graph with `--checkpoint`"
        )
    try:
        freeze(graph, source.values.read)
    except ValueError as error:
        raise ExportError(str(error)) from error
