"""Folds batch norm into the weights before it, where it can be.

Of a frozen graph, the directory of a SavedModel, or a .meta file with its
checkpoint. Each layer that is left is told with its reason; the outputs are
compared with those of the graph before.
"""

from __future__ import annotations

import argparse
import os

from bn_tf1.commands.export import add_choices, chosen

EXAMPLES = (
    "fold MODEL.pb FOLDED.pb --examples X.npz",
    "fold MODEL FOLDED --outputs logits",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a frozen graph, the directory of a SavedModel, a .meta file or a "
        "checkpoint that has one",
    )
    parser.add_argument(
        "out",
        help="what to write: of a SavedModel a SavedModel, of others a frozen graph; "
        "it must not exist",
    )
    add_choices(parser)


def run(options: argparse.Namespace) -> int:
    from bn_tf1.serving.exporting import export

    # What comes in goes out: who has a SavedModel has something that loads one. The file ends
    # in .pb or .pbtxt.
    is_saved_model = os.path.isdir(options.source) and any(
        name.startswith("saved_model.pb") for name in os.listdir(options.source)
    )
    print(
        export(
            options.source,
            options.out,
            to="saved_model" if is_saved_model else "frozen",
            fold=True,
            batch="keep",  # nothing is changed that was not asked for
            **chosen(options),
        )
    )
    return 0
