"""Reading and writing name-based checkpoints, with errors of one line.

Contract: a checkpoint is given by its prefix ("model.ckpt-1000") or by its directory,
whose newest checkpoint is meant. TensorFlow's own reader reads it, and its first format,
V1, too; what may be hostile is for `tensor_file`. `write_checkpoint` never replaces a file,
holds no more than about `_SHARD_BYTES` (or one larger tensor) in memory, takes every dtype
that TensorFlow can save, and compares the result with its source bit for bit.

TensorFlow reports a missing or damaged checkpoint with OpError, ValueError, IndexError
or RuntimeError, depending on the version and the damage; here it is a `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf
from google.protobuf.message import DecodeError

from bn_tf1.checkpoints.dialects import Shape, natural_key
from bn_tf1.formats.file_signatures import other_format
from bn_tf1.formats.sorted_table import is_table

# How many checkpoints an error lists, the newest of them.
_MOST_LISTED = 8
_SHARD_BYTES = 256 * 2**20
_PART_OF_A_CHECKPOINT = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class CheckpointError(ValueError):
    """A checkpoint or graph file that is missing, damaged or of another kind."""


class Checkpoint(NamedTuple):
    """An open checkpoint.

    Attributes:
        prefix: its path without ".index".
        shapes: shape by name.
        dtypes: dtype by name.
        reader: TensorFlow's reader; `read` turns its errors into `CheckpointError`.
    """

    prefix: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, tf.DType]
    reader: Any

    def read(self, name: str) -> np.ndarray:
        """The value of the tensor `name`."""
        with _one_line_errors(f"{self.prefix} cannot be read"):
            return np.asarray(self.reader.get_tensor(name))


class Entry(NamedTuple):
    """One tensor of a checkpoint to be written.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype.
        source: the tensor of the source checkpoint that it is, reshaped to `shape`; or
            None for a tensor filled with `fill`.
        fill: a number, or an array of `shape`.
    """

    name: str
    shape: Shape
    dtype: tf.DType
    source: str | None
    fill: Any = 0.0


def open_checkpoint(path: str, *, by_object: bool = False) -> Checkpoint:
    """Opens a checkpoint, given by its prefix or its directory.

    Args:
        path: the prefix or directory.
        by_object: whether it may be an object-based one, whose names are ways to objects.

    Raises:
        CheckpointError: there is none at `path`, it is damaged, or it is an
            object-based one.
    """
    prefix = _prefix(os.fspath(path))
    with _one_line_errors(f"{prefix} cannot be read"):
        try:
            reader = tf.train.NewCheckpointReader(prefix)
        except (tf.errors.OpError, ValueError, IndexError, RuntimeError):
            # Where our own reader sees the damage, too, it says it in plain words.
            # Here, since that module has the errors of this one.
            from bn_tf1.checkpoints.tensor_file import open_tensors

            open_tensors(prefix)
            raise
        shapes = reader.get_variable_to_shape_map()
        dtypes = reader.get_variable_to_dtype_map()
    # Its names are ways to objects, which a conversion by name would make worthless.
    if OBJECT_GRAPH in shapes and not by_object:
        raise CheckpointError(
            f"{prefix} is an object-based checkpoint of tf.train.Checkpoint, but only "
            "name-based ones, as tf.compat.v1.train.Saver writes them, can be used"
        )
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    return Checkpoint(prefix, shapes, dtypes, reader)


def _prefix(path):
    if os.path.isdir(path):
        with _one_line_errors(f"{path} cannot be read"):
            prefix = tf.train.latest_checkpoint(path)
        if prefix is None:
            raise CheckpointError(_why_none_in(path))
        return prefix
    prefix = _PART_OF_A_CHECKPOINT.sub("", path)
    if prefix != path:
        raise CheckpointError(f"{path} is one file of a checkpoint: give {prefix}")
    if os.path.exists(path + ".index"):
        return path
    if not os.path.exists(path):
        raise CheckpointError(
            f"there is no checkpoint {path}{checkpoints_beside(path)}"
        )
    # In TensorFlow's first format a checkpoint is one file, its index and all, and
    # TensorFlow would say of another file what its bytes are not.
    if not is_table(path):
        raise CheckpointError(
            f"{path} is no checkpoint of TensorFlow: give the prefix of one, which is "
            "the path of its .index file without that ending"
        )
    return path


def _why_none_in(directory):
    inner = glob.glob(os.path.join(glob.escape(directory), "*", "checkpoint"))
    if not inner:
        return (
            f"directory {directory} names no checkpoint in its file `checkpoint`: give "
            f"the prefix of one{checkpoints_beside(os.path.join(directory, ''))}"
        )
    runs = sorted(map(os.path.dirname, inner), key=natural_key)
    more = ", ..." if len(runs) > _MOST_LISTED else ""
    return (
        f"directory {directory} has no checkpoint, but {len(runs)} in it have: "
        f"{', '.join(runs[:_MOST_LISTED])}{more}: give one of them"
    )


def checkpoints_beside(path: str) -> str:
    """The checkpoints in the folder of a mistyped path, for an error; "" for none."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f": there is no directory {folder}"
    found = glob.glob(os.path.join(glob.escape(folder), "*.index"))
    names = [os.path.basename(file)[: -len(".index")] for file in found]
    if not names:
        return ""
    names.sort(key=natural_key)
    listed = ", ".join(names[-_MOST_LISTED:])
    left = len(names) - _MOST_LISTED
    return f"; in {folder} there are: {listed}" + f", and {left} more" * (left > 0)


