"""Batch normalization for graph-mode TensorFlow 1 code, on TensorFlow 1.15 and 2.

    import bn_tf1

    y = bn_tf1.batch_norm(x, is_training)
    train_op = bn_tf1.make_train_op(loss, tf.train.AdamOptimizer(1e-3))

Contract: importing it imports TensorFlow and registers the gradients of the core, so that
a graph of ours can be imported and differentiated; it changes nothing else. All that is
public stands in one table, and is imported when it is asked for.
"""

import importlib
import os
import sys

from bn_tf1 import version

__version__ = version.VERSION

# What is public, and the module that it comes from.
_MODULES = {
    "BatchNormCall": "bn_tf1.built_layers",
    "Divergence": "bn_tf1.population.divergence",
    "Examination": "bn_tf1.doctor.examination",
    "Finding": "bn_tf1.doctor.findings",
    "LayerTensors": "bn_tf1.population.divergence",
    "Renormalization": "bn_tf1.statistics",
    "RestoreReport": "bn_tf1.checkpoints.restore",
    "SafeSaver": "bn_tf1.jobs.saving.safe_saver",
    "StatisticsHook": "bn_tf1.doctor.statistics_watch",
    "UPDATE_OPS_COLLECTION": "bn_tf1.moving_averages",
    "WarmUp": "bn_tf1.arguments",
    "Workers": "bn_tf1.workers.cluster",
    "WorkersError": "bn_tf1.workers.handshake",
    "audit": "bn_tf1.doctor.examination",
    "batch_norm": "bn_tf1.builder",
    "batch_norm_calls": "bn_tf1.built_layers",
    "check_statistics": "bn_tf1.doctor.statistics_watch",
    "convert": "bn_tf1.checkpoints.conversion",
    "divergence": "bn_tf1.population.divergence",
    "examine": "bn_tf1.doctor.examination",
    "export": "bn_tf1.jobs.finished.exported_runs",
    "install": "bn_tf1.installation.everything",
    "keep_memory": "bn_tf1.jobs.memory_allocator",
    "lint": "bn_tf1.doctor.lint",
    "make_train_op": "bn_tf1.doctor.training_lint",
    "migrate_graph": "bn_tf1.graphs.migrate",
    "recalibrate": "bn_tf1.population.recalibration",
    "restore": "bn_tf1.checkpoints.restore",
    "uninstall": "bn_tf1.installation.everything",
}
# Public as a whole: `bn_tf1.layers.batch_normalization`.
_ROOMS = ("compiled", "layers", "recipe", "slim")

__all__ = list(_MODULES) + list(_ROOMS)


def __getattr__(name):
    """Imports what is asked for the first time (PEP 562)."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


def _starts_a_program():
    """Whether a program of this project is starting, and no user's imports this.

    It says itself when TensorFlow is imported: after its help and its wrong usage, which
    need none, and quietly.
    """
    started = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    if started == "-m":
        # What it is while Python looks for the module to run, here `python -m bn_tf1`;
        # before Python 3.10, any other package that imports this one looks the same.
        return __name__ in getattr(sys, "orig_argv", [__name__])
    main = sys.modules.get("__main__")
    return started == __name__ or getattr(main, "IMPORTS_TENSORFLOW_ITSELF", False)


if not _starts_a_program():
    importlib.import_module("bn_tf1.builder")
