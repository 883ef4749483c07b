"""Finds what is wrong with the batch norm in anybody's graph, checkpoint or run.

No code of the model is needed, and no graph is run. Exit codes: 0 healthy
(notes alone are), 1 an error or a warning was found, 2 a path cannot be read or
the page cannot be written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile

EXAMPLES = (
    "doctor runs/default",
    "doctor model.ckpt-1000 --html report.html",
    "doctor --list",
    "doctor --explain never-updated",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",  # none with --list and --explain
        metavar="PATH",
        help="prefix of a checkpoint, .meta file, frozen graph, directory of a "
        "SavedModel, or training directory",
    )
    parser.add_argument(
        "--all", action="store_true", help="show every layer, also those that are alike"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", metavar="REPORT.html", help="also write one self-contained page"
    )
    parser.add_argument(
        "--explain", metavar="CHECK", help="print what a check finds, why, and the cure"
    )
    parser.add_argument("--list", action="store_true", help="list all checks")


def run(options: argparse.Namespace) -> int:
    if options.explain is not None or options.list:
        if options.paths:
            options.wrong_usage("--explain and --list examine no PATH: leave it out")
        _print_checks(options)
        return 0
    if not options.paths:
        # In argparse's words: it would say so itself without --list.
        options.wrong_usage("the following arguments are required: PATH")
    return _examine(options)


def _print_checks(options):
    from bn_tf1.doctor.reports.terminal import explained, list_of_checks

    if options.explain is not None:
        print(explained(options.explain, _columns()))
    else:
        print(list_of_checks(_columns()))


def _examine(options):
    from bn_tf1.doctor.examination import examine
    from bn_tf1.doctor.reports.machine_readable import json_report
    from bn_tf1.doctor.reports.page import html_report
    from bn_tf1.doctor.reports.terminal import printable, text_report

    # One that cannot be read takes nothing away from the others.
    examinations, unreadable = [], []
    for path in options.paths:
        try:
            examinations.append(examine(path))
        except ValueError as error:
            unreadable.append((path, printable(str(error))))
    # What was found is printed first, so that a page that fails takes nothing away.
    # Also of no path at all: who reads it as JSON wants JSON.
    if options.json:
        print(json_report(examinations, unreadable))
    elif examinations:
        report = text_report(
            examinations,
            _columns(),
            in_colour=_is_in_colour(),
            every_layer=options.all,
        )
        print(report)
    for _, error in unreadable:
        print(f"doctor: {error}", file=sys.stderr)
    if options.html is not None:
        page = html_report(examinations, unreadable)
        if not _is_written(options.html, page):
            return 2
    if unreadable:
        return 2
    return 0 if all(examination.is_healthy for examination in examinations) else 1


def _columns():
    return shutil.get_terminal_size((80, 24)).columns


def _is_in_colour():
    """Whether standard output is a terminal that wants colours (no-color.org)."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not is_plain


def _is_written(path, page):
    """Writes the page whole or not at all, and says why not."""
    folder = os.path.dirname(path) or "."
    try:
        # In the same folder: only there a rename is at once. In one of its own in there:
        # people write pages into shared ones, where a known name may be another's link.
        with tempfile.TemporaryDirectory(prefix=".report", dir=folder) as scratch:
            written = os.path.join(scratch, "page")
            with open(written, "w", encoding="utf-8") as file:
                file.write(page)
            os.replace(written, path)
    except OSError as error:
        reason = f"{error.strerror}: the report above is all that it would show"
        print(f"doctor: {path} cannot be written: {reason}", file=sys.stderr)
        return False
    return True
