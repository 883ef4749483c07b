"""`install()`: code of TensorFlow 1 that cannot be edited runs on every TensorFlow.

everything     `install` and `uninstall`
slim_package   the batch norm of tf_slim
contrib_shim   `tensorflow.contrib`, made of tf_slim

`tf.layers` is repaired in `bn_tf1.layers`; how changes are taken back is in
`bn_tf1.undoable_changes`.
"""

from bn_tf1.installation.everything import install, uninstall

__all__ = ["install", "uninstall"]
