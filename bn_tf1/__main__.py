"""The command line: python -m bn_tf1 <command>. What the commands are is in `commands`.

Exit codes: 0 it worked, 1 it failed, with one line on standard error, 2 wrong usage, 130
interrupted; those of a command that has others stand in its help.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import re
import sys
from typing import Sequence

from bn_tf1 import __version__, commands, quiet_start

# As it was called: its console script has the package's name.
_IS_SCRIPT = os.path.basename(sys.argv[0]) == "bn_tf1"
_PROGRAM = "bn_tf1" if _IS_SCRIPT else "python -m bn_tf1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.wrong_usage(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    with quiet_start.importing(verbose=options.verbose):
        from tensorflow.compat.v1 import errors

        from bn_tf1.checkpoints.reader_writer import first_line
    try:
        exit_code = options.run(options)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        # `doctor ... | head` has read enough. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.command}: interrupted", file=sys.stderr)
        return 130
    except errors.OpError as error:
        if options.verbose:
            raise
        # One line of what happened, without thirty of where in the graph.
        text = f"{options.command}: {first_line(error)}; --verbose tells where"
        print(text, file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """A parser that knows what was probably meant."""

    def error(self, message):
        match = re.search(r"(?:invalid choice: '|arguments: )([^'=\s]+)", message)
        if match is not None:
            known = [word for action in self._actions for word in _words_of(action)]
            close = difflib.get_close_matches(match.group(1), known, n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        super().error(message)


def _words_of(action):
    return [*action.option_strings, *(action.choices or ())]


def _parser():
    parser = _Parser(
        prog=_PROGRAM,
        description="Batch normalization for graph-mode TensorFlow 1 code.",
        epilog=f"{_PROGRAM} <command> --help tells more, with examples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_version(parser)
    parser.set_defaults(wrong_usage=parser.error)
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for module in pkgutil.iter_modules(commands.__path__):
        _add_command(
            subparsers, importlib.import_module(f"{commands.__name__}.{module.name}")
        )
    return parser


def _add_version(parser):
    parser.add_argument("--version", action="version", version=f"bn_tf1 {__version__}")


def _add_command(subparsers, command):
    examples = "\n".join(f"  {_PROGRAM} {line}" for line in command.EXAMPLES)
    parser = subparsers.add_parser(
        command.__name__.rpartition(".")[2],
        help=command.__doc__.partition("\n")[0],
        description=command.__doc__.strip(),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Of this parser: what is unknown would else be reported with the usage of all.
    parser.set_defaults(run=command.run, wrong_usage=parser.error)
    parser.add_argument(
        "--verbose", action="store_true", help="show TensorFlow's own log, too"
    )
    _add_version(parser)


if __name__ == "__main__":
    sys.exit(main())
