"""Translates a checkpoint from the names of one library to another's.

Variables of batch-norm layers, and what an optimizer keeps for them, get the
names and shapes of --to; all other tensors pass through bit for bit. What is
ambiguous, or would lose something, is an error.
"""

from __future__ import annotations

import argparse
import itertools

from bn_tf1.checkpoints.dialects import (
    AVERAGE,
    DIALECTS,
    HAND_WRITTEN,
    NO_DIALECTS,
)
from bn_tf1.commands import pair_of

EXAMPLES = (
    "convert OLD NEW/model.ckpt --from slim --to bn_tf1 --dry_run",
    "convert OLD NEW/model.ckpt --from slim --to bn_tf1",
    "convert OLD NEW/model.ckpt --from keras --to slim --map a=b",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dialects = sorted(DIALECTS)
    parser.add_argument("source", help="prefix or directory of a checkpoint")
    parser.add_argument("destination", help="prefix of the checkpoint to write")
    # Asked for and not guessed: what is ambiguous would be translated, and be wrong. (`dest`,
    # since `from` is a word of Python's.)
    parser.add_argument(
        "--from",
        dest="from_dialect",
        required=True,
        type=_library,
        choices=[*dialects, HAND_WRITTEN],
        metavar="LIBRARY",
        help=f"the library that wrote it: {', '.join(dialects)}; {HAND_WRITTEN} where "
        "--map names all layers",
    )
    parser.add_argument(
        "--to",
        dest="to_dialect",
        required=True,
        choices=dialects,
        metavar="LIBRARY",
        help="the library to write it for, one of the same",
    )
    # In several flags or behind one: scripts and people write it differently.
    _add_list(
        parser,
        "--map",
        type=pair_of("OLD=NEW"),
        metavar="OLD=NEW",
        help="new name of a variable or of a whole scope; for --from hand_written the "
        "names of each layer's variables in the target",
    )
    parser.add_argument(
        "--like",
        metavar="CHECKPOINT_OR_META",
        help="a checkpoint or .meta file of the target: matches layers whose numbers "
        "drifted, by order, and gives their shapes",
    )
    parser.add_argument(
        "--shape",
        metavar="1,1,1,C",
        help="shape of the variables for --to sonnet, where --like does not give it",
    )
    _add_list(
        parser,
        "--drop",
        metavar="PATTERN",
        help="names to leave out; * stands for anything",
    )
    parser.add_argument(
        "--ema",
        nargs="?",
        const=AVERAGE,
        metavar="NAME",
        help="let variables take the values of their moving average, of the name "
        f"{AVERAGE} unless told otherwise",
    )
    parser.add_argument(
        "--banks",
        type=int,
        metavar="K",
        help="spread the one set of statistics of each layer over K banks",
    )
    parser.add_argument(
        "--bank_affine",
        action="store_true",
        help="with --banks: a gamma and a beta for each bank, too",
    )
    parser.add_argument(
        "--bank",
        type=int,
        metavar="I",
        help="take bank I out of the several that the layers have",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the table, write nothing"
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.checkpoints.conversion import convert

    names = ("from_dialect", "to_dialect", "like", "shape", "ema")
    names += ("banks", "bank", "bank_affine", "dry_run")
    conversion = convert(
        options.source,
        options.destination,
        name_map=_name_map(itertools.chain.from_iterable(options.map)),
        drop=list(itertools.chain.from_iterable(options.drop)),
        **{name: getattr(options, name) for name in names},
    )
    print(conversion)
    if options.dry_run:
        print("nothing was written: this was a dry run")
    else:
        print(f"wrote {options.destination}, read it back and compared it")
    return 0


def _library(name):
    # Asked for most, and of no use here: what to do instead is told.
    if name.lower() in NO_DIALECTS:
        raise argparse.ArgumentTypeError(f"convert {NO_DIALECTS[name.lower()]}")
    return name


def _add_list(parser, flag, **options):
    """A flag that takes several values and may be given several times."""
    parser.add_argument(flag, nargs="+", action="append", default=[], **options)


def _name_map(pairs):
    # A dict of the pairs would take the last one, in silence.
    name_map = {}
    for old, new in pairs:
        if old in name_map:
            raise ValueError(f"`--map` gives {old!r} two names")
        name_map[old] = new
    return name_map
