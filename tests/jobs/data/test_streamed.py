"""Image folders and shards of records: order, resumption, what is broken, how it is said."""

import collections
import functools
import os
import struct
import zlib

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.formats.tfrecords import RecordError, framed
from bn_tf1.jobs.data import (
    datasets,
    encoded_images,
    image_folders,
    record_shards,
    streamed,
)
from bn_tf1.jobs.data.array_batches import ArrayBatches
from bn_tf1.jobs.data.datasets import Streaming
from bn_tf1.jobs.data.encoded_images import is_stored_rotated, why_not_decodable
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from bn_tf1.jobs.data.shard_writer import make_records

CLASSES = ("cat", "dög", "emu")
PER_CLASS = {"train": 7, "test": 2}
SIZE = 8


def encode(pixels, kind="png"):
    operation = tf.image.encode_png if kind == "png" else tf.image.encode_jpeg
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(operation(tf.constant(pixels, tf.uint8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder whose pixels tell class and number: (40 * class, 20 * number, 0)."""
    root = tmp_path_factory.mktemp("images")
    for split, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.zeros([6, 9, 3])
                pixels[..., 0], pixels[..., 1] = 40 * label, 20 * number
                (place / f"{number}.png").write_bytes(encode(pixels))
            (place / "Thumbs.db").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def records(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "out"
    counts = make_records(
        str(folder), str(out), test_share=0.1, seed=0, shard_bytes=2000
    )
    assert counts == {"train": 21, "test": 6}
    return out


@pytest.fixture(params=["images", "tfrecord"])
def source(request, folder, records, monkeypatch):
    """(name, data_dir), with blocks that are smaller than the data set."""
    monkeypatch.setattr(image_folders, "_BLOCK_EXAMPLES", 4)
    monkeypatch.setattr(record_shards, "_BLOCK_BYTES", 1000)
    return request.param, str({"images": folder, "tfrecord": records}[request.param])


def open_split(source, split="train", **options):
    options = {"image_size": SIZE, **options}
    name, data_dir = source
    return datasets.open_dataset(
        name, split, data_dir=data_dir, streaming=Streaming(**options)
    )


def take(batches, count=None):
    """The images and labels of the first `count` batches, or of all."""
    found = []
    with tf.Session() as session:
        iterator = tf.data.make_initializable_iterator(batches)
        following = iterator.get_next()
        session.run(iterator.initializer)
        try:
            while count is None or len(found) < count:
                found.append(session.run(following))
        except tf.errors.OutOfRangeError:
            pass
    return found


def training(dataset, first_step=0, batch_size=5, **options):
    options = {"seed": 3, "augment": False, **options}
    return datasets.training_batches(
        dataset, batch_size, first_step=first_step, **options
    )


def identities(batches):
    """(label, number) of each example, read off its pixels."""
    pairs = []
    for images, labels in batches:
        colours = np.rint(images.mean((1, 2)) * 255).astype(int)
        assert (colours[:, 0] == 40 * labels).all()
        pairs += zip(labels.tolist(), (colours[:, 1] // 20).tolist())
    return pairs


EVERY = {
    split: {(c, n) for c in range(3) for n in range(k)}
    for split, k in PER_CLASS.items()
}


def test_an_epoch_holds_every_example_once_and_the_next_has_another_order(source):
    dataset = open_split(source)
    assert (dataset.num_examples, dataset.num_classes) == (21, 3)
    assert dataset.class_names == CLASSES
    pairs = identities(take(training(dataset, batch_size=7), 6))
    assert set(pairs[:21]) == set(pairs[21:]) == EVERY["train"]
    assert pairs[:21] != pairs[21:]


def test_resumes_at_any_step_with_the_same_bits(source):
    dataset = open_split(source)
    for augment, photos in ((True, False), (True, True)):
        dataset = dataset._replace(augments_photos=photos)
        whole = take(training(dataset, augment=augment), 9)
        for step in (1, 4, 8):
            resumed = take(training(dataset, step, augment=augment), 1)
            np.testing.assert_array_equal(resumed[0][0], whole[step][0])
            np.testing.assert_array_equal(resumed[0][1], whole[step][1])


@pytest.mark.parametrize("photos", [False, True])
def test_a_worker_reads_and_decodes_its_rows_alone(source, photos):
    dataset = open_split(source, augments_photos=photos)
    whole = take(training(dataset, 2, 6, augment=True), 2)
    for rows in ((0, 2), (2, 6)):
        part = take(training(dataset, 2, 6, augment=True, rows=rows), 2)
        for found, batch in zip(part, whole):
            for own, every in zip(found, batch):
                np.testing.assert_array_equal(own, every[slice(*rows)])

    read = []

    def read_block(block):
        return [lambda f=f: read.append(f) or f() for f in plain(block)]

    plain = dataset.source.read_block
    counted = dataset._replace(source=dataset.source._replace(read_block=read_block))
    reader = streamed._Reader(counted, lambda epoch: np.arange(21))
    reader.batch(2, batch_size=6, rows=(2, 6), once=False)
    assert len(read) == 4


def test_another_seed_is_another_order(source):
    dataset = open_split(source)
    first, second = (
        identities(take(training(dataset, seed=seed), 4)) for seed in (1, 2**40 + 1)
    )
    assert first != second


def test_evaluation_holds_every_example_once(source):
    dataset = open_split(source, "test")
    batches = take(datasets.evaluation_batches(dataset, 4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    pairs = identities(batches)
    assert len(pairs) == 6 and set(pairs) == EVERY["test"]


@pytest.mark.parametrize("photos", [False, True])
def test_recalibration_sees_images_as_evaluation_does(photos, tmp_path):
    random = np.random.RandomState(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        place = tmp_path / name
        place.mkdir(parents=True)
        pixels = random.randint(0, 256, [12, 16, 3])
        (place / "0.png").write_bytes(encode(pixels))
    dataset = open_split(("images", str(tmp_path)), augments_photos=photos)
    (evaluated,) = take(datasets.evaluation_batches(dataset, 2))
    (seen,) = ArrayBatches(dataset, 2)
    for images, labels in (evaluated, seen):
        images[:] = images[np.argsort(labels)]
    np.testing.assert_array_equal(seen[0], evaluated[0])


def test_a_folder_without_splits_is_split_by_names(folder, tmp_path):
    alone = ("images", str(folder / "train"))
    train = open_split(alone, "train", test_share=0.4, seed=1)
    test = open_split(alone, "test", test_share=0.4, seed=1)
    assert train.num_examples + test.num_examples == 21
    found = [
        set(identities(take(datasets.evaluation_batches(split, 50))))
        for split in (train, test)
    ]
    assert not found[0] & found[1] and found[0] | found[1] == EVERY["train"]
    assert datasets.checksum(train, test) != datasets.checksum(test, train)


# ------------------------------------------------------------------- what is in an image


def test_an_image_is_resized_without_a_shift_and_smoothed():
    """Against means over 2x2 pixels, which the triangle of width 2 keeps for a ramp."""
    ramp = np.tile(np.arange(0, 240, 15)[:, None, None], [1, 16, 3])
    with tf.Session() as session:
        image = session.run(encoded_images.decode_resized(encode(ramp), 8))
    inner = (ramp[2:-2:2, 2:-2:2] + ramp[3:-2:2, 3:-2:2]) / 2 / 255
    np.testing.assert_allclose(image[1:-1, 1:-1], inner, atol=1e-6)


def test_an_image_is_enlarged_by_straight_lines():
    """Against NumPy's interpolation between the centres of pixels, row by row, then columns."""
    image = np.random.RandomState(0).randint(0, 256, [5, 7, 3])
    expected = image.astype(np.float64)
    for axis, length in enumerate(image.shape[:2]):
        places = (np.arange(8) + 0.5) * length / 8 - 0.5
        expected = np.apply_along_axis(
            functools.partial(np.interp, places, np.arange(length)), axis, expected
        )
    with tf.Session() as session:
        found = session.run(encoded_images.decode_resized(encode(image), 8))
    np.testing.assert_allclose(found, expected / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6, 3), (3, 4, 3)])
def test_an_image_is_moved_and_mirrored_and_black_where_it_was(shape):
    image = np.random.RandomState(0).randint(1, 256, shape)
    encoded = tf.constant(encode(image))
    seed = tf.placeholder(tf.int64, [2])
    still = encoded_images.decode_resized(encoded, 6)
    moved = encoded_images.decode_shifted(encoded, 6, seed, padding=2)
    draws = tf.random.stateless_uniform(
        [3], seed=seed, minval=0, maxval=2**31 - 1, dtype=tf.int32
    )
    seen = set()
    with tf.Session() as session:
        padded = np.pad(session.run(still), [(2, 2), (2, 2), (0, 0)], "constant")
        for number in range(12):
            found, (down, right, mirror) = session.run(
                [moved, draws], {seed: [5, number]}
            )
            top, left = 4 - down % 5, 4 - right % 5
            expected = padded[top : top + 6, left : left + 6]
            expected = expected[:, :: -1 if mirror % 2 else 1]
            np.testing.assert_array_equal(found, expected)
            seen.add((top, left, mirror % 2))
    assert len(seen) > 6


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_crop_is_a_part_of_the_image_and_follows_its_seed(kind):
    rows, columns = np.mgrid[0:64, 0:96]
    image = np.stack([rows * 4, columns * 2.5, rows * 0], -1)
    encoded = tf.constant(encode(image, kind))
    seeds = tf.placeholder(tf.int64, [2])
    crop = encoded_images.decode_random_crop(encoded, 16, seeds)
    with tf.Session() as session:
        crops = [session.run(crop, {seeds: [7, i]}) * 255 for i in range(20)]
        again = session.run(crop, {seeds: [7, 3]}) * 255
    np.testing.assert_array_equal(again, crops[3])
    heights = [np.ptp(found[..., 0]) / 4 for found in crops]
    assert min(heights) < 40 < max(heights)
    slopes = {np.sign(found[0, -1, 1] - found[0, 0, 1]) for found in crops}
    assert slopes == {1, -1}  # some are mirrored


# -------------------------------------------------------------------------- what is broken

PNG = encode(np.full([5, 4, 3], 9))
JPEG = encode(np.full([5, 4, 3], 9), "jpeg")
BROKEN = {
    "empty": (b"", "it is empty"),
    "text": (b"<html>", "neither a JPEG nor a PNG"),
    "gif": (b"GIF89a" + bytes(20), "neither a JPEG nor a PNG"),
    "cut off PNG": (PNG[:-6], "PNG that was cut off"),
    "damaged PNG": (PNG[:45] + bytes([PNG[45] ^ 1]) + PNG[46:], "is damaged"),
    "cut off JPEG": (JPEG[: len(JPEG) // 2], "JPEG that was cut off"),
    "JPEG without end": (JPEG[:-2], "JPEG that was cut off"),
    "JPEG of no rows": (
        JPEG.replace(b"\x08\x00\x05\x00\x04", b"\x08\x00\x00\x00\x04"),
        "it has 4 x 0 pixels",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_cannot_be_decoded_is_seen_from_its_bytes(name):
    encoded, message = BROKEN[name]
    assert message in why_not_decodable(encoded)


def test_what_can_be_decoded():
    for encoded in (PNG, JPEG, JPEG + b"trailing bytes of a camera"):
        assert why_not_decodable(encoded) is None
        with tf.Session() as session:
            image = session.run(tf.image.decode_png(encoded, channels=3))
        assert image.shape == (5, 4, 3)


def with_orientation(value, order):
    """A JPEG with the one tag of EXIF, in the byte order "II" or "MM"."""
    sign = {"II": "<", "MM": ">"}[order]
    tags = struct.pack(sign + "HHHIHHI", 1, 0x0112, 3, 1, value, 0, 0)
    exif = b"Exif\0\0" + order.encode() + struct.pack(sign + "HI", 42, 8) + tags
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + JPEG[2:]


@pytest.mark.parametrize("order", ["II", "MM"])
def test_an_image_that_is_stored_rotated_is_said_once(order, tmp_path, capfd):
    assert not is_stored_rotated(JPEG) and not is_stored_rotated(PNG)
    assert not is_stored_rotated(with_orientation(1, order))
    assert not is_stored_rotated(with_orientation(6, order)[:30])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(with_orientation(6, order))
    take(training(open_split(("images", str(tmp_path)), test_share=1e-9)), 2)
    assert capfd.readouterr().err.count("stored rotated (EXIF orientation)") == 1


@pytest.fixture
def broken_folder(folder, tmp_path):
    """The folder with one image less, and one that is cut off."""
    import shutil

    root = tmp_path / "broken"
    shutil.copytree(str(folder), str(root))
    path = root / "train" / "emu" / "5.png"
    path.write_bytes(path.read_bytes()[:-3])
    return root, path


def test_an_example_that_cannot_be_used_is_named(broken_folder):
    root, path = broken_folder
    dataset = open_split(("images", str(root)))
    with pytest.raises(tf.errors.OpError) as error:
        take(training(dataset), 5)
    assert str(path.name) in str(error.value) and "cut off" in str(error.value)
    assert "--max_bad_examples=0" in str(error.value)


@pytest.mark.parametrize(
    ("limit", "words"), [(0, "--max_bad_examples=0"), (9, "none of all 2 examples")]
)
def test_a_search_for_an_example_ends_where_there_is_none(limit, words, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no image")
    dataset = open_split(
        ("images", str(tmp_path)), test_share=1e-9, max_bad_examples=limit
    )
    reader = streamed._Reader(dataset, lambda epoch: np.arange(2))
    for _ in range(3):  # also where all are known to be bad
        with pytest.raises(DataFileError, match=words):
            reader.batch(0, batch_size=2, rows=(0, 2), once=False)


def test_the_next_example_takes_the_place_of_one_that_is_left_out(broken_folder, capfd):
    root, _ = broken_folder
    dataset = open_split(("images", str(root)), max_bad_examples=1)
    whole = take(training(dataset, batch_size=7), 3)
    pairs = collections.Counter(identities(whole))
    assert set(pairs) == EVERY["train"] - {(2, 5)}
    assert "left out" in capfd.readouterr().err
    resumed = take(training(dataset, 2, batch_size=7), 1)
    np.testing.assert_array_equal(resumed[0][0], whole[2][0])
    test = take(datasets.evaluation_batches(dataset, 50))
    assert set(identities(test)) == EVERY["train"] - {(2, 5)}


def test_an_image_that_only_tensorflow_finds_broken_is_named(tmp_path):
    """The parts of a PNG are whole, but what they hold is no deflated image."""
    size = struct.pack(">IIBBBBB", 6, 9, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), (b"IDAT", b"garbage"), (b"IEND", b"")]
    broken = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    assert why_not_decodable(broken) is None
    for name, content in (("a", PNG), ("b", broken)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(content)
    source = "images", str(tmp_path)
    dataset = open_split(source, test_share=1e-9)
    wanted = "b.1.png: the image cannot be decoded: TensorFlow says: .*; replace or"
    with pytest.raises(DataFileError, match=wanted), dataset.failures_named():
        take(training(dataset, batch_size=2), 1)
    dataset = open_split(source, test_share=1e-9, max_bad_examples=1)
    ((_, labels),) = take(training(dataset, batch_size=4), 1)
    assert labels.tolist() == [0, 0, 0, 0]


def example(**features):
    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    features = {name.replace("__", "/"): feature(v) for name, v in features.items()}
    return tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()


GOOD = example(image__encoded=PNG, image__class__label=1)
SHARDS = {
    "no example": (framed(b"\xff\xff"), "no tf.train.Example"),
    "no image": (framed(example(image__class__label=1)), "'image/encoded'"),
    "no label": (framed(example(image__encoded=PNG)), "'image/class/label'"),
    "label": (
        framed(example(image__encoded=PNG, image__class__label=3)),
        "the label is 3",
    ),
    "image": (
        framed(example(image__encoded=PNG[:-1], image__class__label=1)),
        "cut off",
    ),
    "flipped bit": (framed(GOOD)[:40] + b"!" + framed(GOOD)[41:], "checksum"),
}


@pytest.mark.parametrize("name", list(SHARDS))
def test_a_record_that_cannot_be_used_is_named(name, tmp_path):
    content, message = SHARDS[name]
    (tmp_path / "train-00000-of-00001").write_bytes(framed(GOOD) + content)
    dataset = open_split(
        ("tfrecord", str(tmp_path)), num_classes=3, index_folder=str(tmp_path)
    )
    with pytest.raises(tf.errors.OpError) as error:
        take(training(dataset, batch_size=2), 1)
    assert message in str(error.value) and "record 1" in str(error.value)


HEADERS = {
    "cut off": (framed(GOOD)[:-20], "was cut off"),
    "header": (b"x" * 60, "record 1 should begin"),
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_shard_whose_frames_are_damaged_is_an_error_at_the_start(name, tmp_path):
    content, message = HEADERS[name]
    (tmp_path / "train-0").write_bytes(framed(GOOD) + content)
    with pytest.raises(RecordError, match=message):
        open_split(("tfrecord", str(tmp_path)), num_classes=3)


def test_an_index_is_read_again_where_a_shard_has_changed(tmp_path):
    shard = tmp_path / "train-0"
    shard.write_bytes(framed(GOOD))
    options = {"num_classes": 3, "index_folder": str(tmp_path / "kept")}
    source = "tfrecord", str(tmp_path)
    assert open_split(source, **options).num_examples == 1
    assert os.listdir(str(tmp_path / "kept")) == ["records-train.npz"]
    shard.write_bytes(framed(GOOD) * 2)
    assert open_split(source, **options).num_examples == 2
    (tmp_path / "kept" / "records-train.npz").write_bytes(b"damaged")
    assert open_split(source, **options).num_examples == 2


FOLDERS = {
    "nothing": ((), "has 0 folders"),
    "one class": (("a/1.png",), "has 1 folders"),
    "an empty class": (("a/1.png", "b/1.txt"), "b has no image"),
    "test alone": (("test/a/1.png",), "no train/ beside it"),
    "train alone": (("train/a/1.png", "train/b/1.png"), "for a split by chance"),
    "unknown class": (
        ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"),
        "class 'c'",
    ),
}


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_folder_that_is_none(name, tmp_path):
    files, message = FOLDERS[name]
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(PNG)
    with pytest.raises(DataFileError, match=message):
        open_split(("images", str(tmp_path)))


SETS = {
    "none": ((), "make_records"),
    "missing": (("train-00000-of-00003", "train-00002-of-00003"), "lacks shard 1"),
    "two sets": (("train-00000-of-00001", "train-00000-of-00002"), r"\[1, 2\]"),
}


@pytest.mark.parametrize("name", list(SETS))
def test_shards_that_are_no_set(name, tmp_path):
    files, message = SETS[name]
    for path in files:
        (tmp_path / path).write_bytes(framed(GOOD))
    with pytest.raises(DataFileError, match=message):
        open_split(("tfrecord", str(tmp_path)), num_classes=3)


def test_nothing_is_left_of_records_that_cannot_be_made(broken_folder, tmp_path):
    root, _ = broken_folder
    out = tmp_path / "out"
    options = {"test_share": 0.1, "seed": 0, "shard_bytes": 2000}
    with pytest.raises(DataFileError, match="5.png: the image cannot be decoded"):
        make_records(str(root), str(out), **options)
    assert sorted(os.listdir(str(tmp_path))) == ["broken"]
    out.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        make_records(str(root), str(out), **options)


def test_records_of_foreign_writers_are_read(tmp_path):
    """TensorFlow's own writer, other names of features, labels that begin at 1."""
    with tf.python_io.TFRecordWriter(
        str(tmp_path / "validation-00000-of-00001")
    ) as file:
        file.write(example(jpeg=JPEG, cls=2))
    dataset = open_split(
        ("tfrecord", str(tmp_path)),
        "test",
        features=record_shards.Features("jpeg", "cls", 1),
        num_classes=2,
        index_folder=str(tmp_path),
    )
    ((images, labels),) = take(datasets.evaluation_batches(dataset, 4))
    assert labels.tolist() == [1]
    np.testing.assert_allclose(images * 255, 9, atol=1.5)
