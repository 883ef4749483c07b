"""Starts several workers of one training run on this machine.

Each gets TF_CONFIG with a free port; their lines are marked with [index].
SIGTERM and Ctrl-C are passed on to all. With --restarts all are started again,
and go on from the newest checkpoint, when one is killed or lost.

exit codes: 0 all ended well; that of the first worker that failed by itself,
128 plus the signal for one that was killed; 69 the workers lost each other
"""

from __future__ import annotations

import argparse

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
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="-- and the program to run"
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.workers.launcher import launch

    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise ValueError("there is no program to run: give -- python train.py ...")
    if options.workers < 1 or options.restarts < 0:
        raise ValueError(
            f"--workers is {options.workers} and --restarts {options.restarts}, but "
            "must be at least 1 and 0"
        )
    return launch(
        program,
        options.workers,
        restarts=options.restarts,
        grace_secs=options.grace_secs,
    )
