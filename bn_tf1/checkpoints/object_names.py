"""What the variables of a checkpoint that was saved by object are called in the program.

tf.train.Checkpoint, Keras and the SavedModels of TensorFlow 2 name a tensor by the way
to its variable (`model/_operations/2/gamma`, `variables/3`), and keep beside it the name
that the variable has in the program and in its graph (`bn_a/gamma`).

Source: tensorflow/core/protobuf/trackable_object_graph.proto (the same fields as
checkpointable_object_graph.proto before TensorFlow 1.14); a string tensor is written as
its length, four bytes of checksum, and its bytes (tensor_bundle.cc, WriteStringTensor).
"""

from __future__ import annotations

import re
from typing import Any, Iterable

from bn_tf1.checkpoints.dialects import ROLES, natural_key
from bn_tf1.checkpoints.found_layers import plain_names
from bn_tf1.checkpoints.reader_writer import OBJECT_GRAPH, CheckpointError
from bn_tf1.checkpoints.tensor_file import TensorFile
from bn_tf1.formats.wire_format import by_number, bytes_in, read_varint

_MAX_BYTES = 1 << 28
_CHECKSUM_BYTES = 4
# A variable that only a list holds; the way to it tells nothing of what it is.
_IN_A_LIST = re.compile(r"(^|/)(_all_variables|(\w+_)?variables)/\d+$")


def is_saved_by_object(file: TensorFile) -> bool:
    """Whether the checkpoint was saved by object, and not by name."""
    return OBJECT_GRAPH in file.tensors


def variable_names(file: TensorFile) -> dict[str, str]:
    """Name in the checkpoint by variable name, as far as the program's are known.

    A variable whose name has no scope, or that several have, is called by the way to it.

    Raises:
        CheckpointError: the description of the objects is damaged.
    """
    plain = plain_names(file.tensors)
    if not is_saved_by_object(file):
        return plain
    try:
        names = _names_by_key(_string(file))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file.prefix}: {OBJECT_GRAPH} is damaged: {error}"
        ) from error
    ways: dict[str, list[str]] = {}
    for way in sorted(plain, key=natural_key):
        name = names.get(plain[way]) or way
        # Keras 3 calls each gamma `gamma`: the way to it tells its layer.
        tells_more = "/" in name or _IN_A_LIST.search(way)
        ways.setdefault(name if tells_more else way, []).append(way)
    found = {}
    for name, same in ways.items():
        if all(_IN_A_LIST.search(way) for way in same):
            same = same[:1]  # two lists hold one variable
        found.update({name if len(same) == 1 else way: plain[way] for way in same})
    return found


def as_in_checkpoint(file: TensorFile, graph_layers: Iterable[Any]) -> list[Any]:
    """Layers of a graph, with their variables called as `variable_names` calls them.

    A SavedModel numbers the variables of its graph when several objects hold them.
    """
    layers = list(graph_layers)
    if not is_saved_by_object(file):
        return layers
    known = variable_names(file)
    renamed = []
    for layer in layers:
        for role in ROLES:
            name = getattr(layer, role)
            # Only where the numbered name is unknown: conv_1 may be a layer's own name.
            unnumbered = re.sub(r"_\d+$", "", name) if name else name
            if name not in known and unnumbered in known:
                layer = layer._replace(**{role: unnumbered})
        renamed.append(layer)
    return renamed


def _string(file):
    part = file.tensors[OBJECT_GRAPH].parts[0]
    if part.size > _MAX_BYTES:
        raise ValueError(f"it has {part.size} bytes, but at most {_MAX_BYTES} are read")
    with open(part.path, "rb") as data_file:
        data_file.seek(part.offset)
        data = data_file.read(part.size)
    length, start = read_varint(data, 0)
    # The checksum of a string tensor is none of its bytes alone: the length is checked.
    content = data[start + _CHECKSUM_BYTES :]
    if length != len(content):
        raise ValueError(f"it has {len(content)} bytes, but should have {length}")
    return content


def _names_by_key(graph):
    """By key in the checkpoint, the `full_name` of the variable."""
    found = {}
    for node in bytes_in(by_number(graph), 1):
        for attribute in bytes_in(by_number(node), 2):
            texts = by_number(attribute)
            name, key = (b"".join(bytes_in(texts, n)[-1:]) for n in (2, 3))
            found[key.decode("utf-8")] = name.decode("utf-8")
    return found
