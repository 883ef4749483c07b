"""Makes a training graph of TensorFlow 1.15 importable by 2.x.

Removes the stored shapes of batch-norm gradients, on which the two versions
disagree. The TensorFlow that runs this imports the result before it is written.
"""

from __future__ import annotations

import argparse

EXAMPLES = ("migrate_graph OLD/model.ckpt-1000.meta NEW.meta",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the .meta file to read")
    parser.add_argument("destination", help="the .meta file to write")


def run(options: argparse.Namespace) -> int:
    from bn_tf1.graphs.migrate import migrate_graph

    print(migrate_graph(options.source, options.destination))
    return 0
