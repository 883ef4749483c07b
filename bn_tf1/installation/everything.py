"""All that `bn_tf1.install()` repairs, and how it is taken back."""

from __future__ import annotations

from bn_tf1 import undoable_changes
from bn_tf1.installation.contrib_shim import install_contrib
from bn_tf1.installation.slim_package import install_into_tf_slim
from bn_tf1.layers.tf_layers_module import install_every_layer


def install(*, contrib: bool = False) -> tuple:
    """Gives TensorFlow back what graph-mode code of TensorFlow 1 needs.

    One line at the start of a program, before what it imports is imported:

        import bn_tf1
        bn_tf1.install()

    Contract: what raises is replaced, for the whole process, and nothing that works. On
    TensorFlow 1.15 that is nothing. It may be called again, and `uninstall` takes it
    back.
    - `tf.layers` (TensorFlow 2.16 and later): this library's batch normalization, and
      the other layers where TensorFlow keeps them now.
    - tf_slim, now or when it is imported: `slim.batch_norm` is `bn_tf1.slim.batch_norm`
      wherever tf_slim has it, so that `tf_slim.nets`, a `normalizer_fn` and the keys of
      an `arg_scope` mean one function.

    Args:
        contrib: whether to offer tf_slim's layers, arg_scopes, losses, metrics and
            training loops as `tensorflow.contrib` where there is none (TensorFlow 2):
            `import tensorflow.contrib.slim`, `tf.contrib.layers`, and so on. All else of
            contrib stays an error that names it. Needs tf_slim.

    Returns:
        The names of what it replaced or added, such as
        "tf.compat.v1.layers.conv2d"; () when nothing was left to do. What is replaced
        later in a tf_slim that is not imported yet, TensorFlow's log says (level INFO).

    Raises:
        ImportError: `contrib` is true and there is no tf_slim, or this TensorFlow no
            longer has the layers.
    """
    # tf_slim first: whether its batch norm works is tried out with TensorFlow as it is.
    replaced = install_into_tf_slim() + install_every_layer()
    return replaced + (install_contrib() if contrib else ())


def uninstall() -> None:
    """Takes back all that `install` and `bn_tf1.layers.install` changed.

    Layers that are built stay as they are.
    """
    undoable_changes.undo_all()
