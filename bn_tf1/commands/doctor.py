"""Finds what is wrong with the batch norm in anybody's graph, checkpoint or run.

No code of the model is needed, and no graph is run. Exit codes: 0 healthy
(notes alone are), 1 an error or a warning was found, 2 a path cannot be read.
"""

from __future__ import annotations

import argparse
import shutil
import sys

EXAMPLES = (
    "doctor --list",
    "doctor runs/default",
    "doctor model.ckpt-1000 --html report.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="prefix of a checkpoint, .meta file, frozen graph, directory of a "
        "SavedModel, or training directory",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", metavar="REPORT.html", help="also write one self-contained page"
    )
    parser.add_argument(
        "--explain", metavar="CHECK", help="print what a check finds, why, and the cure"
    )
    parser.add_argument("--list", action="store_true", help="list all checks")
    parser.set_defaults(wrong_usage=parser.error)


def run(options: argparse.Namespace) -> int:
    from bn_tf1.doctor.examination import examine
    from bn_tf1.doctor.reports.machine_readable import json_report
    from bn_tf1.doctor.reports.page import html_report
    from bn_tf1.doctor.reports.terminal import (
        explained,
        list_of_checks,
        printable,
        text_report,
    )

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
