"""The data sets: exact values, order, resumption, augmentation, embedded digits."""

import gzip
import hashlib
import importlib.util
import os
import re
import struct

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.arguments import CUMULATIVE
from bn_tf1.jobs import choices, models, slim_models
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.data.datasets import SyntheticImages
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from tests import ROOT

DIGITS = str(ROOT / "data" / "digits")

# What (seed 1, steps 4 and 5) selects, and what (seed 7, step 11) gives: printed once,
# on TensorFlow 1.15.5, and equal on 2.21.
PINNED_ORDER = [19, 17, 15, 10, 1, 0, 16, 5, 4, 3, 14, 15, 7, 16, 12, 17]
PINNED_DIGEST = "7b0969f4120aeee2734b9146b2d042bb875c7125ec693720d1b8ea4a72eedc07"


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write(folder, name, content, compress):
    path = os.path.join(str(folder), name + (".gz" if compress else ""))
    with open(path, "wb") as file:
        file.write(gzip.compress(content) if compress else content)


def write_idx(folder, prefix, images, labels, compress=False):
    """Writes uint8 images [n, h, w, 1] and labels [n] in the format of MNIST."""
    write(folder, prefix + "-images-idx3-ubyte", idx(images[..., 0]), compress)
    write(folder, prefix + "-labels-idx1-ubyte", idx(labels), compress)


