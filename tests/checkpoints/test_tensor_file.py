"""The reader of foreign checkpoints: against TensorFlow's, and against hostile bytes."""

import os
import random
import shutil

import google_crc32c
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_tf1.checkpoints.reader_writer import CheckpointError
from bn_tf1.checkpoints.tensor_file import open_tensors
from bn_tf1.formats import sorted_table
from bn_tf1.formats.crc32c import masked, masked_crc32c
from tests.checkpoints import checkpoint_forge as forge

_VALUES = np.arange(6, dtype="<f4")
_BYTES = _VALUES.tobytes()


@pytest.mark.parametrize("size", [0, 1, 9, 4095, 4096, 4103, 42_207, 60_001, 200_000])
def test_the_checksum_is_that_of_the_bits(size):
    data = random.Random(size).getrandbits(8 * size + 8).to_bytes(size + 1, "little")
    data = data[:size]
    expected = forge.crc32c(data)
    assert masked_crc32c(data) == expected
    in_pieces = 0
    for piece in (data[: size // 3], data[size // 3 : -5], data[-5:]):
        in_pieces = google_crc32c.extend(in_pieces, piece if size > 10 else b"")
    if size > 10:
        assert masked(in_pieces) == expected


def test_the_checksum_of_the_standard():
    """RFC 3720, B.4: 32 bytes of zeros."""
    unmasked = (masked_crc32c(bytes(32)) - 0xA282EAD8) & 0xFFFFFFFF
    assert (unmasked >> 17 | unmasked << 15) & 0xFFFFFFFF == 0x8A9136AA


@pytest.mark.parametrize("origin", forge.ORIGINS)
def test_fixtures_read_as_by_tensorflow(origin):
    prefix = str(forge.FIXTURES / origin / "model.ckpt")
    _assert_same(open_tensors(prefix), forge.read_all(prefix))


def _assert_same(file, expected):
    assert set(file.tensors) == set(expected)
    for name, value in expected.items():
        assert file.tensors[name].shape == value.shape
        np.testing.assert_array_equal(file.tensors[name].read(), value, err_msg=name)


def test_dtypes_ranks_and_sizes(tmp_path):
    random_state = np.random.RandomState(0)
    values = {
        f"dtype/{dtype}": random_state.uniform(0, 100, [3, 2]).astype(dtype)
        for dtype in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "c8", "c16")
    }
    values["bool"] = np.array([True, False])
    values["scalar"] = np.float32(3)
    values["empty"] = np.zeros([0, 4], np.float32)
    values["large"] = random_state.normal(size=[3_000_000]).astype(np.float32)
    prefix = forge.write(tmp_path / "model", values)
    _assert_same(open_tensors(prefix), values)


def test_bfloat16_and_strings(tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable("half", initializer=tf.cast([1.5, -2.0, 1e30], tf.bfloat16))
        tf.get_variable("text", initializer=tf.constant(["one", "three"]))
        session.run(tf.global_variables_initializer())
        prefix = tf.train.Saver().save(session, str(tmp_path / "model"))
    file = open_tensors(prefix)
    np.testing.assert_allclose(file.tensors["half"].read(), [1.5, -2, 1e30], rtol=1e-2)
    assert file.tensors["half"].is_floating
    assert file.tensors["text"].dtype is None


def test_partitioned_variables_are_put_together(tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        tf.get_variable(
            "a/moving_mean",
            [7],
            initializer=tf.random_uniform_initializer(),
            partitioner=tf.fixed_size_partitioner(3),
        )
        session.run(tf.global_variables_initializer())
        prefix = tf.train.Saver().save(session, str(tmp_path / "model"))
    file = open_tensors(prefix)
    assert len(file.tensors["a/moving_mean"].parts) == 3
    _assert_same(file, forge.read_all(prefix))


def test_several_data_files(tmp_path):
    values = {"a": np.float32([1, 2]), "b": np.float32([3])}
    prefix = forge.write(tmp_path / "model", values, sharded=True)
    _assert_same(open_tensors(prefix), values)


def test_the_forger_writes_what_tensorflow_reads(tmp_path):
    """Otherwise the hostile tables below would prove nothing."""
    items = [(b"", forge.HEADER), (b"x", forge.entry(_BYTES, sizes=[6]))]
    prefix = forge.forge(tmp_path / "model", items, _BYTES)
    np.testing.assert_array_equal(forge.read_all(prefix)["x"], _VALUES)
    _assert_same(open_tensors(prefix), {"x": _VALUES})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"f2": forge.shape(1 << 40, 1 << 40)},
            "has 24 bytes, but needs 1208925819614",
        ),
        ({"f2": forge.shape(-6)}, r"has shape \[-6\]"),
        ({"f2": forge.shape(*[1] * 300)}, "has rank 300"),
        ({"f2": forge.shape(7)}, "has 24 bytes, but needs 7 times 4"),
        ({"f3": 5}, "said to be in data file 5 of 1"),
        (
            {"f4": 1},
            "has 24 bytes, but tensor 'x' ends at byte 25: the file is cut off",
        ),
        ({"f4": -8}, "said to have 24 bytes from -8"),
        ({"f4": 1 << 62}, "the file is cut off"),
        ({"f5": -1}, "said to have -1 bytes"),
        ({"f5": 1 << 50, "f2": forge.shape(1 << 48)}, "the file is cut off"),
        ({"f7": b""}, "has 1 slices, but 0 of them"),
    ],
)
def test_an_absurd_entry_is_named(tmp_path, changes, message):
    items = [(b"", forge.HEADER), (b"x", forge.entry(_BYTES, sizes=[6], **changes))]
    prefix = forge.forge(tmp_path / "model", items, _BYTES)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(prefix)


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "it has no header"),
        ([(b"", forge.message(f1=0))], "said to have 0 data files"),
        ([(b"", forge.message(f1=1 << 60))], "data files"),
        ([(b"", forge.message(f1=1, f2=1))], "with the highest byte first"),
        ([(b"", b"\xff\xff")], "a number has no end"),
        ([(b"", forge.HEADER), (b"x", b"\x12\x7f")], "field 2 is cut off"),
        ([(b"", forge.HEADER), (b"x", b"\x0b")], "field 1 has the unknown kind 3"),
        ([(b"", forge.HEADER), (b"\xff\xfe", b"")], "is no text"),
        ([(b"", forge.HEADER), (b"\0x", b"")], "belongs to no slice"),
        ([(b"", forge.HEADER), (b"x", b""), (b"x", b"")], "are mixed"),
    ],
)
def test_an_absurd_index_is_named(tmp_path, items, message):
    prefix = forge.forge(tmp_path / "model", items, b"")
    with pytest.raises(CheckpointError, match=f"model.index is damaged: .*{message}"):
        open_tensors(prefix)


