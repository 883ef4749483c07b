"""The file checks: good files of each format pass, every damage is located."""

import gzip
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from bn_tf1.jobs.data import idx_and_cifar
from bn_tf1.jobs.data.idx_and_cifar import DataFileError

RECORD10 = 1 + 3072
RECORD100 = 2 + 3072


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


IMAGES = idx(np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8) % 17)
LABELS = idx(np.array([9, 0, 5], np.uint8))


def records(labels, pixels=7):
    """CIFAR records with the given label bytes, one tuple for each record."""
    return b"".join(bytes(label) + bytes([pixels]) * 3072 for label in labels)


def write(folder, name, content, compress=False):
    path = os.path.join(str(folder), name)
    with open(path, "wb") as file:
        file.write(gzip.compress(content) if compress else content)
    return path


def check_idx(folder, images=IMAGES, labels=LABELS, compress=False):
    """Writes a pair of IDX files and checks it as digits are checked."""
    write(folder, "train-images-idx3-ubyte", images, compress)
    write(folder, "train-labels-idx1-ubyte", labels, compress)
    return check_digits(folder)


def check_digits(folder):
    return idx_and_cifar.check_idx_pair(
        str(folder), "train", image_size=(8, 8), num_classes=10, max_pixel=16
    )


def check_cifar10(folder, name="test_batch.bin"):
    return idx_and_cifar.check_cifar(
        str(folder), name, subfolder="cifar-10-batches-bin", label_limits=(10,)
    )


def check_cifar100(folder):
    return idx_and_cifar.check_cifar(
        str(folder), "train.bin", subfolder="cifar-100-binary", label_limits=(20, 100)
    )


def patched(content, offset, replacement):
    return content[:offset] + replacement + content[offset + len(replacement) :]


def assert_names(error, path, offset, *phrases):
    message = str(error.value)
    place = f"{path}: at byte {offset}"
    assert message.startswith((place + ":", place + " of the"))
    for phrase in phrases:
        assert phrase in message


# Good files


@pytest.mark.parametrize("compress", [False, True])
def test_good_idx_pair(tmp_path, compress):
    images, labels = check_idx(tmp_path, compress=compress)
    folder = str(tmp_path)
    assert images == (os.path.join(folder, "train-images-idx3-ubyte"), compress, 16, 3)
    assert labels == (os.path.join(folder, "train-labels-idx1-ubyte"), compress, 8, 3)


def test_names_in_order_of_preference(tmp_path):
    write(tmp_path, "train-labels-idx1-ubyte", LABELS)
    names = [
        "train-images.idx3-ubyte.gz",
        "train-images-idx3-ubyte.gz",
        "train-images.idx3-ubyte",
        "train-images-idx3-ubyte",
    ]
    for name in names:
        # Whether a file is gzip is decided by its bytes: these never are.
        path = write(tmp_path, name, IMAGES)
        assert check_digits(tmp_path)[0] == (path, False, 16, 3)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_good_cifar10(tmp_path, compress, subfolder):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    name = "test_batch.bin" + (".gz" if compress else "")
    # More records than are read at once.
    path = write(folder, name, records([(n % 10,) for n in range(150)]), compress)
    assert check_cifar10(tmp_path) == (path, compress, 0, 150)


def test_good_cifar100(tmp_path):
    path = write(tmp_path, "train.bin", records([(19, 99), (0, 0)]))
    assert check_cifar100(tmp_path) == (path, False, 0, 2)


# Damaged IDX files; the offset in a gzip file is that of the decompressed stream

IDX_IMAGE_DAMAGES = {
    "empty": (b"", 0, "IDX magic number (4 bytes), found an empty file"),
    "short magic": (IMAGES[:2], 0, "(4 bytes), found 2 bytes"),
    "wrong magic": (patched(IMAGES, 2, b"\x0d"), 0, "00000803, found 00000d03"),
    "labels for images": (LABELS, 0, "00000803, found 00000801"),
    "truncated header": (IMAGES[:10], 8, "an image dimension (4 bytes), found 2"),
    "no example": (patched(IMAGES, 4, bytes(4)), 4, "at least one example, found 0"),
    "wrong height": (patched(IMAGES, 11, b"\x1c"), 8, "dimension of 8, found 28"),
    "wrong width": (patched(IMAGES, 12, b"\xff"), 12, "of 8, found 4278190088"),
    "absurd count": (patched(IMAGES, 4, b"\xff" * 4), 4, "at most 2147483647 bytes"),
    "large count": (patched(IMAGES, 4, b"\x01"), 208, "bytes in all, found the end"),
    "truncated": (IMAGES[:-1], 207, "208 bytes in all, found the end of the data"),
    "trailing": (IMAGES + b"\0", 208, "the end of the data, found trailing bytes"),
    "pixel": (patched(IMAGES, 100, b"\x11"), 100, "a pixel in [0, 17), found 17"),
}