@contextlib.contextmanager
def _one_line_errors(what):
    try:
        yield
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        # It is a ValueError, in a line already.
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of Python or TensorFlow says happened, without where."""
    message = str(getattr(error, "message", None) or error).strip()
    # TensorFlow 2 first says where each operation that took part was built.
    what = re.sub(r"\AGraph execution error:\s*", "", message)
    built = r"Detected at node .*?\nNode: [^\n]*\n+"
    what = re.sub(built, "", what, flags=re.DOTALL).strip()
    # A session on tf.train.Server first says which of the processes it was.
    line = re.sub(r"\AFrom /job:[^\n]*:\n", "", what).split("\n")[0]
    # What a tf.Assert was given to say: each part in brackets, its quotes escaped.
    said = re.fullmatch(r"assertion failed: \[(.*)\]", line)
    if said is not None:
        line = re.sub(r"\] \[(.*)", r" [\1]", said.group(1)).replace("\\'", "'")
    return line or "no reason given"


def graph_variables(graph_def: tf.GraphDef) -> dict[str, Shape]:
    """The variables of `graph_def` by name, with their shapes.

    A variable without a static shape is left out.
    """
    return {
        node.name: tuple(size.size for size in node.attr["shape"].shape.dim)
        for node in graph_def.node
        if node.op in ("Variable", "VariableV2", "VarHandleOp")
        and not node.attr["shape"].shape.unknown_rank
    }


def read_meta_graph(path: str) -> tf.MetaGraphDef:
    """Parses a binary .meta file without importing its graph.

    Raises:
        CheckpointError: there is no such file, or it is none.
    """
    prefix = _PART_OF_A_CHECKPOINT.sub("", path)
    graph = prefix + ".meta"
    if path not in (graph, prefix) and os.path.exists(graph):
        raise CheckpointError(
            f"{path} is a part of a checkpoint: give its graph, {graph}"
        )
    # Only parsed: TensorFlow 2 refuses to import some graphs of 1.15.
    meta = tf.MetaGraphDef()
    try:
        with open(path, "rb") as file:
            content = file.read()
        meta.ParseFromString(content)
    except OSError as error:
        if os.path.exists(path + ".meta"):
            raise CheckpointError(
                f"{path} is the prefix of a checkpoint: give its graph, {path}.meta"
            ) from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        what = other_format(content, os.path.basename(path))
        raise CheckpointError(
            f"{path} is {what + ', and ' if what else ''}no MetaGraphDef, as a .meta file is"
        ) from error
    if not meta.graph_def.node:
        raise CheckpointError(f"{path} is no MetaGraphDef with a graph")
    return meta


def write_checkpoint(
    destination: str, source: Checkpoint, entries: Sequence[Entry]
) -> None:
    """Writes `entries` to the new checkpoint `destination` and reads them back.

    Args:
        destination: a prefix at which there is no file yet, in an existing directory.
        source: the checkpoint that the entries are taken from.
        entries: what to write, at least one.

    Raises:
        CheckpointError: there is something at `destination`; `source` cannot be read,
            `destination` not be written, or what was written is not what was read.
            Nothing is left behind.
    """
    check_new(destination)
    try:
        with _one_line_errors(f"{source.prefix} cannot be copied to {destination}"):
            _write_shards(destination, source, entries)
        _check_written(destination, source, entries)
    # Whatever ends it, Ctrl-C among it: half a checkpoint would look like one.
    except BaseException:
        for path in _files_of(destination):
            os.remove(path)
        raise
    finally:
        shutil.rmtree(_temporary(destination), ignore_errors=True)


def check_new(destination: str) -> None:
    """Raises CheckpointError unless a checkpoint can be made at `destination`."""
    if os.path.isdir(destination):
        raise CheckpointError(
            f"{destination} exists as a directory, and nothing is written over: give a "
            f"prefix, such as {os.path.join(destination, 'model.ckpt')}"
        )
    others = (_temporary(destination), destination)
    there = _files_of(destination) + [path for path in others if os.path.lexists(path)]
    if there:
        raise CheckpointError(
            f"{destination} exists ({there[0]}), and nothing is written over"
        )
    folder = os.path.dirname(destination) or "."
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{destination}: there is no directory {folder}: make it, or give another"
        )


def _files_of(prefix):
    escaped = glob.escape(prefix)
    return glob.glob(escaped + ".index") + glob.glob(escaped + ".data-*")


def _temporary(destination):
    # Beside the destination: the shards are renamed, which is done within a file
    # system.
    return destination + ".part"


def _write_shards(destination, source, entries):
    shards = list(_shards(entries))
    parts = [
        os.path.join(_temporary(destination), f"part-{i:05d}-of-{len(shards):05d}")
        for i in range(len(shards))
    ]
    for part, shard in zip(parts, shards):
        # A graph for each: one of all would keep the constants of every shard.
        with tf.Graph().as_default():
            _run(_save_operation(part, source, shard))
    with tf.Graph().as_default():
        _run(
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts,
                destination_prefix=destination,
                delete_old_dirs=True,
            )
        )


def _shards(entries):
    shard, size = [], 0
    for entry in entries:
        entry_size = int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.size
        # A tensor is never divided: one larger than a shard is a shard.
        if shard and size + entry_size > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry_size
    yield shard


def _save_operation(prefix, source, entries):
    # Restore and save operations take what has no NumPy dtype: bfloat16, variants.
    tensors = [
        tf.broadcast_to(tf.constant(entry.fill, entry.dtype), entry.shape)
        if entry.source is None
        else _restored(source, entry)
        for entry in entries
    ]
    return tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[entry.name for entry in entries],
        shape_and_slices=[""] * len(entries),
        tensors=tensors,
    )


def _restored(source, entry):
    (tensor,) = tf.raw_ops.RestoreV2(
        prefix=source.prefix,
        tensor_names=[entry.source],
        shape_and_slices=[""],
        dtypes=[entry.dtype],
    )
    if entry.shape == source.shapes[entry.source]:
        return tensor
    return tf.reshape(tensor, entry.shape)


def _run(operation):
    # A session would take all memory of a GPU that may be training.
    with tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
        session.run(operation)


def _check_written(destination, source, entries):
    written = open_checkpoint(destination)
    if set(written.shapes) != {entry.name for entry in entries}:
        raise CheckpointError(f"{destination} was written with other names than asked")
    for entry in entries:
        name = entry.name
        same = written.shapes[name] == entry.shape
        same = same and written.dtypes[name] == entry.dtype
        # Variants, such as the state of an input iterator, cannot be read in Python.
        if same and entry.dtype != tf.variant:
            same = _same_bits(written.read(name), _expected(source, entry))
        if not same:
            raise CheckpointError(f"{destination}: {name} was not written as it was")


def _expected(source, entry):
    if entry.source is None:
        return np.full(entry.shape, entry.fill, entry.dtype.as_numpy_dtype)
    return source.read(entry.source).reshape(entry.shape)


def _same_bits(a, b):
    if a.dtype == object:  # strings
        return a.shape == b.shape and bool(np.all(a == b))
    # Not by value: NaN differs from itself, and 0.0 does not differ from -0.0.
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
