"""Checkpoints for tests: written by TensorFlow from plain values, or forged byte by byte.

The forger knows nothing of the reader under test: it writes the table and the messages of
an index from their documentation, with checksums computed bit by bit, so that an index can
be valid in form and absurd in content.
"""

from __future__ import annotations

import struct
from typing import Mapping

import numpy as np
import tensorflow.compat.v1 as tf

from tests import FIXTURES

ORIGINS = (
    "tf_layers",
    "contrib",
    "tf_slim",
    "sonnet",
    "sonnet_v2",
    "tensorpack",
    "keras",
)


def read_all(prefix) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name, with TensorFlow's reader."""
    reader = tf.train.NewCheckpointReader(str(prefix))
    return {
        name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
    }


def write(prefix, values: Mapping[str, np.ndarray], **saver) -> str:
    """Writes `values` as the checkpoint `prefix`, without a graph; returns its path."""
    with tf.Graph().as_default(), tf.Session() as session:
        inputs, variables = {}, {}
        for i, (name, value) in enumerate(values.items()):
            value = np.asarray(value)
            inputs[i] = tf.placeholder(value.dtype, value.shape)
            variables[name] = tf.Variable(
                inputs[i], validate_shape=True, use_resource=False
            )
        feed = {inputs[i]: value for i, value in enumerate(values.values())}
        session.run([v.initializer for v in variables.values()], feed)
        saver = tf.train.Saver(variables, **saver)
        return saver.save(
            session, str(prefix), write_meta_graph=False, write_state=False
        )


def converged(origin: str) -> dict[str, np.ndarray]:
    """The fixture of `origin` as if it had been trained for long."""
    values = read_all(FIXTURES / origin / "model.ckpt")
    for name in values:
        if name.split("/")[-1] in ("global_step", "iterations", "iter"):
            values[name] = np.asarray(100_000, values[name].dtype)
    values.setdefault("global_step", np.int64(100_000))
    return values


def crc32c(data: bytes) -> int:
    """The masked checksum, bit by bit."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    remainder ^= 0xFFFFFFFF
    return ((remainder >> 15 | remainder << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def message(**fields) -> bytes:
    """A protocol buffer of f<number>=value: ints are varints, "fixed32" for field 6."""
    encoded = b""
    for key, values in fields.items():
        number = int(key[1:])
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, bytes):
                encoded += varint(number << 3 | 2) + varint(len(value)) + value
            elif number == 6:
                encoded += varint(number << 3 | 5) + struct.pack("<I", value)
            else:
                encoded += varint(number << 3) + varint(value)
    return encoded


def shape(*sizes: int) -> bytes:
    return message(f2=[message(f1=size) for size in sizes])


def entry(data: bytes, *, dtype=1, sizes, shard=0, offset=0, **changes) -> bytes:
    """A BundleEntryProto of `data`, that of a float32 tensor of shape `sizes`."""
    fields = {
        "f1": dtype,
        "f2": shape(*sizes),
        "f3": shard,
        "f4": offset,
        "f5": len(data),
        "f6": crc32c(data),
    }
    return message(**{**fields, **changes})


HEADER = message(f1=1)


def block(items) -> bytes:
    """A block of (key, value) without shared prefixes, with its trailer."""
    body = b"".join(
        varint(0) + varint(len(key)) + varint(len(value)) + key + value
        for key, value in items
    )
    body += struct.pack("<II", 0, 1) + b"\0"
    return body + struct.pack("<I", crc32c(body))


def table(items, data: bytes | None = None) -> bytes:
    """The bytes of an index with `items`, (key, value) in order, or the block `data`."""
    data = block(items) if data is None else data
    metadata = block([])
    places = varint(0) + varint(len(data) - 5)
    index = block([(b"\xff", places)])
    footer = varint(len(data)) + varint(len(metadata) - 5)
    footer += varint(len(data) + len(metadata)) + varint(len(index) - 5)
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    return data + metadata + index + footer.ljust(40, b"\0") + magic


def forge(prefix, items, data: bytes) -> str:
    """Writes an index with `items` and one data file with `data`."""
    with open(f"{prefix}.index", "wb") as file:
        file.write(table(items))
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        file.write(data)
    return str(prefix)
