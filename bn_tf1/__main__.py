"""The command line: python -m bn_tf1 <command>.

Exit codes: 0 it worked, 1 it failed, with one line on standard error, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Sequence

from bn_tf1.tools.convert import convert
from bn_tf1.tools.migrate_graph import migrate_graph
from bn_tf1.tools.names import DIALECTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bn_tf1", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.required = True
    _add_convert(commands)
    _add_migrate_graph(commands)
    return parser


def _add_convert(commands):
    command = commands.add_parser(
        "convert",
        help="translate a checkpoint from the names of one library to another's",
    )
    dialects = sorted(DIALECTS)
    command.add_argument("source", help="prefix or directory of a checkpoint")
    command.add_argument("destination", help="prefix of the checkpoint to write")
    command.add_argument("--from", dest="from_dialect", required=True, choices=dialects)
    command.add_argument("--to", dest="to_dialect", required=True, choices=dialects)
    _add_list(
        command,
        "--map",
        type=_renaming,
        metavar="OLD=NEW",
        help="new name of a variable or of a whole scope",
    )
    command.add_argument(
        "--like",
        metavar="CHECKPOINT_OR_META",
        help="a checkpoint or .meta file of the target: matches layers whose numbers "
        "drifted, by order, and gives their shapes",
    )
    command.add_argument(
        "--shape",
        metavar="1,1,1,C",
        help="shape of the variables for --to sonnet, where --like does not give it",
    )
    _add_list(
        command,
        "--drop",
        metavar="PATTERN",
        help="names to leave out; * stands for anything",
    )
    command.add_argument(
        "--dry_run", action="store_true", help="print the table, write nothing"
    )
    command.set_defaults(run=_run_convert)


def _add_list(command, flag, **options):
    """A flag that takes several values and may be given several times."""
    command.add_argument(flag, nargs="+", action="append", default=[], **options)


def _renaming(text):
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OLD=NEW")
    return old, new


def _run_convert(options):
    return convert(
        options.source,
        options.destination,
        from_dialect=options.from_dialect,
        to_dialect=options.to_dialect,
        name_map=_name_map(itertools.chain.from_iterable(options.map)),
        like=options.like,
        shape=options.shape,
        drop=list(itertools.chain.from_iterable(options.drop)),
        dry_run=options.dry_run,
    )


def _name_map(pairs):
    name_map = {}
    for old, new in pairs:
        if old in name_map:
            raise ValueError(f"`--map` gives {old!r} two names")
        name_map[old] = new
    return name_map


def _add_migrate_graph(commands):
    command = commands.add_parser(
        "migrate_graph", help="make a 1.15 training graph importable by TensorFlow 2.x"
    )
    command.add_argument("source", help="the .meta file to read")
    command.add_argument("destination", help="the .meta file to write")
    command.set_defaults(run=_run_migrate_graph)


def _run_migrate_graph(options):
    return migrate_graph(options.source, options.destination)


if __name__ == "__main__":
    sys.exit(main())
