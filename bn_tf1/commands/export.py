"""Makes a checked model for serving of a training graph and its checkpoint.

Of any library, TensorFlow 1.4 to 2.21: the model code is not needed. The
mode is found and set to inference, what is for training is taken out, and the
outputs are compared with those of the graph before. Nothing is written unless
all checks hold.
"""

from __future__ import annotations

import argparse
from typing import Any

from bn_tf1.commands import pair_of

EXAMPLES = (
    "export RUN/model.ckpt-1000.meta --list",
    "export RUN/model.ckpt-1000.meta MODEL --examples X.npz",
    "export RUN MODEL.pb --to frozen --outputs logits --set keep=1",
)
# Written here, too: `serving`, which knows them, imports TensorFlow.
_FORMATS = ("saved_model", "frozen", "tflite", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a .meta file, a checkpoint or its directory, a frozen graph, or the "
        "directory of a SavedModel",
    )
    parser.add_argument("out", nargs="?", help="what to write: it must not exist")
    parser.add_argument(
        "--to", choices=_FORMATS, default="saved_model", help="the format to write"
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        help="fold batch norm into the weights before it, where it can be",
    )
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="compute the statistics of all layers anew, over --examples",
    )
    parser.add_argument(
        "--preprocessing",
        action="store_true",
        help="of a run of train.py: let the model take stored pixels (uint8)",
    )
    parser.add_argument(
        "--batch",
        choices=("any", "keep", "whole"),
        help="the batch size: any number, or that of the graph; any where it can be. "
        "whole: that of the graph, whose examples may depend on each other",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="tell the inputs, labels and outputs of the graph, and write nothing",
    )
    add_choices(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The options of `fold`, too."""
    parser.add_argument(
        "--checkpoint", metavar="CKPT", help="where it is not the one beside the graph"
    )
    parser.add_argument(
        "--inputs",
        type=_names,
        metavar="A,B",
        help="the tensors that data comes in by; what the outputs need unless given",
    )
    parser.add_argument(
        "--outputs",
        type=_names,
        metavar="Y,Z",
        help="the tensors to serve; told by the graph where there is one choice",
    )
    parser.add_argument(
        "--set",
        dest="settings",  # `set` is Python's
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the value of a placeholder that is no input, such as keep_prob=1",
    )
    parser.add_argument(
        "--examples",
        metavar="X.npz",
        help="arrays by name of an input, to check the model on; random numbers "
        "without",
    )
    parser.add_argument(
        "--time_limit",
        dest="time_limit_secs",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long a run, and the writing, may each take (default: 600)",
    )


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_choices` asks for, as arguments of `serving.exporting.export`."""
    names = ("checkpoint", "inputs", "outputs", "examples", "time_limit_secs")
    given = {name: getattr(options, name) for name in names}
    return {**given, "settings": dict(options.settings)}


def run(options: argparse.Namespace) -> int:
    # The jobs' one, which knows what a run of train.py is; others go on to `serving`.
    from bn_tf1.jobs.finished.exported_runs import export
    from bn_tf1.serving.exporting import list_interface

    if options.list:
        print(list_interface(options.source, settings=dict(options.settings)))
        return 0
    # Optional for argparse, since --list writes nothing.
    if options.out is None:
        raise ValueError("`out` is missing: the file or directory to write")
    print(
        export(
            options.source,
            options.out,
            to=options.to,
            fold=options.fold,
            preprocessing=options.preprocessing,
            recalibrate=options.recalibrate,
            batch=options.batch,
            **chosen(options),
        )
    )
    return 0


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _names(text):
    # None of "", so that "--inputs=" is the same as to leave it out.
    return [name for name in text.split(",") if name]


def _setting(text):
    name, value = pair_of("NAME=VALUE")(text)
    # A placeholder takes no other: a mode, a rate.
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the value must be a number, true or false"
        ) from None
