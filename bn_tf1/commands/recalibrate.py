"""Gives batch norm the statistics that belong to its weights.

Runs examples through the network once more and writes a new checkpoint, in
which each layer has the mean and the variance of all of them together: for a
run that was stopped before its moving averages had converged, for weights that
were averaged (--ema) or edited. All else is kept, the optimizer's state too.

SOURCE is the folder of a run of train.py, whose own training examples are used,
or the .meta file of any library, with its checkpoint and examples.

mismatch: in one pass a layer sees what batch statistics made of the layers
before it; the mean that evaluation then meets differs from the one written by
so many deviations. Larger batches make it smaller, --exact makes it 0.

Exit codes: 0 it worked, 1 it failed, or the result has an error that the doctor
finds.
"""

from __future__ import annotations

import argparse
import os

from bn_tf1.commands import pair_of

EXAMPLES = (
    "recalibrate runs/digits NEW/model.ckpt",
    "recalibrate runs/digits NEW --num_examples 500 --exact",
    "recalibrate G.meta NEW --checkpoint OLD --examples X.npz",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="folder of a run of train.py, or a .meta file of any library"
    )
    parser.add_argument("destination", help="prefix of the checkpoint to write")
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        help="prefix of the checkpoint to begin with; the newest of a run by default",
    )
    parser.add_argument(
        "--num_examples", type=_count, metavar="N", help="use the first N examples only"
    )
    parser.add_argument(
        "--batch_size",
        type=_count,
        metavar="N",
        help="examples in a batch; by default up to 1024, as many as memory allows",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="let weight averages (tf.train.ExponentialMovingAverage) become the weights",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="layer by layer, each behind the final statistics of those before it: a "
        "pass for each layer",
    )
    parser.add_argument(
        "--examples",
        metavar="X.npz",
        help="for a .meta file: arrays whose names are those of the inputs, with the "
        "examples along their first axis",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",  # behind one flag or several, as people write it
        default=[],
        type=pair_of("INPUT=VALUE"),
        metavar="INPUT=VALUE",
        help="for a .meta file: what is fed to other inputs, always the same",
    )


def _count(text):
    # Not type=int, which takes 0 and -1.
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def run(options: argparse.Namespace) -> int:
    import tensorflow.compat.v1 as tf

    # As the scripts do: their networks are graphs of TensorFlow 1.
    tf.disable_v2_behavior()
    is_run = os.path.isdir(options.source)
    (_recalibrate_run if is_run else _recalibrate_graph)(options)
    return _audited(options.destination)


def _recalibrate_run(options):
    # A run knows its examples and builds its network; of a graph both must be told.
    from bn_tf1.jobs.config import CONFIG_FILE
    from bn_tf1.jobs.finished.recalibrated_runs import BATCH_SIZE, recalibrate_run

    if not os.path.exists(os.path.join(options.source, CONFIG_FILE)):
        raise ValueError(
            f"{options.source} has no {CONFIG_FILE}, and so is no folder of a run of "
            "train.py: of other runs give the .meta file, with --checkpoint and --examples"
        )
    # Taken in silence, they would be thought to be what was used.
    if options.examples or options.set:
        raise ValueError(
            f"--examples and --set are for a .meta file, but {options.source} is a run, "
            "which has its own examples"
        )
    run = recalibrate_run(
        options.source,
        options.destination,
        checkpoint=options.checkpoint,
        num_examples=options.num_examples,
        batch_size=options.batch_size or BATCH_SIZE,
        ema=options.ema,
        exact=options.exact,
        watch=_progress,
    )
    print(run.report)
    print(
        f"accuracy on {run.examples} held-out examples: before {run.before:.4f}, with "
        f"batch statistics {run.batch:.4f}, after {run.after:.4f}"
    )


def _recalibrate_graph(options):
    from bn_tf1.formats.array_files import read_arrays
    from bn_tf1.population.imported_graphs import FedExamples, recalibrate_graph

    # The most frequent mistake: of a checkpoint one gives the prefix everywhere else.
    graph = f"{options.source}.meta"
    if os.path.exists(graph):
        raise ValueError(
            f"{options.source} is the prefix of a checkpoint: give its graph as SOURCE, "
            f"{graph}, with --checkpoint {options.source} and --examples X.npz"
        )
    if options.checkpoint is None or options.examples is None:
        raise ValueError(
            f"{options.source} is no folder of a run: for a .meta file give --checkpoint "
            "and --examples"
        )
    examples = FedExamples(
        read_arrays(options.examples, "--examples"),
        dict(pair for pairs in options.set for pair in pairs),
        options.num_examples,
        options.batch_size,
    )
    report, added = recalibrate_graph(
        options.source,
        options.destination,
        checkpoint=options.checkpoint,
        examples=examples,
        ema=options.ema,
        exact=options.exact,
        watch=_progress,
    )
    print(report)
    for name in added:
        print(f"new variable: {name}")


def _progress(feeds, name):
    # On a terminal only (disable=None), and gone afterwards: the report is what stays.
    from tqdm import tqdm

    return tqdm(feeds, desc=name, unit=" batches", leave=False, disable=None)


def _audited(destination):
    """Prints what the doctor has to say of the result; 1 if that is grave."""
    from bn_tf1.doctor.examination import audit

    # What the graph and the step tell of averages is no longer true: these are none.
    findings = [
        finding
        for finding in audit(destination)
        if finding.gravity != "note" and finding.check != "not-converged"
    ]
    for finding in findings:
        print(f"{finding.gravity}: {finding.layer or finding.where}: {finding.what}")
    print(f"wrote {destination}, read it back and audited it")
    return int(any(finding.gravity == "error" for finding in findings))
