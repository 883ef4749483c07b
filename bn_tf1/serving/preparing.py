"""From somebody's training graph to the graph that is served, with its values."""

from __future__ import annotations

import re
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.graphs.layer_analysis import Analysis
from bn_tf1.graphs.node_values import ASSIGNMENTS
from bn_tf1.graphs.rewriting.any_batch import unpack_views
from bn_tf1.graphs.rewriting.dead_branches import dtype_of, resolve
from bn_tf1.graphs.rewriting.dropout_removal import remove_dropout
from bn_tf1.graphs.rewriting.editable_graph import (
    EditableGraph,
    called_by,
    canonical,
    node_name,
    port_in,
    tensor_name,
)
from bn_tf1.graphs.rewriting.extraction import (
    clean_attributes,
    cut_at,
    drop_controls,
    extract,
)
from bn_tf1.graphs.rewriting.freezing import freeze, variables_in
from bn_tf1.graphs.rewriting.graph_interface import (
    PIPELINES,
    Candidate,
    Interface,
    candidate_of,
    find_interface,
)
from bn_tf1.graphs.rewriting.inference_mode import (
    PLACEHOLDERS,
    RANDOM,
    Mode,
    set_inference_mode,
)
from bn_tf1.graphs.rewriting.moving_statistics import take_moving_statistics
from bn_tf1.graphs.training_nodes import find_training
from bn_tf1.graphs.view import reference_to
from bn_tf1.serving.refusal import ExportError
from bn_tf1.serving.sources import Source

_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_OF_TRAINING = re.compile(
    r"(Resource)?(Sparse)?Apply[A-Z]|(Resource)?Scatter[A-Z]\w*(Add|Sub|Update)$|"
    r"\w+Grad(V\d+)?$"
)
_MOST_NAMED = 3


