"""Files that are whole after a crash: replaced at once, and on the disk when it counts.

Contract: after `replace_text` returned, the new content survives a loss of power; at
every moment before, the file holds either the old or the new content. A process that is
killed meanwhile can leave `<path>.partial`, which the next call replaces.

Source: the rules of rename(2) and fsync(2): a rename is atomic, but it is durable only
after an fsync of the file's content before it and of the folder after it.
"""

from __future__ import annotations

import contextlib
import os
from typing import IO, Iterator

PARTIAL = ".partial"


def replace_text(path: str, text: str) -> None:
    """Writes `text`, UTF-8, to `path`, in the place of what was there.

    Raises:
        OSError: the folder does not exist, or cannot be written to.
    """
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        sync(os.path.dirname(path) or ".")
    except OSError as error:
        if error.filename:
            raise
        # A full disk or a limit, which do not name the file.
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file to be written in the `with` block, which then takes the place of `path`.

    Whole or not at all, but not on the disk yet: for what can be made again.
    """
    partial = path + PARTIAL  # beside it: only within one disk a rename is at once
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def make_folder(folder: str, argument: str) -> None:
    """Makes a folder that is not there, with those around it.

    Raises:
        OSError: it cannot be made; `argument` is what the message calls it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{argument} is {folder!r}, but there can be no such folder: "
            f"{error.strerror}"
        ) from error


def sync(path: str) -> None:
    """Returns once the content of a file, or the names in a folder, are on the disk.

    Raises:
        OSError: `path` does not exist, or its disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
