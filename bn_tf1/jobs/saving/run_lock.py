"""One training process for each model directory.

Contract: the lock is the kernel's (flock, through the package filelock), so that it ends
with its process, however that dies, and a file left behind blocks nobody. Beside it,
`train.holder` says who holds it, for the one who is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Iterator

import filelock

from bn_tf1.jobs.saving import durable_files

LOCK_FILE = "train.lock"
HOLDER_FILE = "train.holder"
# An evaluation job that asks `is_held` has the lock for a moment.
_PATIENCE_SECS = 2.0


class LockedError(RuntimeError):
    """Another process trains in the model directory."""


@contextlib.contextmanager
def hold(model_dir: str, argument: str = "--model_dir") -> Iterator[None]:
    """Makes the folder if it is not there, and holds its lock in the `with` block.

    Messages call it `argument`.

    Raises:
        LockedError: another process holds it; the message names it.
        OSError: the folder cannot be made or written to.
    """
    durable_files.make_folder(model_dir, argument)
    lock = filelock.FileLock(os.path.join(model_dir, LOCK_FILE))
    try:
        lock.acquire(timeout=_PATIENCE_SECS)
    except filelock.Timeout:
        raise LockedError(
            f"{argument} is {model_dir!r}, in which {_holder(model_dir)} is training: "
            f"wait for it, end it, or choose another {argument}"
        ) from None
    # Not in the lock's own file, which the package opens anew, and empties, for each try.
    holder = os.path.join(model_dir, HOLDER_FILE)
    try:
        identity = {"pid": os.getpid(), "host": socket.gethostname()}
        durable_files.replace_text(holder, json.dumps(identity) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(holder)
        lock.release()


def is_held(model_dir: str) -> bool:
    """Whether a process trains in the folder right now.

    False, too, where the lock cannot be asked, as on a disk that is only readable.
    """
    if not os.path.exists(os.path.join(model_dir, LOCK_FILE)):
        return False
    lock = filelock.FileLock(os.path.join(model_dir, LOCK_FILE))
    try:
        # The kernel has no other question: for a moment the lock is this process's.
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:
        return False


def _holder(model_dir):
    # It may be gone since the lock was asked for, or be half of one.
    try:
        with open(os.path.join(model_dir, HOLDER_FILE), encoding="utf-8") as file:
            identity = json.load(file)
        return f"process {identity['pid']} on {identity['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
