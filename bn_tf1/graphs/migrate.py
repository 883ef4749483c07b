"""Makes a training graph of TensorFlow 1.15 importable by TensorFlow 2.x.

A .meta file stores the shapes of each operation's outputs as they were inferred when it
was written, and the import compares them with what it infers itself. For the gradient of
a fused batch norm in inference mode the two disagree: TensorFlow 1.15 gives the unused
outputs 3 and 4 the shape [C], 2.x the shape [0]. The import (2.21) then fails with
"Node ... FusedBatchNormGradV3 has an _output_shapes attribute inconsistent with the
GraphDef for output #3". The stored shapes are a note, not part of the computation, so
they are removed from these gradients, in the graph and in its function library.

Layers of `bn_tf1` get TensorFlow's own gradients, so that a program which has not imported
`bn_tf1` can go on training them (`rewriting.native_gradients`). Those of kernel="compiled" get
TensorFlow's own operations (`rewriting.compiled_operations`).

Contract: nothing else is changed. The result is really imported, in a scratch graph,
before it is written; on 1.15 that shows less than on 2.x, which is where it counts.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints.reader_writer import (
    CheckpointError,
    first_line,
    read_meta_graph,
)
from bn_tf1.graphs.rewriting.compiled_operations import replace_compiled
from bn_tf1.graphs.rewriting.native_gradients import give_native_gradients

_GRADIENT = re.compile(r"FusedBatchNormGrad(V\d+)?$")
_ATTRIBUTE = "_output_shapes"


class MigrationError(ValueError):
    """A graph that this TensorFlow does not import, whatever is removed from it."""


class Migration(NamedTuple):
    """What `migrate_graph` changed; its str() lists it.

    Attributes:
        changed: names of the nodes whose stored shapes were removed, those of a
            function as function:node.
        replaced: names of the nodes of kernel="compiled" that TensorFlow's own operations
            replaced.
        native: names of the nodes, of layers of `bn_tf1`, that have TensorFlow's own
            gradient now.
        tensorflow: the version that imported the result.
    """

    changed: tuple[str, ...]
    tensorflow: str
    native: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"removed {_ATTRIBUTE} of {name}" for name in self.changed]
        lines += [f"gave {name} TensorFlow's own gradient" for name in self.native]
        lines += [
            f"replaced {name} by TensorFlow's own operations" for name in self.replaced
        ]
        if not (self.changed or self.native or self.replaced):
            lines.append("nothing had to be changed")
        lines.append(f"TensorFlow {self.tensorflow} imports the result")
        return "\n".join(lines)


def migrate_graph(source: str, destination: str) -> Migration:
    """Writes the .meta file `source` to `destination` such that 2.x imports it.

    Args:
        source: a binary .meta file, as tf.train.Saver writes it.
        destination: the file to write; it must not exist.

    Returns:
        The `Migration`.

    Raises:
        CheckpointError: `source` is missing or no .meta file; `destination` exists or
            cannot be written.
        MigrationError: this TensorFlow cannot import the result: the error names the
            nodes with operations that it does not know, or quotes what it says.
    """
    meta = read_meta_graph(source)
    _check_new(destination)  # before any work
    changed = _remove_stored_shapes(meta.graph_def)
    replaced = replace_compiled(meta)
    native = give_native_gradients(meta)
    content = meta.SerializeToString()
    # The import of 2.x writes into what it is given.
    _check_importable(tf.MetaGraphDef.FromString(content), source)
    try:
        # "x": somebody may have made it since it was looked for.
        with open(destination, "xb") as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(
            f"{destination} cannot be written: {error.strerror}"
        ) from error
    return Migration(tuple(changed), tf.version.VERSION, tuple(native), tuple(replaced))


def _check_new(destination):
    if os.path.exists(destination):
        raise CheckpointError(f"{destination} exists, and nothing is written over")
    folder = os.path.dirname(destination) or "."
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{destination}: there is no directory {folder}: make it, or give another"
        )


def _remove_stored_shapes(graph_def):
    changed = []
    for name, node in _nodes(graph_def):
        if _GRADIENT.match(node.op) and _ATTRIBUTE in node.attr:
            del node.attr[_ATTRIBUTE]
            changed.append(name)
    return changed


def _nodes(graph_def):
    """(name, NodeDef) of the graph and of its functions (cond and while bodies)."""
    for node in graph_def.node:
        yield node.name, node
    for function in graph_def.library.function:
        for node in function.node_def:
            yield f"{function.signature.name}:{node.name}", node


def _check_importable(meta, source):
    # The import names one of them; somebody who has to register them wants all.
    unknown = _unknown_operations(meta.graph_def)
    if unknown:
        nodes = [
            f"{name} ({node.op})"
            for name, node in _nodes(meta.graph_def)
            if node.op in unknown
        ]
        raise MigrationError(
            f"{source} has operations that TensorFlow {tf.version.VERSION} does not "
            f"know: {', '.join(nodes)}"
        )
    try:
        with tf.Graph().as_default():
            tf.train.import_meta_graph(meta)
    except (tf.errors.OpError, ValueError, KeyError, TypeError) as error:
        raise MigrationError(
            f"{source} cannot be imported by TensorFlow {tf.version.VERSION}: "
            f"{first_line(error)}"
        ) from error


def _unknown_operations(graph_def):
    # A function is called by an operation of its name, which is known by that alone.
    functions = {function.signature.name for function in graph_def.library.function}
    operations = {node.op for _, node in _nodes(graph_def)} - functions
    return {operation for operation in operations if not _is_registered(operation)}


def _is_registered(operation):
    """There is no public list of all operations, but the import knows them."""
    if hasattr(tf.raw_ops, operation):
        return True
    graph_def = tf.GraphDef()
    graph_def.node.add(name="node", op=operation)
    try:
        with tf.Graph().as_default():
            tf.import_graph_def(graph_def, name="")
    except (tf.errors.OpError, ValueError, KeyError, TypeError) as error:
        # A known operation fails for want of inputs or attributes instead.
        return "not registered" not in str(error)
    return True
