"""The start of a program of this project: TensorFlow imported at once, and in silence.

On TensorFlow 2.21 the import writes ten rows of log to standard error whatever the level
is, and the first session a red CUDA error on every machine without a GPU; 1.15 adds the
deprecations of its NumPy. What is held back here is given back where the import fails.

Contract: this module imports no TensorFlow itself. Once a process has imported it,
`importing` does nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from typing import Iterator, Sequence

_STDERR = 2
# What the project is installed with, as it is imported.
_NEEDED = ("absl", "filelock", "google_crc32c", "numpy", "tensorflow", "tqdm")


def is_verbose(arguments: Sequence[str]) -> bool:
    """Whether --verbose is among them: asked before what parses them is imported."""
    return not {"--verbose", "-verbose", "--verbose=true"}.isdisjoint(arguments)


@contextlib.contextmanager
def importing(*, verbose: bool) -> Iterator[None]:
    """The `with` block imports TensorFlow; nothing of it is seen unless it fails.

    Args:
        verbose: leaves everything to be seen, now and later: the level of TensorFlow's
            log is the one of TF_CPP_MIN_LOG_LEVEL, or 0.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_what_lacks_told())
        stack.enter_context(_garbage_left_alone())
        stack.enter_context(_ended_by_ctrl_c())
        if not verbose:
            stack.enter_context(_standard_error_held())
        yield
        if not verbose and "tensorflow" in sys.modules:
            # The notices of deprecation concern this project, not its users.
            sys.modules["tensorflow"].compat.v1.logging.set_verbosity("ERROR")


@contextlib.contextmanager
def _what_lacks_told():
    """Most often it was started with another Python than the one of its environment."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        # A fresh Python has none of them, and TensorFlow is the name that tells most.
        lacks_all = importlib.util.find_spec("tensorflow") is None
        lacking = "tensorflow" if lacks_all else error.name
        sys.exit(
            f"there is no {lacking} in this Python, {sys.executable}: use the one of "
            "the environment that the project is installed in, such as .venv/bin/python, "
            "or install it with `python -m pip install .` in its folder"
        )


@contextlib.contextmanager
def _garbage_left_alone():
    """TensorFlow's import makes much that lives for ever: to look through it for garbage
    takes an eighth of the time, now and at each collection afterwards."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _ended_by_ctrl_c():
    """The import takes seconds, and Python would print a traceback of where it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _standard_error_held():
    """By its number: most of what is written comes from C++."""
    try:
        original = os.dup(_STDERR)
    except OSError:  # it is closed
        yield
        return
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, original)
        held = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(held.fileno(), _STDERR)
        # A processor without the instructions that TensorFlow needs ends it by a signal.
        if not faulthandler.is_enabled():
            faulthandler.enable(original)
            stack.callback(faulthandler.disable)
        try:
            yield
        except BaseException:
            _give_back(held, original)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, _STDERR)


def _give_back(held, original):
    sys.stderr.flush()
    held.seek(0)
    text = held.read()
    while text:
        text = text[os.write(original, text) :]
