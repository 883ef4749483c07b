"""What the protection of checkpoints costs, side by side with TensorFlow's own saver.

    python -m tests.benchmarks.checkpoint_cost

Prints medians, one line of JSON for each of two measurements:

- Saving a model of 100 MB: `tf.train.Saver` against `CommittingSaver`, alternately.
- Training, with the default flags: blocks of steps with one checkpoint in each, by
  `MonitoredTrainingSession` against the training job's loop, which also reports its
  progress, step by step in turns.

The ratio is the median of the ratios of neighbours, which had the same load beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import network_from_config, training
from bn_tf1.jobs.config import Config
from bn_tf1.jobs.saving.committing_saver import CommittingSaver
from tests.benchmarks import jobs

_KINDS = ("plain", "protected")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=15, help="of each kind")
    parser.add_argument("--blocks", type=int, default=10, help="of each kind")
    parser.add_argument("--model", default=Config.model)
    options = parser.parse_args()
    tf.logging.set_verbosity(tf.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        _print("save of 100 MB, seconds", 2.0, _time_saves(folder, options.saves))
    with tempfile.TemporaryDirectory() as folder:
        config = Config(model_dir=folder, model=options.model, log_steps=10**6)
        times = _time_blocks(config, options.blocks)
        what = f"{config.save_checkpoint_steps} steps of {config.model}, seconds"
        _print(what, 1.03, times)


def _print(what, limit, times):
    plain, protected = (float(np.median(times[kind])) for kind in _KINDS)
    ratio = float(np.median(np.divide(times["protected"], times["plain"])))
    figures = {"plain": plain, "protected": protected, "ratio": ratio, "limit": limit}
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"tensorflow": tf.version.VERSION, "what": what, **rounded}))


def _time_saves(folder, count):
    folders = {kind: os.path.join(folder, kind) for kind in _KINDS}
    times = {kind: [] for kind in _KINDS}
    with tf.Graph().as_default(), tf.Session() as session:
        for i in range(25):
            initializer = tf.random_normal_initializer()
            tf.get_variable(f"v{i}", [1000, 1000], initializer=initializer)
        savers = {
            "plain": tf.train.Saver(max_to_keep=5),
            "protected": CommittingSaver(folders["protected"], 5, newest=None),
        }
        session.run(tf.global_variables_initializer())
        for step in range(count):
            for kind in _KINDS:
                os.makedirs(folders[kind], exist_ok=True)
                path = os.path.join(folders[kind], "model.ckpt")
                start = time.perf_counter()
                savers[kind].save(session, path, global_step=step)
                times[kind].append(time.perf_counter() - start)
    return times


def _time_blocks(config, count):
    """Two trainings take turns; the first block of each is not counted."""
    configs = {
        kind: dataclasses.replace(
            config, model_dir=os.path.join(config.model_dir, kind)
        )
        for kind in _KINDS
    }
    times = {kind: [] for kind in _KINDS}
    with jobs.job(configs["protected"]) as protected:
        steps = {"plain": _plain_job(configs["plain"]), "protected": protected}
        for block in range(count + 1):
            totals = dict.fromkeys(_KINDS, 0.0)
            for _ in range(config.save_checkpoint_steps):
                for kind, step in steps.items():
                    start = time.perf_counter()
                    step()
                    totals[kind] += time.perf_counter() - start
            if block:
                for kind, total in totals.items():
                    times[kind].append(total)
    return times


def _plain_job(config):
    with tf.Graph().as_default():
        step = training._build_step(
            config, network_from_config.open_split(config, "train")
        )
        tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, step.initialize_input)
        session = _plain_session(config, [tf.train.NanTensorHook(step.loss)])
    return lambda: session.run(step.train_op)


def _plain_session(config, hooks):
    scaffold = tf.train.Scaffold(saver=tf.train.Saver(save_relative_paths=True))
    save = tf.train.CheckpointSaverHook(
        config.model_dir, save_steps=config.save_checkpoint_steps, scaffold=scaffold
    )
    return tf.train.MonitoredTrainingSession(
        checkpoint_dir=config.model_dir,
        scaffold=scaffold,
        hooks=[*hooks, save],
        save_checkpoint_secs=None,
        save_checkpoint_steps=None,
        save_summaries_steps=config.summary_steps,
        log_step_count_steps=None,
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf.disable_v2_behavior()
    main()
