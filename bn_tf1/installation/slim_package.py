"""Repairs `batch_norm` of tf_slim, the one function of it that TensorFlow 2.16 broke.

tf_slim 1.1.0 calls a layer of TensorFlow that is gone, and with inputs of rank 2 an
attribute that is.

Contract: a batch norm that works is left alone. Otherwise `bn_tf1.slim.batch_norm` takes
its place wherever tf_slim has it, as the same key of an `arg_scope`: a scope that was
opened, or a key that was taken, with the original counts for it, too.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import Any

import tensorflow.compat.v1 as tf

import bn_tf1.slim
from bn_tf1.layers import BatchNormalization
from bn_tf1.undoable_changes import on_undo, put

_LAYERS = "tf_slim.layers.layers"
# Of rank 2 and 4: the original goes other ways for them.
_PROBES = ((2, 3), (2, 2, 2, 3))


def install_into_tf_slim() -> tuple:
    """Repairs a tf_slim that is imported, and otherwise the one that will be.

    Returns:
        The names of what was replaced now, such as "tf_slim.batch_norm".
    """
    if _LAYERS in sys.modules:
        return _repair(sys.modules[_LAYERS])
    if not any(isinstance(finder, _RepairOnImport) for finder in sys.meta_path):
        finder = _RepairOnImport()
        sys.meta_path.insert(0, finder)
        on_undo(lambda: sys.meta_path.remove(finder))
    return ()


class _RepairOnImport(importlib.abc.MetaPathFinder):
    """Finds tf_slim's module where it is, and has it repaired once it has run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _LAYERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_repair(module):
            run(module)
            # The packages above copy it from here, a moment later.
            for name in _repair(module):
                tf.logging.info("bn_tf1.install() replaced %s", name)

        spec.loader.exec_module = run_and_repair
        return spec


def _repair(layers):
    original = layers.batch_norm
    if original is bn_tf1.slim.batch_norm or _works(original):
        return ()
    scopes = importlib.import_module("tf_slim.ops.arg_scope")
    # The attribute by which `arg_scope` knows a function.
    put(bn_tf1.slim.batch_norm, "_key_op", scopes.arg_scope_func_key(original))
    on_undo(lambda: _exchange(bn_tf1.slim.batch_norm, original))
    return _exchange(original, bn_tf1.slim.batch_norm)


def _exchange(old, new):
    """Puts `new` where modules of tf_slim have `old`, and names the places."""
    # `from ... import batch_norm` has copied it into modules that tf_slim never names.
    holders = [
        name
        for name, module in sorted(sys.modules.items())
        if name.split(".")[0] == "tf_slim" and vars(module).get("batch_norm") is old
    ]
    for name in holders:
        sys.modules[name].batch_norm = new
    return tuple(f"{name}.batch_norm" for name in holders)


def _works(batch_norm):
    normalization = importlib.import_module("tensorflow.python.layers.normalization")
    if vars(normalization).get("BatchNormalization") is BatchNormalization:
        return False  # It is this library's repair that would make it work.
    # Tried out, since no version number tells: tf_keras may make it work.
    with tf.Graph().as_default():
        try:
            for shape in _PROBES:
                batch_norm(tf.zeros(shape))
        except (AttributeError, ImportError):
            return False
    return True
