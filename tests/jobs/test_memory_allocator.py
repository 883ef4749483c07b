"""The allocator's setting, by the page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

# 48 MB: up to 32 MB glibc adapts by itself. The first steps find how the memory is best
# divided: alignment leaves small pieces behind, which block, until there are enough.
PROBE = """
import resource, sys
import tensorflow.compat.v1 as tf
from bn_tf1.jobs import memory_allocator

tf.disable_v2_behavior()
kept = memory_allocator.keep_memory() if sys.argv[1] == "keep" else None
x = tf.Variable(tf.zeros([12, 2**20]))
y = tf.nn.relu((x + 1.0) + (x * 2.0))
one_thread = tf.ConfigProto(
    intra_op_parallelism_threads=1, inter_op_parallelism_threads=1
)
with tf.Session(config=one_thread) as session:
    session.run(tf.global_variables_initializer())
    for _ in range(30):
        session.run(y.op)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        session.run(y.op)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(kept, after - before)
"""


def faults(mode):
    result = subprocess.run(
        [sys.executable, "-c", PROBE, mode],
        check=True,
        capture_output=True,
        text=True,
        # oneDNN, which TensorFlow 2 uses by default on CPUs with AVX512-VNNI, brings an
        # allocator of its own, which keeps its memory and needs no setting.
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
    )
    kept, count = result.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_tensors_no_longer_fault_in_their_memory_at_every_step():
    _, without = faults("leave")
    kept, with_it = faults("keep")
    assert kept == "True"
    # 10 steps with at least one new tensor of 48 MB, 12,288 pages of 4 KB.
    assert without > 100_000
    assert with_it < 0.2 * without
