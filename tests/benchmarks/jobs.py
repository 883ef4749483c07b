"""The training job: from its start to its first step, its speed from there on, its input."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import tensorflow.compat.v1 as tf

from bn_tf1.jobs import datasets, models
from tests.benchmarks import timing

_IMPORT = "import tensorflow.compat.v1 as tf"
_BATCH = 64


def measure(starts: int, steps: int) -> list[timing.Row]:
    """Start-up beside `import tensorflow`; images/s beside those of the bare step."""
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(1000))

        def first_step():
            model_dir = os.path.join(folder, str(next(number)))
            _step_times(["--max_steps=1", "--log_steps=1", f"--model_dir={model_dir}"])

        def imported():
            subprocess.run(
                [sys.executable, "-c", _IMPORT], check=True, env=_environment()
            )

        timings = timing.in_turns(
            {"train.py to its first step": first_step, "import tensorflow": imported},
            starts,
            warm_up=1,
        )
        speeds = {"train.py": [], "bare step": [], "input alone": []}
        bare, batch = _bare_step(), _input_batch()
        for _ in range(starts):
            model_dir = os.path.join(folder, str(next(number)))
            speeds["train.py"].append(_speed_of_the_job(steps, model_dir))
            speeds["bare step"].append(_speed_of(bare, steps // 2))
            speeds["input alone"].append(_speed_of(batch, steps // 2))
    case = f"convnet on digits, batch {_BATCH}"
    return timing.rows("start, digits", timings) + [
        timing.Row(case, name, statistics.median(found), 0.0, "images/s")
        for name, found in speeds.items()
    ]


def _speed_of_the_job(steps, model_dir):
    """Images/s from its first log line to its last."""
    times = _step_times(
        [
            f"--max_steps={steps}",
            f"--log_steps={steps // 10}",
            f"--model_dir={model_dir}",
        ]
    )
    return _BATCH * (steps - steps // 10) / (times[-1] - times[0])


def _speed_of(step, calls):
    """Images/s of one call after the other."""
    for _ in range(calls // 10):
        step()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return _BATCH * calls / (time.perf_counter() - start)


def _environment():
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


def _step_times(arguments):
    """When each of the job's log lines came."""
    times = []
    with subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        text=True,
    ) as job:
        for line in job.stdout:
            if line.startswith("step "):
                times.append(time.perf_counter())
    if job.returncode != 0:
        raise RuntimeError(f"train.py {' '.join(arguments)}: exit {job.returncode}")
    return times


def _bare_step():
    """The same network and optimizer, on one batch that never changes."""
    with tf.Graph().as_default() as graph:
        images = tf.get_variable(
            "images", initializer=tf.random_uniform([_BATCH, 8, 8, 1]), trainable=False
        )
        settings = models.Settings(num_classes=10)
        logits = models.convnet(images, True, settings)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.zeros([_BATCH], tf.int32), logits=logits
        )
        minimize = tf.train.MomentumOptimizer(0.01, 0.9).minimize(
            tf.reduce_mean(losses)
        )
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        initialize = tf.global_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(initialize)
    return lambda: session.run([minimize, updates])


def _input_batch():
    """The batches that train.py takes, and nothing that reads them."""
    with tf.Graph().as_default() as graph:
        batches = datasets.training_batches(
            datasets.open_dataset("digits", "train"),
            _BATCH,
            seed=0,
            first_step=0,
            augment=True,
        )
        iterator = tf.data.make_initializable_iterator(batches)
        images, labels = iterator.get_next()
    session = tf.Session(graph=graph)
    session.run(iterator.initializer)
    return lambda: session.run([images.op, labels.op])
