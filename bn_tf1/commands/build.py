"""Compiles the operation of kernel="compiled" for the installed TensorFlow.

It is kept in $XDG_CACHE_HOME/bn_tf1, or ~/.cache/bn_tf1, once for each
version of TensorFlow. CXX is the compiler, if that is set; otherwise g++, c++
or clang++.
"""

from __future__ import annotations

import argparse

EXAMPLES = ("build --check", "build")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare its results with float64 afterwards; 1 if they are off",
    )
    parser.add_argument(
        "--sanitizer",
        choices=("address", "undefined", "thread"),
        help="for developers: compile into a temporary folder, to look for mistakes",
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.compiled.building import build

    if options.sanitizer and options.check:
        options.wrong_usage("--check is not for --sanitizer: it checks what is in use")
    # Line by line: a compiler takes a while.
    build(lambda line: print(line, flush=True), options.sanitizer)
    if not options.check:
        return 0
    from bn_tf1.compiled.accuracy import measure

    is_good = True
    for result in measure():  # all of them, also behind one that is off
        print(result)
        is_good = is_good and result.is_good
    return 0 if is_good else 1