def test_shared_prefixes_do_not_explode(tmp_path):
    """A few bytes per entry, each standing for a key of its whole length."""
    body = forge.varint(0) + forge.varint(4000) + forge.varint(0) + b"k" * 4000
    for i in range(20_000):
        body += forge.varint(4000 - 3 if i else 4000) + forge.varint(3)
        body += forge.varint(0) + b"l" + i.to_bytes(2, "big")
    body += b"\0\0\0\0\1\0\0\0\0"
    path = tmp_path / "model.index"
    checksum = forge.crc32c(body).to_bytes(4, "little")
    path.write_bytes(forge.table([], body + checksum))
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="the keys exceed"):
        sorted_table.read_table(str(path))


def test_entries_without_number_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sorted_table, "_MAX_ENTRIES", 100)
    items = [(b"", forge.HEADER)] + [(b"%04d" % i, b"") for i in range(100)]
    prefix = forge.forge(tmp_path / "model", items, b"")
    with pytest.raises(CheckpointError, match="more than 100 entries"):
        open_tensors(prefix)


def test_an_index_that_is_too_large_is_not_read(tmp_path):
    with open(str(tmp_path / "model.index"), "wb") as file:
        file.truncate(sorted_table.MAX_INDEX_BYTES + 1)  # no byte is written
    with pytest.raises(CheckpointError, match="more than the .* allowed"):
        open_tensors(str(tmp_path / "model"))


@pytest.fixture
def copied(tmp_path):
    for path in (forge.FIXTURES / "contrib").glob("model.ckpt.[id]*"):
        shutil.copy(str(path), str(tmp_path))
    return tmp_path / "model.ckpt"


def test_a_missing_file_is_named(copied):
    os.remove(f"{copied}.data-00000-of-00001")
    with pytest.raises(
        CheckpointError, match="data-00000-of-00001 cannot be read: No "
    ):
        open_tensors(str(copied))
    os.remove(f"{copied}.index")
    with pytest.raises(
        CheckpointError, match="model.ckpt.index cannot be read: No such"
    ):
        open_tensors(str(copied))


def test_a_flipped_bit_in_the_data_shows_when_it_is_read(copied):
    path = f"{copied}.data-00000-of-00001"
    with open(path, "r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 4]))
    file = open_tensors(str(copied))
    damaged = []
    for name, tensor in file.tensors.items():
        try:
            tensor.read()
        except CheckpointError as error:
            assert "wrong checksum" in str(error)
            damaged.append(name)
    assert len(damaged) == 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_to_the_index_is_one_error(tmp_path_factory, data):
    """Cut off, bits flipped, bytes replaced: an error, or the same tensors."""
    source = str(forge.FIXTURES / "contrib" / "model.ckpt")
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = str(folder / "model.ckpt")
    shutil.copy(source + ".data-00000-of-00001", str(folder))
    with open(source + ".index", "rb") as file:
        content = bytearray(file.read())
    kind = data.draw(st.sampled_from(["cut", "flip", "replace", "random"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "replace":
        content[at : at + 8] = data.draw(st.binary(min_size=0, max_size=16))
    else:
        content = data.draw(st.binary(max_size=300))
    with open(prefix + ".index", "wb") as file:
        file.write(content)
    try:
        file = open_tensors(prefix)
    except CheckpointError as error:
        assert str(error).startswith(prefix)
        return
    assert file.shapes == open_tensors(source).shapes


@settings(max_examples=200, deadline=None)
@given(value=st.binary(max_size=60), key=st.binary(min_size=1, max_size=8))
def test_any_entry_with_a_right_checksum_is_an_error_or_read(
    tmp_path_factory, key, value
):
    prefix = str(tmp_path_factory.mktemp("fuzz") / "model")
    forge.forge(prefix, [(b"", forge.HEADER), (key, value)], _BYTES)
    try:
        file = open_tensors(prefix)
        for tensor in file.tensors.values():
            tensor.read()
    except CheckpointError:
        pass
