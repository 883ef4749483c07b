"""The compiled operation, built once for all tests, into a cache of their own."""

import os

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1 import compiled
from bn_tf1.compiled import building, library


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The cache folder; the tests are skipped where there is no compiler."""
    if "BN_TF1_SANITIZED" in os.environ:  # from `tests.compiled.sanitized`
        library._loaded.append(tf.load_op_library(os.environ["BN_TF1_SANITIZED"]))
        yield None
        return
    base = tmp_path_factory.getbasetemp()
    if base.name.startswith("popen"):
        base = base.parent  # of all workers of pytest-xdist
    folder = base / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        try:
            building.build(print)
        except building.MissingError as error:
            pytest.skip(str(error))
        compiled.load()
        yield folder
