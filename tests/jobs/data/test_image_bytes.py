"""Any bytes in a data file: it passes or raises DataFileError, in bounded memory."""

import contextlib
import gzip
import tempfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_tf1.jobs.data import idx_and_cifar
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from tests.jobs.data.test_idx_and_cifar import (
    IMAGES,
    LABELS,
    check_cifar10,
    check_cifar100,
    check_idx,
    records,
    write,
)

_settings = settings(max_examples=150, deadline=2000, derandomize=True)
# Several times what the checks read at once.
_MEMORY = 16 << 20


@contextlib.contextmanager
def _only_typed_errors():
    """Passes a DataFileError that names a place; fails for more memory than is needed."""
    tracemalloc.start()
    try:
        yield
    except DataFileError as error:
        assert ": at byte " in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < _MEMORY


def _mutations(content):
    """The content with some bytes changed, cut off, or put in."""

    def apply(edits):
        changed = bytearray(content)
        for place, kind, value in edits:
            place %= len(changed) + 1
            if kind == "set":
                changed[place : place + 1] = value[:1]
            elif kind == "cut":
                del changed[place:]
            else:
                changed[place:place] = value
        return bytes(changed)

    kinds = st.sampled_from(["set", "set", "set", "cut", "insert"])
    edit = st.tuples(st.integers(0, len(content)), kinds, st.binary(min_size=1))
    header = st.tuples(st.integers(0, 20), kinds, st.binary(min_size=1))
    return st.lists(st.one_of(edit, header), min_size=1, max_size=4).map(apply)


@_settings
@given(
    images=st.one_of(st.binary(max_size=300), _mutations(IMAGES)),
    labels=st.one_of(st.just(LABELS), st.binary(max_size=40), _mutations(LABELS)),
    compress=st.booleans(),
)
def test_any_idx_files(images, labels, compress):
    with tempfile.TemporaryDirectory() as folder, _only_typed_errors():
        files = check_idx(folder, images, labels, compress)
        # What passes has as many pixels as it says, none of them out of range.
        pixels = np.frombuffer(images[files[0].header_bytes :], np.uint8)
        assert pixels.size == 64 * files[0].num_examples
        assert pixels.max() <= 16


_CIFAR10 = records([(3,), (9,)])


@_settings
@given(content=st.one_of(st.binary(max_size=300), _mutations(_CIFAR10)))
def test_any_cifar10_file(content):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "test_batch.bin", content)
        with _only_typed_errors():
            file = check_cifar10(folder)
            assert 3073 * file.num_examples == len(content)


@_settings
@given(content=_mutations(records([(19, 99), (0, 0)])))
def test_any_cifar100_file(content):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "train.bin", content)
        with _only_typed_errors():
            assert 3074 * check_cifar100(folder).num_examples == len(content)


@_settings
@given(content=_mutations(gzip.compress(_CIFAR10)))
def test_any_gzip_file(content):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "test_batch.bin", content)
        with _only_typed_errors():
            check_cifar10(folder)


@pytest.mark.parametrize("compress", [False, True])
def test_the_checksum_reads_any_size_in_pieces(tmp_path, compress):
    """Of 64 MB it holds a few pieces; gzip and plain content have the same."""
    content = records([(0,)]) * 20000
    write(tmp_path, "test_batch.bin", content, compress)
    file = idx_and_cifar.CheckedFile(
        str(tmp_path / "test_batch.bin"), compress, 0, num_examples=20000
    )
    del content
    tracemalloc.start()
    digest = idx_and_cifar.checksum([file])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert len(digest) == 64
