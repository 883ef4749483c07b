"""`tensorflow.contrib` where there is none, as far as tf_slim is what it was.

tf_slim is `tf.contrib.slim` with what that used of contrib: the layers, the scopes, the
losses, the metrics, the training loops. Here they get their old names back:

    tensorflow.contrib.slim        tf_slim, with `nets`
    tensorflow.contrib.layers      the layers, regularizers and initializers of tf_slim
    tensorflow.contrib.framework   its variables and scopes, and what TensorFlow has
    tensorflow.contrib.losses, .metrics, .training     tf_slim's
    tensorflow.contrib.*.python.*  the modules that these were made of

Contract: a module of tf_slim is the same object under both names. What is not there
raises an error that names it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from typing import Any

import tensorflow
import tensorflow.compat.v1 as tf

from bn_tf1.undoable_changes import on_undo, put, put_item, works

_CONTRIB = "tensorflow.contrib"

# What begins like the left side is found under the right one; None is a mere folder.
_RENAMED = {
    "slim": "tf_slim",
    "slim.python": None,
    "slim.python.slim": "tf_slim",
    "layers.python": None,
    "layers.python.layers": "tf_slim.layers",
    "framework.python": None,
    "losses": "tf_slim.losses",
    "metrics": "tf_slim.metrics",
}
_OPS = ("tf_slim.ops.variables", "tf_slim.ops.arg_scope", "tf_slim.ops.framework_ops")
# Several modules under one name.
_JOINED = {
    "layers": ("tf_slim", "tf_slim.layers"),
    "framework": _OPS,
    "framework.python.ops": _OPS,
    "training": ("tf_slim.training.training", "tf_slim.training.evaluation"),
}
# What `tf.contrib.framework` had and TensorFlow itself has today.
_FRAMEWORK = {
    "argsort": tf.argsort,
    "init_from_checkpoint": tf.train.init_from_checkpoint,
    "is_tensor": tf.is_tensor,
    "list_variables": tf.train.list_variables,
    "load_checkpoint": tf.train.load_checkpoint,
    "load_variable": tf.train.load_variable,
    "nest": tf.nest,
    "py_func": tf.py_func,
    "sort": tf.sort,
    "TensorSpec": tf.TensorSpec,
}


def install_contrib() -> tuple:
    """Offers `tensorflow.contrib`, also as an attribute of `tensorflow.compat.v1`.

    On TensorFlow 1.15, which has it, only the latter.

    Returns:
        The names of what was added; () when both were there.

    Raises:
        ModuleNotFoundError: there is no tf_slim.
    """
    added = ()
    if not works(tensorflow, "contrib"):
        _import_tf_slim()
        finder = _ContribFinder()
        sys.meta_path.insert(0, finder)
        on_undo(lambda: _forget(finder))
        put_item(sys.modules, _CONTRIB, _Contrib(_CONTRIB))
        put(tensorflow, "contrib", sys.modules[_CONTRIB])
        added += (_CONTRIB,)
    if not works(tf, "contrib"):
        put(tf, "contrib", tensorflow.contrib)
        added += ("tf.compat.v1.contrib",)
    return added


def _import_tf_slim():
    try:
        importlib.import_module("tf_slim")
    except ModuleNotFoundError as error:
        if error.name != "tf_slim":
            raise
        raise ModuleNotFoundError(
            "`contrib` is True, but there is no tf_slim, of which contrib is made: "
            "pip install tf_slim",
            name="tf_slim",
        ) from error


def _forget(finder):
    # What was imported would stay importable, and so would its name.
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.startswith(_CONTRIB + ".")]:
        del sys.modules[name]


class _Package(types.ModuleType):
    """A module with submodules that are not in a folder."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list = []

    def __getattr__(self, name: str) -> Any:
        try:
            if name.startswith("__"):  # Python looks for what a module may have.
                raise ModuleNotFoundError(f"{self.__name__} has no {name}")
            return importlib.import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError as error:
            raise AttributeError(str(error)) from error


class _Contrib(_Package):
    """`tensorflow.contrib`: its parts are imported when they are asked for."""

    def __dir__(self) -> list:
        return sorted({name.split(".")[0] for name in [*_RENAMED, *_JOINED]})


class _ContribFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of contrib among those of tf_slim."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(_CONTRIB + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        # Python takes what is in `sys.modules` after a module has run. So its spec, which
        # tf_slim needs as it is, stays out of tf_slim's modules.
        sys.modules[module.__name__] = _module(module.__name__)


def _module(fullname):
    name = fullname[len(_CONTRIB) + 1 :]
    if name in _JOINED:
        return _joined(fullname, _JOINED[name])
    known = [old for old in _RENAMED if name == old or name.startswith(old + ".")]
    if not known:
        raise _not_there(fullname)
    old = max(known, key=len)  # the most particular one
    if _RENAMED[old] is None:
        if name != old:
            raise _not_there(fullname)
        return _Package(fullname)
    target = _RENAMED[old] + name[len(old) :]
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        # Something that tf_slim itself lacks is no fault of who asks for contrib.
        if error.name != target:
            raise
        raise _not_there(fullname) from error


def _joined(fullname, sources):
    module = _Package(fullname)
    # Before tf_slim's, which go first where both have a name.
    if fullname == f"{_CONTRIB}.framework":
        vars(module).update(_FRAMEWORK)
    if fullname.endswith(".ops"):
        _add_submodules(module, sources)
    for source in map(importlib.import_module, sources):
        vars(module).update(
            (name, value)
            for name, value in vars(source).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        )
    return module


def _add_submodules(module, sources):
    """Before the names: `ops.arg_scope` is the function, as it was in contrib."""
    for source in sources:
        leaf = source.rpartition(".")[2]
        submodule = importlib.import_module(source)
        sys.modules[f"{module.__name__}.{leaf}"] = submodule
        setattr(module, leaf, submodule)


def _not_there(fullname):
    offered = ", ".join(dir(_Contrib(_CONTRIB)))
    return ModuleNotFoundError(
        f"there is no {fullname}: of {_CONTRIB}, bn_tf1.install(contrib=True) offers "
        f"what tf_slim has of {offered}"
    )