def write_cifar(folder, name, images, label_columns, compress=False):
    """Writes uint8 images [n, 32, 32, 3] and labels [n, k] in the format of CIFAR."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    content = np.concatenate([label_columns, planes], axis=1).tobytes()
    write(folder, name, content, compress)


def random_images(count, *shape, max_pixel=255):
    values = np.random.RandomState(count).randint(0, max_pixel + 1, (count,) + shape)
    return values.astype(np.uint8)


def labels_of(count, num_classes=10):
    return (np.arange(count) * 7 % num_classes).astype(np.uint8)


@pytest.fixture
def numbered(tmp_path):
    """20 images of MNIST's size; all pixels of image i are i, its label is i // 2."""
    images = np.tile(np.arange(20, dtype=np.uint8)[:, None, None, None], (1, 28, 28, 1))
    write_idx(tmp_path, "train", images, np.arange(20, dtype=np.uint8) // 2)
    return datasets.open_dataset("mnist", "train", data_dir=str(tmp_path))


@pytest.fixture
def take(session):
    """take(batches, count) is a list of the first batches; of all without count."""

    def run(batches, count=None):
        iterator = tf.data.make_initializable_iterator(batches)
        next_batch = iterator.get_next()
        session.run(iterator.initializer)
        taken = []
        while count is None or len(taken) < count:
            try:
                taken.append(session.run(next_batch))
            except tf.errors.OutOfRangeError:
                break
        return taken

    return run


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for (left_images, left_labels), (right_images, right_labels) in zip(left, right):
        np.testing.assert_array_equal(left_images, right_images)
        np.testing.assert_array_equal(left_labels, right_labels)


def assert_all_examples(batches, images, labels, max_pixel):
    """The values are exactly those of the files, in file order."""
    found_images = np.concatenate([batch[0] for batch in batches])
    found_labels = np.concatenate([batch[1] for batch in batches])
    assert found_images.dtype == np.float32 and found_labels.dtype == np.int32
    expected = images.astype(np.float32) * np.float32(1 / max_pixel)
    np.testing.assert_array_equal(found_images, expected)
    np.testing.assert_array_equal(found_labels, labels)
    assert 0 <= found_images.min() and found_images.max() <= 1


# What comes out of each format


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("split, prefix", [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize(
    "name, size, max_pixel, mirrors",
    [
        ("digits", 8, 16, False),
        ("mnist", 28, 255, False),
        ("fashion_mnist", 28, 255, True),
    ],
)
def test_idx_values(
    tmp_path, take, name, size, max_pixel, mirrors, split, prefix, compress
):
    images = random_images(7, size, size, 1, max_pixel=max_pixel)
    labels = labels_of(7)
    write_idx(tmp_path, prefix, images, labels, compress)
    dataset = datasets.open_dataset(name, split, data_dir=tmp_path)
    assert dataset.image_shape == (size, size, 1)
    assert dataset[:2] == (name, split)
    assert dataset.num_classes == 10 and dataset.num_examples == 7
    assert dataset.max_pixel == max_pixel and dataset.mirrors == mirrors
    batches = take(datasets.evaluation_batches(dataset, 3))
    assert [len(batch[1]) for batch in batches] == [3, 3, 1]
    assert_all_examples(batches, images, labels, max_pixel)


@pytest.mark.parametrize("compress", [False, True])
def test_cifar10_values(tmp_path, take, compress):
    images, labels = random_images(11, 32, 32, 3), labels_of(11)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    bounds = [0, 3, 4, 6, 9, 11]
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:]), start=1):
        name = os.path.join("cifar-10-batches-bin", f"data_batch_{number}.bin")
        columns = labels[begin:end, None]
        write_cifar(tmp_path, name, images[begin:end], columns, compress)
    write_cifar(tmp_path, "test_batch.bin", images[:2], labels[:2, None], compress)
    train = datasets.open_dataset("cifar10", "train", data_dir=tmp_path)
    test = datasets.open_dataset("cifar10", "test", data_dir=tmp_path)
    assert train[2:5] == ((32, 32, 3), 10, 11) and test.num_examples == 2
    assert train.mirrors and len(train.files) == 5
    assert_all_examples(
        take(datasets.evaluation_batches(train, 4)), images, labels, 255
    )
    assert_all_examples(
        take(datasets.evaluation_batches(test, 2)), images[:2], labels[:2], 255
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_gives_fine_labels(tmp_path, take, split):
    images, fine = random_images(6, 32, 32, 3), labels_of(6, 100) + 60
    columns = np.stack([fine // 5, fine], axis=1)
    write_cifar(tmp_path, split + ".bin", images, columns)
    dataset = datasets.open_dataset("cifar100", split, data_dir=tmp_path)
    assert dataset.num_classes == 100
    batches = take(datasets.evaluation_batches(dataset, 6))
    assert_all_examples(batches, images, fine, 255)


def test_shapes_are_static_and_pixels_stay_out_of_the_graph(tmp_path, graph):
    images, labels = random_images(100, 32, 32, 3), labels_of(100)
    write_cifar(tmp_path, "test_batch.bin", images, labels[:, None])
    dataset = datasets.open_dataset("cifar10", "test", data_dir=tmp_path)
    batches = datasets.training_batches(dataset, 5, seed=0, first_step=0, augment=True)
    images, labels = tf.data.make_initializable_iterator(batches).get_next()
    assert images.shape.as_list() == [5, 32, 32, 3] and images.dtype == tf.float32
    assert labels.shape.as_list() == [5] and labels.dtype == tf.int32
    batches = datasets.evaluation_batches(dataset, 5)
    images, labels = tf.data.make_initializable_iterator(batches).get_next()
    assert images.shape.as_list() == [None, 32, 32, 3]
    assert labels.shape.as_list() == [None]
    assert graph.as_graph_def().ByteSize() < 100 * 3072


# Order


def indices(batches):
    """The example numbers in batches of `numbered`."""
    pixels = np.concatenate([images[:, 0, 0, 0] for images, _ in batches])
    return np.rint(pixels * 255).astype(int).tolist()


def test_every_epoch_holds_every_example_once(numbered, take):
    # 5 batches of 8 are 2 epochs of 20; the third batch spans both.
    batches = take(datasets.training_batches(numbered, 8, seed=1, first_step=0), 5)
    order = indices(batches)
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:] != list(range(20))
    labels = np.concatenate([batch[1] for batch in batches])
    np.testing.assert_array_equal(labels, np.array(order) // 2)


def test_batch_larger_than_the_data_set(numbered, take):
    order = indices(
        take(datasets.training_batches(numbered, 50, seed=1, first_step=0), 2)
    )
    for epoch in range(5):
        assert sorted(order[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_order_is_the_same_on_every_tensorflow(numbered, take):
    # Pinned: a run that moves from TensorFlow 1.15 to 2.21 goes on with its batches.
    batches = take(datasets.training_batches(numbered, 8, seed=1, first_step=4), 2)
    assert indices(batches) == PINNED_ORDER


def test_seeds_differ(numbered, take):
    orders = [
        indices(take(datasets.training_batches(numbered, 20, seed=s, first_step=0), 1))
        for s in (1, 2, 2**40, -1)
    ]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_resumes_at_any_step(numbered, take, step, augment):
    def batches(first_step):
        return datasets.training_batches(
            numbered, 8, seed=3, first_step=first_step, augment=augment
        )

    whole = take(batches(0), step + 4)
    assert_same_batches(take(batches(0), step + 4), whole)
    assert_same_batches(take(batches(step), 4), whole[step:])


def test_resumes_at_the_restored_global_step(numbered, session, variable_kind):
    global_step = tf.train.get_or_create_global_step()
    batches = datasets.training_batches(
        numbered, 8, seed=3, first_step=global_step, augment=True
    )
    iterator = tf.data.make_initializable_iterator(batches)
    next_batch = iterator.get_next()
    session.run([global_step.initializer])
    session.run(iterator.initializer)
    whole = [session.run(next_batch) for _ in range(8)]
    session.run(global_step.assign(5))
    session.run(iterator.initializer)
    assert_same_batches([session.run(next_batch) for _ in range(3)], whole[5:])


def test_iterator_state_can_be_saved(tmp_path, numbered, session):
    batches = datasets.training_batches(numbered, 8, seed=3, first_step=2, augment=True)
    iterator = tf.data.make_initializable_iterator(batches)
    next_batch = iterator.get_next()
    saver = tf.train.Saver([tf.data.experimental.make_saveable_from_iterator(iterator)])
    session.run(iterator.initializer)
    for _ in range(4):
        session.run(next_batch)
    path = saver.save(session, str(tmp_path / "iterator"))
    expected = [session.run(next_batch) for _ in range(6)]
    session.run(iterator.initializer)
    saver.restore(session, path)
    assert_same_batches([session.run(next_batch) for _ in range(6)], expected)


# Augmentation


def crop_of(image, original, padding):
    """The (top, left, mirrored) with which `image` [h, w, c] was cut; None if none.

    Independent of the implementation: NumPy, one image, every possibility.
    """
    height, width, _ = original.shape
    margin = (padding, padding)
    padded = np.pad(original, [margin, margin, (0, 0)], mode="constant")
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            if np.array_equal(image, crop):
                return top, left, False
            # Cropping a mirrored image is mirroring another crop of it.
            if np.array_equal(image, crop[:, ::-1]):
                return top, left, True
    return None


def crops(take, dataset, padding=None):
    plain, augmented = [
        take(
            datasets.training_batches(
                dataset,
                64,
                seed=5,
                first_step=3,
                augment=augment,
                augment_padding=padding,
            ),
            1,
        )[0]
        for augment in (False, True)
    ]
    np.testing.assert_array_equal(plain[1], augmented[1])
    if padding is None:
        padding = dataset.image_shape[0] // 8
    found = [crop_of(a, b, padding) for a, b in zip(augmented[0], plain[0])]
    assert None not in found
    return found


def test_augmentation_pads_crops_and_mirrors(tmp_path, take):
    images, labels = random_images(64, 32, 32, 3), labels_of(64)
    write_cifar(tmp_path, "test_batch.bin", images, labels[:, None])
    found = crops(take, datasets.open_dataset("cifar10", "test", data_dir=tmp_path))
    tops, lefts, mirrored = zip(*found)
    # 64 draws of 9 values: that one is missing has a probability of 0.5 %, and the
    # seed is fixed.
    assert set(tops) == set(lefts) == set(range(9))
    assert 20 < sum(mirrored) < 44
    assert len(set(zip(tops, lefts))) > 30


def test_digits_are_never_mirrored(take):
    found = crops(take, datasets.open_dataset("digits", "train"))
    tops, lefts, mirrored = zip(*found)
    assert set(tops) == set(lefts) == {0, 1, 2}
    assert not any(mirrored)


def test_augmentation_without_padding_only_mirrors(take):
    dataset = datasets.open_dataset("synthetic", "train")
    found = crops(take, dataset, padding=0)
    assert {crop[:2] for crop in found} == {(0, 0)}
    assert len(set(found)) == 2


def test_augmentation_differs_between_steps(take):
    dataset = datasets.open_dataset(
        "synthetic", "train", synthetic=SyntheticImages(num_examples=1)
    )
    batches = take(
        datasets.training_batches(dataset, 8, seed=0, first_step=0, augment=True), 2
    )
    assert not np.array_equal(batches[0][0], batches[1][0])


def test_augmented_batch_is_the_same_on_every_tensorflow(take):
    dataset = datasets.open_dataset("digits", "train")
    batches = datasets.training_batches(
        dataset, 128, seed=7, first_step=11, augment=True
    )
    ((images, labels),) = take(batches, 1)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == PINNED_DIGEST


def test_the_rows_of_a_worker_are_those_of_the_whole_batch(take):
    dataset = datasets.open_dataset(
        "synthetic", "train", synthetic=SyntheticImages(num_examples=20)
    )

    def batch(rows):
        batches = datasets.training_batches(
            dataset, 8, seed=7, first_step=2, augment=True, rows=rows
        )
        return take(batches, 1)[0]

    for part, whole in zip(batch((2, 5)), batch(None)):
        np.testing.assert_array_equal(part, whole[2:5])


# The embedded digits


def readme_checksums():
    with open(os.path.join(DIGITS, "README.md")) as file:
        rows = re.findall(r"\| `([0-9a-f]{64})` \| `([^`]+)` \|\n", file.read())
    return {name: checksum for checksum, name in rows}


def test_digits_match_their_checksums():
    checksums = readme_checksums()
    names = sorted(name for name in os.listdir(DIGITS) if name.endswith(".gz"))
    assert len(names) == 4
    assert sorted(checksums) == sorted(names + [name[:-3] for name in names])
    for name in names:
        with open(os.path.join(DIGITS, name), "rb") as file:
            content = file.read()
        assert hashlib.sha256(content).hexdigest() == checksums[name]
        plain = gzip.decompress(content)
        assert hashlib.sha256(plain).hexdigest() == checksums[name[:-3]]
        # No time stamp and no name: reproducible.
        assert content[3:8] == bytes(5)


def test_digits_counts_and_stratification(take):
    counts = {}
    for split, num_examples in (("train", 1437), ("test", 360)):
        dataset = datasets.open_dataset("digits", split)
        assert dataset.num_examples == num_examples
        batches = take(datasets.evaluation_batches(dataset, 500))
        labels = np.concatenate([batch[1] for batch in batches])
        counts[split] = np.bincount(labels, minlength=10)
    # A fifth of each class, rounded up or down.
    exact = (counts["train"] + counts["test"]) / 5
    assert (np.abs(counts["test"] - exact) < 1).all()


def test_digits_are_those_of_scikit_learn(take):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    spec = importlib.util.spec_from_file_location(
        "make_digits", os.path.join(DIGITS, "make_digits.py")
    )
    make_digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_digits)
    digits = sklearn_datasets.load_digits()
    train, test = make_digits.split(digits.target)
    assert sorted(np.concatenate([train, test])) == list(range(1797))
    for split, chosen in (("train", train), ("test", test)):
        batches = take(
            datasets.evaluation_batches(datasets.open_dataset("digits", split), 500)
        )
        images, labels = digits.images[chosen, ..., None], digits.target[chosen]
        assert_all_examples(batches, images, labels, 16)


def test_digits_outside_a_checkout(tmp_path, monkeypatch):
    module = tmp_path / "bn_tf1" / "jobs" / "data" / "datasets.py"
    monkeypatch.setattr(datasets, "__file__", str(module))
    with pytest.raises(DataFileError) as error:
        datasets.open_dataset("digits", "train")
    assert str(tmp_path / "data" / "digits") in str(error.value)
    assert "--data_dir" in str(error.value)
    monkeypatch.undo()
    dataset = datasets.open_dataset("digits", "train", data_dir=DIGITS)
    assert dataset.num_examples == 1437


# Synthetic images


def test_synthetic_images_are_learnable(take):
    spec = SyntheticImages(
        image_size=10, channels=2, num_classes=5, num_examples=203, seed=4
    )
    loaded = {}
    for split in ("train", "test"):
        dataset = datasets.open_dataset("synthetic", split, synthetic=spec)
        assert dataset[2:5] == ((10, 10, 2), 5, 203)
        ((images, labels),) = take(datasets.evaluation_batches(dataset, 203))
        np.testing.assert_array_equal(labels, np.arange(203) % 5)
        assert 0 <= images.min() and 0.9 < images.max() <= 1
        loaded[split] = images, labels
    (train, train_labels), (test, test_labels) = loaded["train"], loaded["test"]
    assert not np.array_equal(train, test)
    means = np.stack([train[train_labels == k].mean(axis=0) for k in range(5)])
    distances = ((test[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == test_labels).mean() > 0.95
    # A class is a pattern that equals its mirror image; the mean of 40 examples has a
    # noise of sigma 0.145 / sqrt(40) = 0.023 per pixel, 0.033 in a difference.
    assert np.abs(means - means[:, :, ::-1]).max() < 5 * 0.033


def test_synthetic_seed(take):
    def first(seed):
        dataset = datasets.open_dataset(
            "synthetic", "test", synthetic=SyntheticImages(num_examples=4, seed=seed)
        )
        return take(datasets.evaluation_batches(dataset, 4))[0][0]

    np.testing.assert_array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


# Errors


@pytest.mark.parametrize(
    "name, files",
    [
        ("mnist", "train-images-idx3-ubyte and train-labels-idx1-ubyte"),
        ("fashion_mnist", "train-images-idx3-ubyte and train-labels-idx1-ubyte"),
        ("cifar10", "data_batch_1.bin, .*data_batch_5.bin .*cifar-10-batches-bin"),
        ("cifar100", "train.bin .*cifar-100-binary"),
    ],
)
def test_data_dir_is_needed(name, files):
    with pytest.raises(
        ValueError, match="--data_dir is missing.*--data_dir=FOLDER.*" + files
    ):
        datasets.open_dataset(name, "train")


def test_files_are_checked_on_opening(tmp_path):
    with pytest.raises(DataFileError, match="data_batch_1.bin: expected this file"):
        datasets.open_dataset("cifar10", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("imagenet", "train"), "`name` is 'imagenet', but must be one of"),
        (("digits", "dev"), "`split` is 'dev', but must be one of"),
    ],
)
def test_unknown_data_set_or_split(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.open_dataset(*arguments)


@pytest.mark.parametrize(
    "field", ["image_size", "channels", "num_classes", "num_examples"]
)
def test_invalid_synthetic_images(field):
    message = f"`synthetic.{field}` is 0, but must be at least 1"
    with pytest.raises(ValueError, match=message):
        datasets.open_dataset(
            "synthetic", "train", synthetic=SyntheticImages(**{field: 0})
        )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"batch_size": 0}, "`batch_size` is 0, but must be at least 1"),
        ({"first_step": -1}, "`first_step` is -1, but must be at least 0"),
        ({"augment_padding": -1}, "`augment_padding` is -1, but must be at least 0"),
    ],
)
def test_invalid_training_arguments(changed, message):
    dataset = datasets.open_dataset("synthetic", "train")
    arguments = dict({"batch_size": 2, "seed": 0, "first_step": 0}, **changed)
    with pytest.raises(ValueError, match=message):
        datasets.training_batches(dataset, **arguments)


def test_invalid_evaluation_batch_size():
    dataset = datasets.open_dataset("synthetic", "train")
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        datasets.evaluation_batches(dataset, 0)


def test_every_name_that_can_be_chosen_is_known():
    assert choices.IN_MEMORY == tuple(datasets._FORMATS)
    assert set(choices.NETWORKS) == {*models.MODELS, *slim_models.MODELS}
    assert choices.CHANNELS_FIRST == tuple(slim_models.MODELS)
    assert choices.CUMULATIVE == CUMULATIVE


def test_more_synthetic_pixels_than_fit_are_refused():
    """One byte more than a file may have; nothing is allocated for it."""
    one_byte = {"image_size": 1, "channels": 1}
    datasets.open_dataset(
        "synthetic",
        "train",
        synthetic=datasets.SyntheticImages(num_examples=2**31 - 1, **one_byte),
    )
    with pytest.raises(ValueError, match="2147483648 bytes of pixels, but may be at"):
        datasets.open_dataset(
            "synthetic",
            "train",
            synthetic=datasets.SyntheticImages(num_examples=2**31, **one_byte),
        )
