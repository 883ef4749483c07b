"""Where the compiled operation is kept, and how it gets into TensorFlow.

Contract: one library for each exact version of TensorFlow, each source and each set of flags,
in a folder of the user's cache that nobody else can read or write:
$XDG_CACHE_HOME/bn_tf1, or ~/.cache/bn_tf1. What somebody else owns, or could have written, is
never loaded: a library is a program.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sys
from typing import Any

import tensorflow.compat.v1 as tf

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "batch_norm.cc")
# Comparisons that do not trap let the compiler choose by masks, and these processors are
# fastest with vectors of 512 bits, which it does not take by itself.
FLAGS = ("-O3", "-fno-trapping-math", "-fPIC", "-shared", "-w")
COMMAND = "python -m bn_tf1 build"

# TensorFlow takes each name of an operation once in a process, and never gives it back.
_loaded: list[Any] = []


class NotBuiltError(ValueError):
    """There is no compiled operation that may be loaded here; says what to do."""


def load() -> Any:
    """The module of the compiled operations, known to TensorFlow from now on.

    A graph that contains them can then be imported, and differentiated.

    Raises:
        NotBuiltError: it is not built for this TensorFlow; its folder or its file may have
            been written by others; or TensorFlow cannot load it.
    """
    if not _loaded:
        path = _built()
        if path is None:
            raise NotBuiltError(
                f"the compiled kernel is not built for TensorFlow {tf.version.VERSION} "
                f"(there is none in {folder()}): run `{COMMAND}`"
            )
        # All on the way: who may rename in a folder decides what is found in it.
        for place in (cache(), folder(), path):
            check_private(place)
        try:
            operations = tf.load_op_library(path)
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            raise NotBuiltError(
                f"{path} cannot be loaded ({error}): delete it and run `{COMMAND}`"
            ) from error
        _loaded.append(operations)
    return _loaded[0]


def is_built() -> bool:
    """Whether there is a compiled operation for this TensorFlow."""
    return bool(_loaded) or _built() is not None


def cache() -> str:
    """The folder of all that this package keeps for a user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(base), "bn_tf1")


def folder() -> str:
    """The folder of the operation for this TensorFlow, this source and these flags."""
    # The version of the compiler, too: nightly and patched builds share a number, and what
    # was made with another layout of TensorFlow's classes ends the process.
    version = tf.version
    with open(SOURCE, "rb") as source:
        key = hashlib.sha256(source.read())
    # The compiler is not needed to load what it made: it is in the name of the file.
    flags = [f for f in tf.sysconfig.get_compile_flags() if not f.startswith("-I")]
    known = (version.VERSION, version.GIT_VERSION, version.COMPILER_VERSION, *FLAGS)
    known += (*flags, sys.platform, platform.machine())
    key.update(repr(known).encode())
    return os.path.join(cache(), f"{version.VERSION}-{key.hexdigest()[:16]}")


def check_private(path: str) -> None:
    """Raises a NotBuiltError unless only this user can write `path`, or read a folder."""
    status = os.lstat(path)  # of a link itself: it may lead elsewhere in a moment
    problem = None
    if status.st_uid != os.getuid():
        problem = f"belongs to the user {status.st_uid}, and not to you"
    elif stat.S_ISLNK(status.st_mode):
        problem = "is a link"
    elif status.st_mode & 0o077:
        problem = f"has the mode {stat.S_IMODE(status.st_mode):o}, open to others"
    if problem is not None:
        raise NotBuiltError(
            f"{path} {problem}: what others may have written is not loaded; delete it "
            f"and run `{COMMAND}`"
        )


def _built():
    place = folder()
    names = os.listdir(place) if os.path.isdir(place) else []
    found = sorted(name for name in names if name.endswith(".so"))
    return os.path.join(place, found[0]) if found else None