IDX_LABEL_DAMAGES = {
    "wrong magic": (IMAGES, 0, "00000801, found 00000803"),
    "count": (idx(np.zeros(4, np.uint8)), 4, "expected 3 labels, one for each image"),
    "truncated": (LABELS[:-2], 9, "expected 11 bytes in all, found the end"),
    "trailing": (LABELS + LABELS, 11, "the end of the data, found trailing bytes"),
    "label": (patched(LABELS, 9, b"\x0a"), 9, "a label in [0, 10), found 10"),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", sorted(IDX_IMAGE_DAMAGES))
def test_damaged_idx_images(tmp_path, damage, compress):
    content, offset, phrase = IDX_IMAGE_DAMAGES[damage]
    with pytest.raises(DataFileError) as error:
        check_idx(tmp_path, images=content, compress=compress)
    path = tmp_path / "train-images-idx3-ubyte"
    place = " of the decompressed stream: expected" if compress else ": expected"
    assert_names(error, path, offset, f"byte {offset}{place}", phrase)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", sorted(IDX_LABEL_DAMAGES))
def test_damaged_idx_labels(tmp_path, damage, compress):
    content, offset, phrase = IDX_LABEL_DAMAGES[damage]
    with pytest.raises(DataFileError) as error:
        check_idx(tmp_path, labels=content, compress=compress)
    assert_names(error, tmp_path / "train-labels-idx1-ubyte", offset, phrase)


def test_missing_idx_file(tmp_path):
    write(tmp_path, "train-images-idx3-ubyte", IMAGES)
    with pytest.raises(DataFileError) as error:
        check_digits(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "train-labels-idx1-ubyte") + ": expected")
    assert "looked for train-labels-idx1-ubyte, train-labels.idx1-ubyte" in message


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError("not for you")

    monkeypatch.setattr(idx_and_cifar, "open", refuse, raising=False)
    with pytest.raises(DataFileError, match="idx3-ubyte: cannot be read: not for you"):
        check_idx(tmp_path)


# Damaged gzip streams

COMPRESSED = gzip.compress(IMAGES)
GZIP_DAMAGES = {
    "header": (patched(COMPRESSED, 2, b"\x07"), 0, "expected valid gzip data, found"),
    "header only": (COMPRESSED[:2], 0, "gzip stream, found the end of the file"),
    "checksum": (
        patched(COMPRESSED, len(COMPRESSED) - 8, bytes(4)),
        None,
        "incorrect data check",
    ),
    "truncated": (COMPRESSED[:-9], None, "gzip stream, found the end of the file"),
    "truncated checksum": (COMPRESSED[:-4], 208, "found the end of the file"),
    "second stream": (COMPRESSED * 2, 208, "one gzip stream, found more bytes"),
    "trailing": (COMPRESSED + b"\0", 208, "one gzip stream, found more bytes"),
}


@pytest.mark.parametrize("damage", sorted(GZIP_DAMAGES))
def test_damaged_gzip(tmp_path, damage):
    content, offset, phrase = GZIP_DAMAGES[damage]
    with pytest.raises(DataFileError) as error:
        check_idx(tmp_path, images=content)
    message = str(error.value)
    assert phrase in message
    assert " of the decompressed stream: " in message
    if offset is not None:
        assert_names(error, tmp_path / "train-images-idx3-ubyte", offset)


def test_gzip_bomb_is_not_inflated(tmp_path, monkeypatch):
    read = idx_and_cifar._Stream.read
    inflated = []

    def counting_read(self, size):
        content = read(self, size)
        inflated.append(len(content))
        return content

    bomb = gzip.compress(IMAGES + bytes(64 << 20))
    write(tmp_path, "train-images-idx3-ubyte.gz", bomb)
    monkeypatch.setattr(idx_and_cifar._Stream, "read", counting_read)
    with pytest.raises(DataFileError) as error:
        check_digits(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    assert_names(error, path, len(IMAGES), "trailing bytes")
    assert sum(inflated) == len(IMAGES) + 1


def test_memory_does_not_follow_the_claimed_size(tmp_path):
    # 2**24 images of 64 bytes: the header claims 1 GiB, 64 MiB of it exist.
    header = patched(IMAGES[:16], 4, struct.pack(">I", 1 << 24))
    content = header + bytes(64 << 20)
    write(tmp_path, "train-images-idx3-ubyte.gz", content, compress=True)
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match="bytes in all"):
            check_digits(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A handful of chunks of 256 KiB.
    assert peak < 4 << 20


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "test_batch.bin.gz"])
def test_a_gzip_bomb_in_the_right_format_is_refused(tmp_path, monkeypatch, name):
    """Images of zeros only: 3 MiB, then 100 times what they shrink to, are too many."""
    monkeypatch.setattr(idx_and_cifar, "_FREE_CONTENT_BYTES", 3 << 20)
    if name.startswith("train"):
        content, check = idx(np.zeros([1 << 16, 8, 8], np.uint8)), check_digits
        write(tmp_path, "train-labels-idx1-ubyte", idx(np.zeros(1 << 16, np.uint8)))
    else:
        content, check = records([(0,)], pixels=0) * 1365, check_cifar10
    path = write(tmp_path, name, content, compress=True)
    assert os.path.getsize(path) * 100 < 3 << 20 < len(content)
    with pytest.raises(DataFileError) as error:
        check(tmp_path)
    assert_names(error, path, 3 << 20, "at most 3145728 bytes in a gzip file")
    os.remove(path)
    write(tmp_path, name[: -len(".gz")], content)
    check(tmp_path)


