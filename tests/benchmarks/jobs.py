"""The training job: from its start to its first step, its speed from there on, its input.

The start is compared with `import tensorflow`, process by process in turns.

The whole job, with its input, reports, summaries and checkpoints, is compared with the bare
step: the same network, loss and optimizer, on one batch that never changes. The two take
turns of a few steps in one process. The ratios are medians of those of neighbours, which
had the same load beside them.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from typing import Callable, Iterator

import tensorflow.compat.v1 as tf

from bn_tf1.jobs import network_from_config, step_loop, training
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.data import datasets
from bn_tf1.jobs.progress import Progress
from bn_tf1.train_step.train_op import make_train_op
from tests.benchmarks import timing

_IMPORT = "import tensorflow.compat.v1 as tf"
# Many more than the batches that the input makes ready in the turn of the bare step.
_STEPS_OF_A_TURN = 20


def measure(starts: int, rounds: int, steps: int) -> list[timing.Row]:
    """Start-up beside `import tensorflow`; images/s beside those of the bare step.

    Args:
        starts: how often train.py is started.
        rounds: how often the speeds are measured.
        steps: of a round, in which the job saves one checkpoint and two summaries.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = _start_rows(folder, starts)
        config = Config(
            model_dir=os.path.join(folder, "job"),
            max_steps=10**6,
            save_checkpoint_steps=steps,
            summary_steps=steps // 2,
            log_steps=steps // 2,
        )
        return rows + _speed_rows(config, rounds)


@contextlib.contextmanager
def job(config: Config) -> Iterator[Callable[[], object]]:
    """A run as train.py starts it: a function that makes one step of it."""
    os.makedirs(config.model_dir)
    with tf.Graph().as_default():
        step = training._build_step(
            config, network_from_config.open_split(config, "train")
        )
        with step_loop.started(config, step, None, Progress(config)) as run:
            yield run.make_step


def _start_rows(folder, starts):
    started, imported = [], []
    for turn in range(starts + 1):
        seconds = _seconds_to_first_step(os.path.join(folder, str(turn)))
        if turn:  # the first brings the files into memory
            started.append(seconds)
            imported.append(_seconds_of(_import_tensorflow))
    ratios = [ours / reference for ours, reference in zip(started, imported)]
    case = "start, digits"
    return [
        timing.row(
            case, "train.py to its first step", [1e3 * s for s in started], "ms"
        ),
        timing.row(case, "import tensorflow", [1e3 * s for s in imported], "ms"),
        timing.row(case, "train.py over import tensorflow", ratios, "times"),
    ]


def _seconds_to_first_step(model_dir):
    """Until its log line comes; what the run does then is not counted."""
    arguments = ["--max_steps=1", "--log_steps=1", f"--model_dir={model_dir}"]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        text=True,
    ) as job:
        found = [
            time.perf_counter() - start
            for line in job.stdout
            if line.startswith("step ")
        ]
    if job.returncode != 0:
        raise RuntimeError(f"train.py {' '.join(arguments)}: exit {job.returncode}")
    return found[0]


def _import_tensorflow():
    command = [sys.executable, "-c", _IMPORT]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=_environment())


def _environment():
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


def _speed_rows(config, rounds):
    steps = config.save_checkpoint_steps
    # What a job prints goes to a file or a pipe, not into the table.
    silenced = contextlib.redirect_stderr(io.StringIO())
    with silenced, contextlib.redirect_stdout(io.StringIO()), job(config) as step:
        contenders = {"train.py": step, "bare step": _bare_step(config)}
        batch = _input_batch(config)
        found = {name: [] for name in [*contenders, "input alone"]}
        _take_turns(contenders, _STEPS_OF_A_TURN)  # compiles, and fills caches
        _seconds_of(batch, steps)
        for _ in range(rounds):
            totals = _take_turns(contenders, steps)
            totals["input alone"] = _seconds_of(batch, 5 * steps) / 5
            for name, seconds in totals.items():
                found[name].append(config.batch_size * steps / seconds)
    case = f"{config.model} on {config.dataset}, batch {config.batch_size}"
    ratios = [job / bare for job, bare in zip(found["train.py"], found["bare step"])]
    return [
        *(timing.row(case, name, speeds, "images/s") for name, speeds in found.items()),
        timing.row(case, "train.py over bare step", ratios, "times"),
    ]


def _take_turns(contenders, steps):
    """The seconds of `steps` steps of each."""
    totals = dict.fromkeys(contenders, 0.0)
    done = 0
    while done < steps:
        count = min(_STEPS_OF_A_TURN, steps - done)
        for name, step in contenders.items():
            totals[name] += _seconds_of(step, count)
        done += count
    return totals


def _seconds_of(call, count=1):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _bare_step(config):
    """The step of the job on one batch, and nothing beside it."""
    dataset = network_from_config.open_split(config, "train")
    shape = [config.batch_size, *dataset.image_shape]
    with tf.Graph().as_default() as graph:
        images = tf.get_variable(
            "images", initializer=tf.random_uniform(shape), trainable=False
        )
        labels = tf.zeros([config.batch_size], tf.int32)
        objective = network_from_config.build(
            images, labels, True, config, dataset.num_classes
        )
        loss = tf.reduce_mean(objective.losses) + tf.losses.get_regularization_loss()
        global_step = tf.train.get_or_create_global_step()
        learning_rate = training._learning_rate(config, global_step)
        optimizer = tf.train.MomentumOptimizer(learning_rate, config.momentum)
        train_op = make_train_op(loss, optimizer, global_step=global_step)
        initialize = tf.global_variables_initializer()
    session = tf.Session(graph=graph)
    session.run(initialize)
    return lambda: session.run(train_op)


def _input_batch(config):
    """The batches of the job, and nothing that reads them."""
    with tf.Graph().as_default() as graph:
        batches = datasets.training_batches(
            network_from_config.open_split(config, "train"),
            config.batch_size,
            seed=config.seed,
            first_step=0,
            augment=config.augment,
        )
        iterator = tf.data.make_initializable_iterator(batches)
        images, labels = iterator.get_next()
    session = tf.Session(graph=graph)
    session.run(iterator.initializer)
    return lambda: session.run([images.op, labels.op])
