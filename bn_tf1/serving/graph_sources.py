"""What is exported: somebody's graph, with the values of its variables.

    X.meta, or the prefix X of a checkpoint that has one    tf.train.Saver's
    a directory with a `checkpoint` file                    its newest checkpoint
    a frozen graph, graph.pbtxt                             no variables, or a checkpoint
    the directory of a SavedModel                           of 1.x and of 2.x

Contract: files are parsed, and nothing is imported. Which tensor of the checkpoint is
which variable is what the saver in the graph says; without one, variables are called as
they are in the graph.
"""

from __future__ import annotations

import glob
import os
from typing import Any, Mapping, NamedTuple

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.object_names import variable_names
from bn_tf1.checkpoints.reader_writer import (
    OBJECT_GRAPH,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.graphs.node_values import constant, origin, variables_of
from bn_tf1.graphs.reading.graph_files import load_graph_file
from bn_tf1.graphs.rewriting.compiled_operations import replace_in_graph
from bn_tf1.graphs.rewriting.function_inlining import operation_definitions
from bn_tf1.graphs.view import GraphView, ancestors, node_of, view_of

# By operation, where the tensors begin; SaveSlices writes the first format.
_SAVES = {"SaveV2": 3, "SaveSlices": 3}


class Source(NamedTuple):
    """A graph to export.

    Attributes:
        path: the file that the graph was read from.
        graph_def: the graph.
        meta: the MetaGraphDef around it without the graph, or None.
        definitions: OpDef by operation, as far as the file has them.
        signature: the SignatureDef that is served, or None.
        values: the values of the variables.
    """

    path: str
    graph_def: tf.GraphDef
    meta: Any
    definitions: Mapping[str, Any]
    signature: Any
    values: VariableValues


class VariableValues:
    """The values of a graph's variables in a checkpoint.

    Attributes:
        prefix: the checkpoint, or None.
    """

    def __init__(self, checkpoint: Checkpoint | None, places: Mapping[str, tuple]):
        self._checkpoint = checkpoint
        self._places = places
        self.prefix = checkpoint.prefix if checkpoint is not None else None

    def has(self, variable: str) -> bool:
        """Whether the checkpoint has a value for the variable."""
        return self._checkpoint is not None and (
            self._places.get(variable, (variable,))[0] in self._checkpoint.shapes
        )

    def read(self, variable: str) -> np.ndarray:
        """The value of a variable, or of a part of a partitioned one.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        if not self.has(variable):
            raise CheckpointError(
                f"the variable {variable} is not in the checkpoint {self.prefix}"
            )
        name, part = self._places.get(variable, (variable, ""))
        value = self._checkpoint.read(name)
        return value[_slices(part)] if part else value


def open_source(path: str, checkpoint: str | None = None) -> Source:
    """Opens what is to be exported.

    Args:
        path: see the module.
        checkpoint: the prefix or directory of the checkpoint, where it is not the one
            that belongs to `path`.

    Raises:
        ValueError: something is missing, damaged or of another kind.
    """
    file, prefix = _files_of(os.fspath(path))
    loaded = load_graph_file(file)
    graph_def = tf.GraphDef()
    graph_def.node.extend(loaded.graph.nodes)
    for function in loaded.graph.functions:
        # Of large files the bodies are parsed apart.
        whole = graph_def.library.function.add()
        whole.CopyFrom(function.definition)
        if not whole.node_def:
            whole.node_def.extend(function.nodes)
    # By this TensorFlow knows how an old graph means its operations.
    graph_def.versions.producer = loaded.producer
    replace_in_graph(graph_def)
    view = view_of(graph_def)
    values = _values(view, loaded.meta, checkpoint or prefix)
    return Source(
        file,
        graph_def,
        loaded.meta,
        operation_definitions(loaded.meta),
        _served_signature(loaded.meta),
        values,
    )


def _files_of(path):
    """(file of the graph, prefix of its checkpoint or None) of what a user names."""
    if os.path.isdir(path):
        if glob.glob(os.path.join(glob.escape(path), "saved_model.pb*")):
            prefix = os.path.join(path, "variables", "variables")
            return path, prefix if os.path.exists(prefix + ".index") else None
        prefix = open_checkpoint(path).prefix
        return _meta_of(prefix), prefix
    if path.endswith(".meta"):
        prefix = path[: -len(".meta")]
        has_one = os.path.exists(prefix + ".index") or os.path.exists(prefix)
        return path, prefix if has_one else None
    if os.path.exists(path + ".meta"):
        return path + ".meta", path
    if not os.path.exists(path):
        # A prefix is no file: this says what there is where it is none.
        open_checkpoint(path)
        return _meta_of(path), path
    return path, None


def _meta_of(prefix):
    if os.path.exists(prefix + ".meta"):
        return prefix + ".meta"
    graph = os.path.join(os.path.dirname(prefix), "graph.pbtxt")
    if os.path.exists(graph):
        return graph
    raise ValueError(
        f"the checkpoint {prefix} has no .meta file and no graph.pbtxt beside it: give "
        "the file of the graph, and the checkpoint with `--checkpoint`"
    )


def _served_signature(meta):
    if meta is None:
        return None
    # TensorFlow 2 keeps __saved_model_init_op among them, and estimators training.
    signatures = {
        key: signature
        for key, signature in meta.signature_def.items()
        if signature.outputs and not key.startswith("__") and "train" not in key
    }
    if "serving_default" in signatures:
        return signatures["serving_default"]
    return signatures[min(signatures)] if len(signatures) == 1 else None


# ------------------------------------------------------------------------------- values


def _values(view, meta, prefix):
    if prefix is None:
        return VariableValues(None, {})
    checkpoint = open_checkpoint(prefix, by_object=True)
    if OBJECT_GRAPH in checkpoint.shapes:
        places = _places_by_object(
            view, variable_names(open_tensors(checkpoint.prefix))
        )
    else:
        places = _saved_places(view, meta)
    return VariableValues(checkpoint, places)


def _saved_places(view: GraphView, meta: Any) -> dict[str, tuple[str, str]]:
    """(name in the checkpoint, slice) by variable, as the savers of a graph write it."""
    saves = [
        node
        for node, op in enumerate(view.ops)
        if op in _SAVES and len(view.inputs[node]) > _SAVES[op]
    ]
    if meta is not None and meta.HasField("saver_def"):
        own = view.find(meta.saver_def.save_tensor_name)
        if own is not None:
            needed = ancestors(view, [own])
            # Another saver may call a variable by the name of its average.
            saves = [n for n in saves if needed[n]] or saves
    places: dict[str, tuple[str, str]] = {}
    for node in saves:
        names, parts = (_strings(view, r) for r in view.inputs[node][1:3])
        tensors = view.inputs[node][_SAVES[view.ops[node]] :]
        if names is None or parts is None:
            continue
        for name, part, tensor in zip(names, parts, tensors):
            # One variable is saved by each; the first saver that names it is taken.
            for variable in variables_of(view, tensor)[:1]:
                places.setdefault(view.names[variable], (name, part))
    return places


def _strings(view, reference):
    array = constant(view, node_of(origin(view, reference)))
    if array is None or array.dtype != object:
        return None
    return [value.decode("utf-8", "replace") for value in array.reshape(-1)]


def _places_by_object(view, keys):
    """What the variables are called in the program, `keys` has by object."""
    places = {}
    for node, op in enumerate(view.ops):
        if op == "VarHandleOp":
            shared = view.attribute(node, "shared_name")
            name = shared.s.decode("utf-8") if shared is not None else ""
            key = keys.get(name) or keys.get(view.names[node])
            if key is not None:
                places[view.names[node]] = (key, "")
    return places


def _slices(part):
    """The slices of "10 4 0,5:-", a part of a tensor of shape [10, 4]."""
    slices = []
    for piece in part.rpartition(" ")[2].split(":"):
        if piece == "-":
            slices.append(slice(None))
        else:
            start, size = (int(number) for number in piece.split(","))
            slices.append(slice(start, start + size))
    return tuple(slices)
