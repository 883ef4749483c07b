"""Measures all of it and prints one table: see the package's first lines.

The column "bn_tf1/it" is this library's figure over the contender's in the same case:
below 1 where the library is faster, or smaller. Where the two took turns it is the median
of the ratios of the rounds, which had the same load beside them.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import json
import platform
import subprocess
import sys

import tensorflow.compat.v1 as tf

from bn_tf1.jobs import memory_allocator
from tests.benchmarks import accuracy, graphs, jobs, layers, networks, peers, timing

SECTIONS = (
    "layers",
    "followed",
    "masked",
    "ghost",
    "shipped",
    "steps",
    "inference",
    "memory",
    "graphs",
    "jobs",
    "accuracy",
)
QUICK_SECTIONS = tuple(name for name in SECTIONS if name not in ("ghost", "accuracy"))


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    if not options.leave_memory:
        memory_allocator.keep_memory()
    found = []
    sections = QUICK_SECTIONS if options.quick else SECTIONS
    for section in options.only or sections:
        found += _measure(section, options)
    report = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "tensorflow": tf.version.VERSION,
        "python": platform.python_version(),
        "rows": [row._asdict() for row in found],
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    print(f"TensorFlow {report['tensorflow']}, {report['machine']}")
    print(table(found))


def table(rows: list[timing.Row]) -> str:
    """The rows as a Markdown table, with the ratio to this library in each case."""
    ours = {
        (row.case, row.unit): row.value for row in rows if row.contender == peers.OURS
    }
    lines = [
        "| case | contender | median | spread | bn_tf1/it |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        ratio = row.ratio
        if ratio is None:
            own = ours.get((row.case.replace(", shipped allocator", ""), row.unit))
            ratio = own / row.value if own else None
        lines.append(
            f"| {row.case} | {row.contender} | {row.value:.4g} {row.unit} | "
            f"{row.spread:.2g} | " + (f"{ratio:.2f} |" if ratio else "|")
        )
    return "\n".join(lines)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer shapes, modes and rounds; no ghost batches, and no accuracy",
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--json", metavar="FILE", help="writes the figures there too")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, help="measures these sections alone"
    )
    parser.add_argument("--shapes", type=int, help="measures so many shapes of layers")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=layers.MODES,
        help="measures layers in these modes alone",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=networks.PRECISIONS,
        default=networks.PRECISIONS,
        help="measures steps in these alone: bfloat16 takes minutes where the processor "
        "has none",
    )
    parser.add_argument(
        "--leave_memory",
        action="store_true",
        help="leaves the memory allocator as TensorFlow ships it",
    )
    return parser


def _measure(section, options):
    small = options.quick or options.tiny
    size = {"batch": 4, "size": 8, "blocks": 1} if options.tiny else {}
    rounds = 2 if options.tiny else 4 if options.quick else 15
    if section == "layers":
        modes = options.modes or layers.MODES[1 if options.quick else 0 :]
        return layers.measure(_shapes(options), rounds, modes)
    if section == "followed":
        modes = options.modes or layers.MODES[1 : 2 if small else 3]
        shapes = _shapes(options)
        if options.quick:  # images alone: most networks have no others in between
            shapes = {name: case for name, case in shapes.items() if len(case[0]) == 4}
        return [
            row
            for follower in layers.FOLLOWERS.values()
            for row in layers.measure(shapes, rounds, modes, follower)
        ]
    if section == "masked":
        return layers.measure_masked(_shapes(options), rounds)
    if section == "ghost":
        return layers.measure_ghost_batches(_shapes(options), rounds)
    if section == "shipped":
        return _with_the_shipped_allocator(options)
    if section == "steps":
        return networks.measure_steps(rounds, options.precisions, **size)
    if section == "inference":
        return networks.measure_inference(rounds, **size)
    if section == "memory":
        names = [peers.OURS, networks.NONE] if small else list(networks.LAYERS)
        return networks.measure_memory(names, **size)
    if section == "graphs":
        return graphs.measure(5 if small else 20, 3 if small else 7)
    if section == "accuracy":
        return accuracy.measure(_shapes(options))
    if options.tiny:
        return jobs.measure(starts=1, rounds=1, steps=20)
    turns = 2 if options.quick else rounds
    return jobs.measure(starts=turns, rounds=turns, steps=200)


def _shapes(options):
    if options.tiny:
        return layers.TINY
    names = layers.QUICK if options.quick else tuple(layers.SHAPES)
    return {name: layers.SHAPES[name] for name in names[: options.shapes]}


def _with_the_shipped_allocator(options):
    """The layers again, in a process that leaves the allocator alone."""
    command = [sys.executable, "-m", "tests.benchmarks", "--leave_memory"]
    command += ["--only", "layers", "--modes", "forward+backward"]
    command += ["--json", "/dev/stdout"]
    command += ["--quick"] * options.quick + ["--tiny"] * options.tiny
    command += ["--shapes", "1"] if options.quick else []
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout.decode()
    report, _ = json.JSONDecoder().raw_decode(output)
    return [
        timing.Row(
            **{**row, "case": row["case"] + ", shipped allocator", "ratio": None}
        )
        for row in report["rows"]
        if row["contender"] != "PyTorch"
    ]


if __name__ == "__main__":
    main()
