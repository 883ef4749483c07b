"""The command line: python -m bn_tf1 <command>.

Exit codes: 0 it worked, 1 it failed, with one line on standard error, 2 wrong usage. Of
doctor: 0 healthy (notes alone are), 1 an error or a warning was found, 2 a path cannot be
read.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from typing import Sequence

from bn_tf1.checkpoints.convert import HAND_WRITTEN, NO_DIALECTS, convert
from bn_tf1.checkpoints.dialects import AVERAGE, DIALECTS
from bn_tf1.doctor.examination import examine
from bn_tf1.doctor.reports.machine_readable import json_report
from bn_tf1.doctor.reports.page import html_report
from bn_tf1.doctor.reports.terminal import (
    explained,
    list_of_checks,
    printable,
    text_report,
)
from bn_tf1.graphs.migrate import migrate_graph


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bn_tf1", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.required = True
    _add_convert(commands)
    _add_migrate_graph(commands)
    _add_doctor(commands)
    return parser


def _add_convert(commands):
    command = commands.add_parser(
        "convert",
        help="translate a checkpoint from the names of one library to another's",
    )
    dialects = sorted(DIALECTS)
    command.add_argument("source", help="prefix or directory of a checkpoint")
    command.add_argument("destination", help="prefix of the checkpoint to write")
    command.add_argument(
        "--from",
        dest="from_dialect",
        required=True,
        type=_library,
        choices=[*dialects, HAND_WRITTEN],
    )
    command.add_argument("--to", dest="to_dialect", required=True, choices=dialects)
    _add_list(
        command,
        "--map",
        type=_renaming,
        metavar="OLD=NEW",
        help="new name of a variable or of a whole scope; for --from hand_written the "
        "names of each layer's variables in the target",
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
        "--ema",
        nargs="?",
        const=AVERAGE,
        metavar="NAME",
        help="let variables take the values of their moving average, of the name "
        f"{AVERAGE} unless told otherwise",
    )
    command.add_argument(
        "--dry_run", action="store_true", help="print the table, write nothing"
    )
    command.set_defaults(run=_run_convert)


def _library(name):
    if name.lower() in NO_DIALECTS:
        raise argparse.ArgumentTypeError(f"convert {NO_DIALECTS[name.lower()]}")
    return name


def _add_list(command, flag, **options):
    """A flag that takes several values and may be given several times."""
    command.add_argument(flag, nargs="+", action="append", default=[], **options)


def _renaming(text):
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form OLD=NEW")
    return old, new


def _run_convert(options):
    conversion = convert(
        options.source,
        options.destination,
        from_dialect=options.from_dialect,
        to_dialect=options.to_dialect,
        name_map=_name_map(itertools.chain.from_iterable(options.map)),
        like=options.like,
        shape=options.shape,
        drop=list(itertools.chain.from_iterable(options.drop)),
        ema=options.ema,
        dry_run=options.dry_run,
    )
    print(conversion)
    if options.dry_run:
        print("nothing was written: this was a dry run")
    return 0


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
    print(migrate_graph(options.source, options.destination))
    return 0


def _add_doctor(commands):
    command = commands.add_parser(
        "doctor",
        help="find what is wrong with the batch norm in a graph, checkpoint or training "
        "directory, made by any library",
        epilog="exit codes: 0 healthy (notes alone are), 1 an error or a warning was "
        "found, 2 a path cannot be read",
    )
    command.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="prefix of a checkpoint, .meta file, frozen graph, directory of a "
        "SavedModel, or training directory",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--html", metavar="REPORT.html", help="also write one self-contained page"
    )
    command.add_argument(
        "--explain", metavar="CHECK", help="print what a check finds, why, and the cure"
    )
    command.add_argument("--list", action="store_true", help="list all checks")
    command.set_defaults(run=_run_doctor, wrong_usage=command.error)


def _run_doctor(options):
    columns = shutil.get_terminal_size((100, 24)).columns
    if options.explain is not None or options.list:
        is_list = options.explain is None
        print(
            list_of_checks(columns) if is_list else explained(options.explain, columns)
        )
        return 0
    if not options.paths:
        options.wrong_usage("the following arguments are required: PATH")
    examinations, unreadable = [], []
    for path in options.paths:
        try:
            examinations.append(examine(path))
        except ValueError as error:
            unreadable.append((path, printable(str(error))))
    if options.html is not None:
        page = html_report(examinations, unreadable)
        with open(options.html, "w", encoding="utf-8") as file:
            file.write(page)
    if options.json:
        print(json_report(examinations, unreadable))
    elif examinations:
        print(text_report(examinations, columns))
    for _, error in unreadable:
        print(f"doctor: {error}", file=sys.stderr)
    if unreadable:
        return 2
    return 0 if all(examination.is_healthy for examination in examinations) else 1


if __name__ == "__main__":
    sys.exit(main())
