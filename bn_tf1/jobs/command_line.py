"""How the scripts start: flags in, an exit code out.

Exit codes: 0 the job did what it was asked, 1 it failed, 2 a flag is unknown or out of
range, 3 the evaluation timed out, 130 and 143 it was ended by SIGINT and SIGTERM. An
expected failure prints one line, not a traceback.
"""

from __future__ import annotations

import signal
import sys
from typing import Callable, Sequence

import tensorflow.compat.v1 as tf
from absl import app, flags

from bn_tf1.jobs.config import ConfigError
from bn_tf1.jobs.evaluation import EvaluationError, EvaluationTimeout
from bn_tf1.jobs.image_files import DataFileError
from bn_tf1.jobs.training import TrainingError

_EXIT_CODES = {
    ConfigError: 2,
    DataFileError: 1,
    EvaluationError: 1,
    EvaluationTimeout: 3,
    TrainingError: 1,
}


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main` in graph mode and exits the process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app.run(lambda argv: _run_main(main), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]):
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error), 2)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: every option is a --flag", 2)
    return rest


def _run_main(main):
    # The notices of deprecation concern this project, not its users.
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    try:
        main()
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except tuple(_EXIT_CODES) as error:
        _fail(str(error), _EXIT_CODES[type(error)])


def _fail(message, code):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