class Model(NamedTuple):
    """A graph that is served.

    Attributes:
        graph: the graph, with constants for variables.
        inputs: its placeholders.
        outputs: its outputs.
        before: the same outputs as the graph of the source has them, with the mode set
            and constants for variables, but nothing else changed; None where it has no
            inference mode.
        keys: what the source's signature calls inputs and outputs, by their names.
        batch_size: that of the source; None where it takes any.
        changed: what was done, a sentence each.
        left: what was left as it was, and why, a sentence each.
    """

    graph: EditableGraph
    inputs: tuple[Candidate, ...]
    outputs: tuple[Candidate, ...]
    before: EditableGraph | None
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
        dtype: the dtype of `x`.
    """

    name: str
    constants: tuple[str, ...]
    x: str
    axes: tuple[int, ...]
    dtype: tf.DType


class Wishes(NamedTuple):
    """What a user says of a graph; see `export`."""

    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    settings: Mapping[str, Any] = {}


def interface_of(source: Source, settings: Mapping[str, Any]) -> tuple[Interface, Mode]:
    """What goes into a graph and comes out of it, and the mode that was found."""
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
    served = _served_tensors(source)
    wished = wishes.outputs or [name for name, _ in served[1]]
    mode = _set_mode(source, wishes, wished)
    graph = mode.graph
    interface = _Interface(mode, wishes, served)
    outputs = interface.outputs()
    names = [node_name(canonical(c.tensor)) for c in outputs]
    drop_controls(graph, names)
    changed = _mode_notes(mode, wishes)
    layers = _needed_layers(mode, names)
    baked = take_statistics(graph, mode.view, layers)
    if baked:
        changed.append(
            f"{len(baked)} layers take statistics that they did not take in the graph: "
            f"{_some(baked)}"
        )
    given = [canonical(c.tensor) for c in interface.asked_inputs()]
    dropped = remove_dropout(
        graph, interface.data(names) + [node_name(n) for n in given]
    )
    if dropped:
        changed.append(f"dropout is taken out: {_some(dropped)}")
    inputs = interface.inputs(names)
    size = len(source.graph_def.node)
    made = _extracted(graph, inputs, outputs)
    before = None if baked else _before(source, mode, inputs, outputs)
    changed.append(f"{size} nodes became {len(made.graph.nodes)}")
    unpack_views(made.graph)
    extract(made.graph, made.names()[1])
    _check_clean(made.graph)
    for model in filter(None, (made.graph, before)):
        model.definitions = source.definitions
        _freeze(model, source)
        clean_attributes(model)
    left = []
    if take_statistics is take_moving_statistics:
        left = _never_updated(mode.view, layers, baked, source)
    served_keys = {graph.tensor(name): key for pairs in served for name, key in pairs}
    keys = {
        canonical(now.tensor): served_keys.get(canonical(then.tensor))
        for then, now in zip((*inputs, *outputs), (*made.inputs, *made.outputs))
    }
    return made._replace(
        before=before, keys=keys, changed=tuple(changed), left=tuple(left)
    )


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
                f"{_some(known) if known else 'none'}"
            )
    try:
        return set_inference_mode(graph, settings, source.definitions, outputs)
    except ValueError as error:
        raise ExportError(f"{source.path}: {error}") from error


def _some(names):
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


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


def _served_tensors(source):
    """([(key, tensor)], [(key, tensor)]) of the signature; empty without one."""
    if source.signature is None:
        return [], []
    return tuple(
        [
            (canonical(info.name), key)
            for key, info in sorted(infos.items())
            if info.name
        ]
        for infos in (source.signature.inputs, source.signature.outputs)
    )


# ------------------------------------------------------------------ inputs and outputs


class _Interface:
    """Which tensors go in and come out: as asked for, as served, or as found."""

    def __init__(self, mode: Mode, wishes: Wishes, served):
        self._mode = mode
        self._view = mode.view
        self._wishes = wishes
        self._served_inputs = [name for name, _ in served[0]]
        self._served_outputs = [name for name, _ in served[1]]
        self._known: Interface | None = None

    def found(self):
        if self._known is None:
            self._known = find_interface(self._view, self._mode.values)
        return self._known

    def outputs(self):
        names = self._wishes.outputs or self._served_outputs
        if names:
            return tuple(self._candidate(name, "outputs") for name in names)
        found = self.found().outputs
        if len(found) == 1:
            return found
        raise ExportError(
            f"the graph has {len(found) or 'no'} tensors that may be its output: name "
            "it with `--outputs`"
            + "".join(f"\n  {candidate}" for candidate in found[:40])
        )

    def asked_inputs(self):
        names = self._wishes.inputs or self._served_inputs
        return tuple(self._candidate(name, "inputs") for name in names)

    def _candidate(self, name, flag):
        tensor = self._mode.graph.tensor(name)
        node = self._view.find(tensor)
        if node is None:
            found = getattr(self.found(), flag)
            raise ExportError(
                f"`--{flag} {name}` names no tensor that there is in inference; the "
                "graph tells of"
                + ("".join(f"\n  {c}" for c in found[:40]) if found else " none")
            )
        return candidate_of(self._view, reference_to(node, port_in(tensor)))

    def data(self, outputs):
        """The nodes that data comes in by, as far as they are needed.

        A placeholder of any rank, as keep_prob often is one, is data where none other is.
        """
        needed = self._mode.graph.ancestors(outputs)
        found = [name for name in needed if self._is_source(name)]
        nodes = self._mode.graph.nodes
        return [
            name
            for name in found
            if nodes[name].op in PIPELINES or nodes[name].attr["shape"].shape.dim
        ] or found

    def _is_source(self, name):
        node = self._mode.graph.nodes[name]
        if node.op in PIPELINES:
            return True
        if node.op not in PLACEHOLDERS or _is_default(self._mode.graph, name):
            return False
        shape = node.attr["shape"].shape
        return bool(shape.dim) or shape.unknown_rank or "shape" not in node.attr

    def inputs(self, outputs):
        """The inputs that the outputs need."""
        graph = self._mode.graph
        asked = self.asked_inputs()
        cut = {canonical(c.tensor) for c in asked}
        needed = _needed_up_to(graph, outputs, cut)
        for candidate in asked:
            if node_name(canonical(candidate.tensor)) not in needed:
                raise ExportError(
                    f"`--inputs {candidate.tensor}`: no output needs it; they need "
                    f"{_some(sorted(self.data(outputs)))}"
                )
        found = []
        for name in graph.nodes:
            node = graph.nodes[name]
            if name not in needed or name in cut:
                continue
            if node.op == "PlaceholderWithDefault" and _is_default(graph, name):
                graph.make_identity(name, node.input[0])
            elif node.op in PLACEHOLDERS or node.op in PIPELINES:
                found += self._tensors(name, needed, cut)
        if self._wishes.inputs is None:
            found = self._without_labels(found)
            return asked + tuple(c for c in found if c not in asked)
        if found:
            raise ExportError(self._undecided(found[0]))
        return asked

    def _tensors(self, name, needed, cut):
        ports = sorted(
            {
                port_in(source)
                for user in needed
                for source in self._mode.graph.nodes[user].input
                if node_name(source) == name and not source.startswith("^")
            }
        )
        tensors = [tensor_name(name, port) for port in ports or [0]]
        tensors = [self._named(tensor, needed) for tensor in tensors]
        return [self._candidate(t, "inputs") for t in tensors if t not in cut]

    def _named(self, tensor, needed):
        """What the program called a value of its input pipeline, where it gave a name."""
        nodes = self._mode.graph.nodes
        if nodes[node_name(tensor)].op in PLACEHOLDERS:
            return tensor
        while True:
            users = [name for name in needed if tensor in nodes[name].input]
            if len(users) != 1 or nodes[users[0]].op != "Identity":
                return tensor
            tensor = users[0]

    def _without_labels(self, candidates):
        known = self.found()
        for candidate in candidates:
            if candidate in known.labels or candidate.shape == ():
                raise ExportError(self._undecided(candidate))
        return candidates

    def _undecided(self, candidate):
        name = canonical(candidate.tensor)
        if candidate in self.found().labels:
            return (
                f"the outputs depend on {candidate}, which looks like a label: name "
                f"other outputs, or name it as an input with `--inputs`"
            )
        if (
            candidate.shape == ()
            or candidate.dtype is not None
            and (candidate.dtype.name == "bool")
        ):
            return (
                f"the outputs depend on {candidate}: give its value with "
                f"`--set {name}=VALUE`, or name it with `--inputs`"
            )
        return (
            f"the outputs depend on {candidate}: name it with `--inputs`, or give its "
            f"value with `--set {name}=VALUE`"
        )


def _is_default(graph, name):
    """Whether a placeholder has a default that is constant."""
    node = graph.nodes[name]
    if node.op != "PlaceholderWithDefault":
        return False
    return all(
        graph.nodes[source].op not in (*PIPELINES, "Placeholder", "PlaceholderV2")
        for source in graph.ancestors([node_name(node.input[0])])
    )


def _is_fed(graph, name):
    """Whether data comes in at a node, so that nothing before it is needed."""
    op = graph.nodes[name].op
    is_default = op == "PlaceholderWithDefault" and not _is_default(graph, name)
    return op in PIPELINES or is_default


def _needed_up_to(graph, outputs, cut):
    """The nodes that the outputs need when the tensors `cut` are given."""
    found = set(outputs)
    pending = list(found)
    while pending:
        for source in graph.nodes[pending.pop()].input:
            name = node_name(source)
            if name in found or name not in graph.nodes:
                continue
            found.add(name)
            if source not in cut and not _is_fed(graph, name):
                pending.append(name)
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
    return Model(graph, made_inputs, made_outputs, None, {}, size, (), ())


def with_stored_pixels(model: Model, scale: float) -> Model:
    """The model with inputs of uint8, which are multiplied by `scale` in its graph."""
    graphs = [
        graph.copy() for graph in (model.graph, model.before) if graph is not None
    ]
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
        before=graphs[1] if len(graphs) > 1 else None,
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


def _before(source: Source, mode: Mode, inputs, outputs) -> EditableGraph:
    """The graph of the source, with TensorFlow's own control flow."""
    graph = EditableGraph(source.graph_def)
    resolve(graph, {}, source.definitions)
    for name, value in mode.values.items():
        if name in graph.nodes:
            graph.make_constant(name, np.asarray(value, dtype_of(graph, name)))
    drop_controls(graph, [node_name(canonical(c.tensor)) for c in outputs])
    return _extracted(graph, inputs, outputs).graph


def _check_clean(graph):
    for name, node in graph.nodes.items():
        functions = called_by([node], graph.functions)
        if functions:
            # A layer in there would keep its mode, and a variable could not be frozen.
            raise ExportError(
                f"the outputs need {name!r} ({node.op}), which calls {_some(functions)} as "
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
            f"the moving statistics of {_some(of_batch)} were never updated, and no "
            "training step updates them: recalibrate them with `--recalibrate --examples "
            "X.npz`"
        )
    names = _some(analysis.layer.name for analysis in untouched)
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
            f"({_some(missing)}): give one with `--checkpoint`"
        )
    if missing:
        raise ExportError(
            f"the checkpoint {source.values.prefix} has no {_some(missing)}: give the "
            "checkpoint of this graph with `--checkpoint`"
        )
    try:
        freeze(graph, source.values.read)
    except ValueError as error:
        raise ExportError(str(error)) from error