def test_a_large_gzip_file_that_shrank_like_images_is_taken(tmp_path, monkeypatch):
    """Of 16 values at random, which gzip packs to about half."""
    monkeypatch.setattr(idx_and_cifar, "_FREE_CONTENT_BYTES", 1 << 10)
    pixels = np.random.RandomState(0).randint(0, 16, [1 << 12, 8, 8]).astype(np.uint8)
    images, _ = check_idx(tmp_path, idx(pixels), idx(pixels[:, 0, 0] % 10), True)
    assert images.num_examples == 1 << 12


# Damaged CIFAR files

CIFAR10_DAMAGES = {
    "empty": (b"", 0, "a record of 3073 bytes, found an empty file"),
    "truncated": (
        records([(1,), (2,)])[:-1],
        2 * RECORD10 - 1,
        "whole records of 3073 bytes, found the end of the data after 3072 bytes",
    ),
    "trailing": (records([(1,)]) + b"\0", RECORD10 + 1, "after 1 bytes of a record"),
    "label": (
        records([(n % 10,) for n in range(99)] + [(10,)]),
        99 * RECORD10,
        "a label in [0, 10), found 10",
    ),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", sorted(CIFAR10_DAMAGES))
def test_damaged_cifar10(tmp_path, damage, compress):
    content, offset, phrase = CIFAR10_DAMAGES[damage]
    path = write(tmp_path, "test_batch.bin", content, compress)
    with pytest.raises(DataFileError) as error:
        check_cifar10(tmp_path)
    assert_names(error, path, offset, phrase)


@pytest.mark.parametrize(
    "label, offset, phrase",
    [
        ((20, 0), RECORD100, "a label in [0, 20), found 20"),
        ((0, 100), RECORD100 + 1, "a label in [0, 100), found 100"),
    ],
)
def test_cifar100_label_out_of_range(tmp_path, label, offset, phrase):
    path = write(tmp_path, "train.bin", records([(1, 1), label]))
    with pytest.raises(DataFileError) as error:
        check_cifar100(tmp_path)
    assert_names(error, path, offset, phrase)


def test_missing_cifar_file(tmp_path):
    with pytest.raises(DataFileError) as error:
        check_cifar10(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "test_batch.bin") + ": expected this file")
    assert str(tmp_path / "cifar-10-batches-bin") in message


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1.bin"])
def test_pickled_cifar_is_refused(tmp_path, name):
    content = pickle.dumps({b"data": bytes(10 * 3072)}, protocol=2)
    path = write(tmp_path, name, content)
    with pytest.raises(DataFileError) as error:
        check_cifar10(tmp_path, "data_batch_1.bin")
    assert_names(error, path, 0, "expected the binary version of CIFAR", "pickle")


def test_pickled_cifar_beside_the_binary_one_is_no_error(tmp_path):
    write(tmp_path, "data_batch_1", b"\x80\x02}")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    name = os.path.join("cifar-10-batches-bin", "data_batch_1.bin")
    path = write(tmp_path, name, records([(1,)]))
    assert check_cifar10(tmp_path, "data_batch_1.bin") == (path, False, 0, 1)


def test_cifar_file_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(idx_and_cifar, "MAX_FILE_BYTES", 2 * RECORD10)
    write(tmp_path, "test_batch.bin", records([(1,)] * 2))
    assert check_cifar10(tmp_path).num_examples == 2
    path = write(tmp_path, "test_batch.bin", records([(1,)] * 3))
    with pytest.raises(DataFileError) as error:
        check_cifar10(tmp_path)
    assert_names(error, path, 2 * RECORD10, "at most 6146 bytes, found more bytes")
