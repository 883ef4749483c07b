"""Files of named arrays, as `np.savez` writes them and people give them for examples."""

from __future__ import annotations

import zipfile

import numpy as np

from bn_tf1.formats.file_signatures import other_format

# What numpy raises for what is no archive, a broken one, or one array without a name.
_NO_ARRAYS = (
    OSError,
    ValueError,
    AttributeError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
)


def read_arrays(path: str, argument: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, by name; nothing of it is unpickled.

    Args:
        path: the file.
        argument: what messages call it.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        # A pickle from anybody could run code.
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _NO_ARRAYS as error:
        # What numpy itself says of a file that it cannot tell has no number.
        if getattr(error, "errno", None) is not None:
            raise ValueError(
                f"{argument} {path} cannot be read: {error.strerror}"
            ) from error
        with open(path, "rb") as file:
            what = other_format(file.read(4096), path)
        if "archive" in what:
            what += f", which cannot be used: {str(error).splitlines()[0]}"
        # Of what it cannot tell, numpy thinks as of a pickle, and advises to load it.
        raise ValueError(
            f"{argument} {path} is no .npz file of numbers, as np.savez writes it, but "
            f"{what or 'something else'}"
        ) from error
