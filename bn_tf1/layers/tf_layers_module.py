"""Gives the module `tf.layers` back what TensorFlow took from it.

TensorFlow 2.16 and later has no working `tf.layers` unless tf_keras is installed and
asked for (TF_USE_LEGACY_KERAS=1): whatever is taken from it raises. All of its layers but
batch normalization are still there under another name, tensorflow.python.layers.layers.

Contract: what raises is replaced, for the whole process, and nothing that works: on
TensorFlow 1.15 to 2.15 and with tf_keras nothing is done. `bn_tf1.uninstall()` takes it
back.
"""

from __future__ import annotations

import importlib

import tensorflow.compat.v1 as tf

from bn_tf1.layers.normalization_layer import BatchNormalization, batch_normalization
from bn_tf1.undoable_changes import put, works

_SHOWN = "tensorflow.compat.v1.layers"
_CARRIED = "tensorflow.python.layers.layers"
_NORMALIZATION = "tensorflow.python.layers.normalization"
_BATCH_NORMS = {
    "batch_normalization": batch_normalization,
    "BatchNormalization": BatchNormalization,
}


def install() -> tuple:
    """Gives `tf.compat.v1.layers` its two batch norms back where TensorFlow's raise.

    For all of its layers, slim and contrib, there is `bn_tf1.install`. It may be called
    again.

    Returns:
        The names of what it replaced, such as
        "tf.compat.v1.layers.batch_normalization"; () when all worked.
    """
    return _fill(_BATCH_NORMS)


def install_every_layer() -> tuple:
    """Gives `tf.compat.v1.layers` all of its layers back where TensorFlow's raise.

    Returns:
        As `install`.

    Raises:
        ImportError: this TensorFlow no longer carries the other layers.
    """
    replaced = _fill(_BATCH_NORMS)
    # One for all: they come from one module of Keras's, and are there or not together.
    if not works(tf.layers, "conv2d"):
        replaced += _fill(_carried_layers())
    return replaced + _repair_normalization()


def _carried_layers():
    try:
        carried = importlib.import_module(_CARRIED)
    except ImportError as error:
        raise ImportError(
            f"TensorFlow {tf.version.VERSION} no longer has the layers of tf.layers in "
            f"{_CARRIED}: install tf_keras and set TF_USE_LEGACY_KERAS=1, or use "
            "bn_tf1.layers.install() for batch normalization alone"
        ) from error
    # The module's second names for the convolutions never were in `tf.layers`.
    layers = {
        name: layer
        for name, layer in vars(carried).items()
        if not name.startswith("_") and callable(layer) and "volution" not in name
    }
    layers["InputSpec"] = _imported().InputSpec
    return layers


def _fill(layers):
    missing = {n: layer for n, layer in layers.items() if not works(tf.layers, n)}
    # Only then: the import below is not without effects.
    if missing:
        shown, imported = tf.layers, _imported()
        for name, layer in missing.items():
            put(shown, name, layer)
            put(imported, name, layer)
    return tuple("tf.compat.v1.layers." + name for name in missing)


def _imported():
    """What `import tensorflow.compat.v1.layers` finds, another module than `tf.layers`."""
    shown = tf.layers
    imported = importlib.import_module(_SHOWN)
    tf.layers = shown  # The import puts the other one in its place.
    return imported


def _repair_normalization():
    """For code that imports TensorFlow's module of the layer itself."""
    module = importlib.import_module(_NORMALIZATION)
    second_names = {"batch_norm": batch_normalization, "BatchNorm": BatchNormalization}
    missing = {
        name: layer
        for name, layer in {**_BATCH_NORMS, **second_names}.items()
        if not works(module, name)
    }
    for name, layer in missing.items():
        put(module, name, layer)
    return tuple(f"{_NORMALIZATION}.{name}" for name in missing)
