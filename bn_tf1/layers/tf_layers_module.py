"""Gives the module `tf.layers` its batch norms back, for code that cannot be edited."""

from __future__ import annotations

import importlib

import tensorflow.compat.v1 as tf

from bn_tf1.layers.normalization_layer import BatchNormalization, batch_normalization


def install() -> tuple:
    """Gives `tf.compat.v1.layers` its two batch norms back where TensorFlow's raise.

    TensorFlow 2.16 and later has no working `tf.layers` unless tf_keras is installed
    and asked for. This replaces what does not work there, for the whole process, and
    nothing that works: on TensorFlow 1.15 it does nothing. It may be called again.

    Returns:
        The names of what it replaced, such as
        "tf.compat.v1.layers.batch_normalization"; () when all worked.
    """
    shown = tf.layers
    replaced = {
        name: layer
        for name, layer in (
            ("batch_normalization", batch_normalization),
            ("BatchNormalization", BatchNormalization),
        )
        if not _has(shown, name)
    }
    if replaced:
        # `import tensorflow.compat.v1.layers` finds another module than `tf.layers`, and
        # puts it in its place.
        imported = importlib.import_module("tensorflow.compat.v1.layers")
        vars(shown).update(replaced)  # setattr would load what is gone.
        for name, layer in replaced.items():
            setattr(imported, name, layer)
        tf.layers = shown
    return tuple("tf.compat.v1.layers." + name for name in replaced)


def _has(module, name):
    try:
        getattr(module, name)
    except (AttributeError, ImportError):
        return False
    return True
