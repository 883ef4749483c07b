"""Draws the curves of a run, or of two, as one page to look at in a browser.

The run may be any program's: its event files (*tfevents*) are read, in its
folder and in the folders in it, such as train and eval.
"""

from __future__ import annotations

import argparse
import os

EXAMPLES = (
    "report runs/default",
    "report runs/default --compare runs/other --output both.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of the run")
    parser.add_argument(
        "--compare", metavar="OTHER", help="folder of a run to draw in the same charts"
    )
    parser.add_argument(
        "--output",
        metavar="REPORT.html",
        help="file to write; report.html in the folder of the run by default, "
        "comparison.html for two",
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.jobs.reporting import run_page

    # Both are read before anything is written: a page of one of two would look complete.
    runs = [run_page.read_run(options.model_dir)]
    name = run_page.REPORT_FILE
    if options.compare is not None:
        runs.append(run_page.read_run(options.compare))
        name = "comparison.html"
    # In the folder of the first: that of the other may be somebody else's.
    path = options.output or os.path.join(options.model_dir, name)
    try:
        run_page.write_page(path, runs)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; name another file with --output"
        ) from error
    print(f"wrote {path}")
    return 0
