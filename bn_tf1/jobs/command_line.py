"""How the scripts start: flags in, an exit code out.

Exit codes:
    0: the job did what it was asked.
    1: it failed.
    2: a flag is unknown or out of range, or contradicts the run's config.json.
    3: the evaluation saw no new checkpoint in time, and no process is training.
    4: the evaluation saw no new checkpoint in time, though a process is training.
    5: another process is training in the model directory.
    75: a signal stopped the training, and every step is saved: run again to go on
        (EX_TEMPFAIL of sysexits.h).
    130, 143: SIGINT or SIGTERM ended it, and nothing more was saved.

An expected failure prints one line, not a traceback.
"""

from __future__ import annotations

import gc
import re
import signal
import sys
from typing import Callable, Sequence

import tensorflow.compat.v1 as tf
from absl import app, flags

from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.data.image_files import DataFileError
from bn_tf1.jobs.evaluation import (
    EvaluationError,
    EvaluationTimeout,
    TrainingStalled,
)
from bn_tf1.jobs.saving.committing_saver import SavingError
from bn_tf1.jobs.saving.run_lock import LockedError
from bn_tf1.jobs.training import TrainingError, TrainingStopped

# The first that fits counts: a class stands before those it is derived from.
_EXIT_CODES = {
    SavingError: 1,
    ConfigError: 2,
    DataFileError: 1,
    TrainingStalled: 4,
    EvaluationTimeout: 3,
    EvaluationError: 1,
    LockedError: 5,
    OSError: 1,
    TrainingStopped: 75,
    TrainingError: 1,
}


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main` in graph mode and exits the process."""
    # What was imported stays: no collection has to look through it.
    gc.freeze()
    gc.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    app.run(lambda argv: _run_main(main), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]):
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        _fail(_wrong_value(error), 2)
    # ValueError: of absl for a value behind --no<flag>.
    except (flags.Error, ValueError) as error:
        _fail(str(error), 2)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: every option is a --flag", 2)
    return rest


# How absl's messages go on behind a value that cannot be parsed, which may itself hold ": ".
_REASONS = r"(?:\('Non-boolean|invalid literal|could not|value should|[-\d.e+]+ is not)"


def _wrong_value(error):
    """The message for a value that absl could not parse: flag, value and range.

    Its own holds whatever the parser raised, for a bool a tuple.
    """
    match = re.match(rf"flag --(\w+)=(.*): {_REASONS}", str(error), re.DOTALL)
    if match is None or match.group(1) not in flags.FLAGS:
        return str(error)
    name, value = match.groups()
    flag = flags.FLAGS[name]
    wanted = {
        "bool": "true or false",
        "int": "an integer",
        "float": "a number",
        "string enum": "one of " + ", ".join(getattr(flag.parser, "enum_values", [])),
    }[flag.flag_type()]
    bound = getattr(flag.parser, "lower_bound", None)
    if bound is not None:
        wanted += f", at least {bound:g}"
    return f"--{name} is {value!r}, but must be {wanted}"


def _run_main(main):
    # The notices of deprecation concern this project, not its users.
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    try:
        main()
    except tuple(_EXIT_CODES) as error:
        codes = [code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)]
        _fail(str(error), codes[0])


def _fail(message, code):
    # One line: a value or a path may hold a line break.
    print("error: " + "\\n".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
