"""The command line: python -m bn_tf1 <command>. What the commands are is in `commands`.

Exit codes: 0 it worked, 1 it failed, with one line on standard error, 2 wrong usage, 130
interrupted; those of a command that has others stand in its help.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from typing import Sequence

from bn_tf1 import __version__, commands

# As it was called: its console script has the package's name.
_IS_SCRIPT = os.path.basename(sys.argv[0]) == "bn_tf1"
_PROGRAM = "bn_tf1" if _IS_SCRIPT else "python -m bn_tf1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
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


def _parser():
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Batch normalization for graph-mode TensorFlow 1 code.",
        epilog=f"{_PROGRAM} <command> --help tells more, with examples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bn_tf1 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    subparsers.required = True
    for module in pkgutil.iter_modules(commands.__path__):
        _add_command(
            subparsers, importlib.import_module(f"{commands.__name__}.{module.name}")
        )
    return parser


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
    parser.set_defaults(run=command.run)


if __name__ == "__main__":
    sys.exit(main())
