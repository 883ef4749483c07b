"""Starts several workers of one training run on this machine.

Each gets TF_CONFIG with a free port; their lines are marked with [index].
SIGTERM and Ctrl-C are passed on to all. With --restarts all are started again,
and go on from the newest checkpoint, when one is killed or lost.

exit codes: 0 all ended well; that of the first worker that failed by itself,
128 plus the signal for one that was killed; 69 the workers lost each other
"""

from __future__ import annotations

import argparse
import os
import shutil

EXAMPLES = (
    "launch --workers=2 -- python train.py --model_dir=runs/joint",
    "launch --workers=4 --restarts=9 -- python train.py",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=2, help="how many, 2")
    parser.add_argument(
        "--restarts", type=int, default=0, help="how often to start all again, 0"
    )
    parser.add_argument(
        "--grace_secs",
        type=float,
        default=30.0,
        help="how long the others have to end after one that failed, 30 seconds",
    )
    # All that follows, with the flags of the program.
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="-- and the program to run"
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.workers.launcher import launch

    # argparse leaves the -- in front.
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise ValueError("there is no program to run: give -- python train.py ...")
    for flag, value, least in [
        ("--workers", options.workers, 1),
        ("--restarts", options.restarts, 0),
    ]:
        if value < least:
            raise ValueError(f"{flag} is {value}, but must be at least {least}")
    # Once, here: each worker would fail by itself, and be started again with --restarts.
    _check_program(program[0])
    return launch(
        program,
        options.workers,
        restarts=options.restarts,
        grace_secs=options.grace_secs,
    )


def _check_program(name):
    if shutil.which(name) is not None:
        return
    # The most frequent mistake: a script without the Python that runs it.
    if name.endswith(".py") and os.path.isfile(name):
        raise ValueError(
            f"{name} is no program that can be started by itself: give -- python {name} ..."
        )
    raise ValueError(
        f"there is no program {name} that can be started: give one of PATH or the path of "
        "one, such as -- python train.py ..."
    )
