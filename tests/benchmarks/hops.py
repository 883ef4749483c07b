"""What a hop and a byte between workers cost; on paper, a step of many workers.

    python -m bn_tf1 launch --workers=2 -- python -m tests.benchmarks.hops

A gather among n workers is a ring of n - 1 hops, and its few bytes cost nothing. A reduce is
a ring of 2 (n - 1) hops, each with an nth of the bytes. All gathers of a step come one after
the other, since each layer waits for its statistics.
"""

from __future__ import annotations

import argparse
import time

import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.workers.collectives import Group, gathered, total

# ResNet-20: its layers with batch norm, and the bytes of its gradients.
LAYERS, BYTES = 19, 1.1e6
WORKERS = (2, 4, 8, 16, 64, 256)
NEIGHBOURS = 8
_NUMBERS = 129  # of a layer with 64 channels
_IN_A_ROW = 40


def gathers_ms(workers: int, hop_ms: float) -> float:
    """Of a step with joint statistics: two for each layer."""
    return 2 * LAYERS * (workers - 1) * hop_ms


def reduce_ms(workers: int, hop_ms: float, byte_ns: float) -> float:
    """Of the gradients of a step."""
    carried_ms = BYTES / workers * byte_ns / 1e6
    return 2 * (workers - 1) * (hop_ms + carried_ms)


def table(hop_ms: float, byte_ns: float) -> str:
    """A step of ResNet-20, by the number of workers."""
    lines = [
        f"| workers | gathers, ms | with groups of {NEIGHBOURS}, ms | reduce, ms |",
        "| --- | --- | --- | --- |",
    ]
    for workers in WORKERS:
        groups = ""
        if workers >= NEIGHBOURS:
            groups = f"{gathers_ms(NEIGHBOURS, hop_ms):.0f} "
        lines.append(
            f"| {workers} | {gathers_ms(workers, hop_ms):.0f} | {groups}| "
            f"{reduce_ms(workers, hop_ms, byte_ns):.0f} |"
        )
    return "\n".join(lines)


def measure(workers: bn_tf1.Workers, rounds: int) -> tuple[float, float]:
    """(milliseconds of a hop, nanoseconds of a byte), the medians of the rounds."""
    everybody = Group(workers.size, 1)
    numbers = tf.ones([_NUMBERS])
    for _ in range(_IN_A_ROW):
        numbers = tf.reduce_mean(gathered(numbers, everybody), 0)
    gradients = tf.ones([int(BYTES / 4)])
    for _ in range(_IN_A_ROW // 8):
        gradients = total(gradients, everybody) / workers.size
    with workers.session() as session:
        gather_ms = _median_ms(session, numbers.op, rounds) / _IN_A_ROW
        sum_ms = _median_ms(session, gradients.op, rounds) / (_IN_A_ROW // 8)
    hop_ms = gather_ms / (workers.size - 1)
    carried_ms = sum_ms / (2 * (workers.size - 1)) - hop_ms
    return hop_ms, 1e6 * carried_ms / (BYTES / workers.size)


def _median_ms(session, operation, rounds):
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        session.run(operation)
        took.append(1e3 * (time.perf_counter() - start))
    return sorted(took[1:])[rounds // 2]  # the first one connects the workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="how many, 15")
    options = parser.parse_args()
    tf.disable_v2_behavior()
    workers = bn_tf1.Workers.from_environment()
    if workers is None or workers.size == 1:
        raise SystemExit("there are no workers: start it by python -m bn_tf1 launch")
    workers.join()
    hop_ms, byte_ns = measure(workers, options.rounds)
    if workers.is_chief:
        print(f"TensorFlow {tf.version.VERSION}, {workers.size} workers:")
        print(f"a hop {hop_ms:.2f} ms, a byte {byte_ns:.1f} ns")
        print(table(hop_ms, byte_ns))


if __name__ == "__main__":
    main()
