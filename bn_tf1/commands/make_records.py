"""Writes a folder of images as TFRecords for train.py --dataset=tfrecord.

FOLDER has train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg alone.
The shards come with an index, so that a run starts at once, however large.
"""

from __future__ import annotations

import argparse

EXAMPLES = ("make_records photos photos-records",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the folder of images")
    parser.add_argument(
        "destination", metavar="OUT", help="the folder to write, which must not exist"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=0.1,
        help="share of the images that are for tests, where FOLDER has no test/ "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which ones those are (default: 0)"
    )
    parser.add_argument(
        "--shard_megabytes",
        type=int,
        default=128,
        help="about the size of a shard (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    from bn_tf1.jobs.data.shard_writer import make_records

    # Before all images are listed: 0 would leave a split without any.
    if not 0 < options.test_share < 1:
        raise ValueError(
            f"--test_share is {options.test_share}, but must lie in (0, 1)"
        )
    if options.shard_megabytes < 1:
        raise ValueError(
            f"--shard_megabytes is {options.shard_megabytes}, but must be at least 1"
        )
    counts = make_records(
        options.folder,
        options.destination,
        test_share=options.test_share,
        seed=options.seed,
        shard_bytes=options.shard_megabytes << 20,
    )
    print(
        f"wrote {counts['train']} training and {counts['test']} test examples to "
        f"{options.destination}: train.py --dataset=tfrecord "
        f"--data_dir={options.destination}"
    )
    return 0
