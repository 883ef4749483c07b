"""Makes the four IDX files of this folder from scikit-learn's `load_digits`.

    python data/digits/make_digits.py

needs scikit-learn, which the project itself does not: the files are committed.
The source, the split rule and the checksums are in README.md beside this script.
"""

import gzip
import hashlib
import os
import struct

import numpy as np

SPLIT_SEED = 0
TEST_EVERY = 5
IDX_UINT8 = 0x08


def main():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    train, test = split(labels)
    for prefix, chosen in (("train", train), ("t10k", test)):
        write(prefix + "-images-idx3-ubyte.gz", idx_bytes(images[chosen]))
        write(prefix + "-labels-idx1-ubyte.gz", idx_bytes(labels[chosen]))


def split(labels):
    """Returns the sorted indices of the training and of the test examples.

    All examples are queued class by class, each class in an order drawn from
    `SPLIT_SEED`; every fifth of the queue is a test example. Each class therefore
    gives a fifth of its examples, rounded up or down.
    """
    random = np.random.RandomState(SPLIT_SEED)
    queue = np.concatenate(
        [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    )
    test = queue[::TEST_EVERY]
    return np.sort(np.setdiff1d(queue, test)), np.sort(test)


def idx_bytes(array):
    """Returns a uint8 array in the IDX format: magic, big-endian sizes, bytes."""
    magic = bytes([0, 0, IDX_UINT8, array.ndim])
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(name, content):
    """Writes one file and prints its checksums, as README.md lists them."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    # No name and no time in the header: the same input gives the same bytes.
    with open(path, "wb") as file, gzip.GzipFile(
        "", "wb", 9, fileobj=file, mtime=0
    ) as compressed:
        compressed.write(content)
    with open(path, "rb") as file:
        print(hashlib.sha256(file.read()).hexdigest(), "", name)
    print(hashlib.sha256(content).hexdigest(), "", name[: -len(".gz")])


if __name__ == "__main__":
    main()
