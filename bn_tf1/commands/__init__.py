"""The commands of `python -m bn_tf1`: each is a module in here that has its name.

    docstring                      its help, of 80 columns; the first line of it stands in
                                   `python -m bn_tf1 --help`, too
    EXAMPLES                       command lines, without "python -m bn_tf1"
    add_arguments(parser)          its options, for an `argparse.ArgumentParser`
    run(options)                   does it, and returns the exit code; a ValueError or an
                                   OSError becomes one line on standard error, and 1;
                                   `options.wrong_usage(text)` ends it with the usage, and 2

A new file is a new command. At its top it imports nothing that imports TensorFlow, so
that help and wrong usage answer at once: `run` does.
"""

from __future__ import annotations

import argparse
from typing import Callable


def pair_of(form: str) -> Callable[[str], tuple[str, str]]:
    """A `type` of argparse for two words of a form, such as NAME=VALUE."""

    def parse(text):
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {form}")
        return name, value

    return parse
