"""Progress of a training run: a bar on a terminal, plain lines elsewhere.

Writes the speed, in examples per second, to the summaries too: it is known in Python
only.
"""

from __future__ import annotations

import sys
import time

import tensorflow.compat.v1 as tf
from tqdm import tqdm

from bn_tf1.jobs.config import Config


class ProgressHook(tf.train.SessionRunHook):
    """Reports loss, accuracy, learning rate and speed every `log_steps` steps.

    Attributes:
        step: the last global step that ran or was restored.
        loss: the loss of the last step; None before the first.
        writer: `tf.summary.FileWriter` of the run's model directory.
    """

    def __init__(self, tensors, config: Config):
        """`tensors` has `global_step`, `loss`, `accuracy` and `learning_rate`."""
        self.step = 0
        self.loss = None
        self.writer = tf.summary.FileWriter(config.model_dir)
        self._tensors = tensors
        self._config = config
        self._bar = None
        self._reported = None  # (step, time) of the last report

    def after_create_session(self, session, coord):
        self.step = int(session.run(self._tensors.global_step))
        self._reported = self.step, time.time()
        last_step = self._config.max_steps
        if self.step:
            print(f"resuming {self._config.model_dir} at step {self.step}", flush=True)
        if self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(total=last_step, initial=self.step, unit="step")

    def before_run(self, run_context):
        fetches = {"loss": self._tensors.loss}
        if (self.step + 1) % self._config.log_steps == 0:
            fetches["accuracy"] = self._tensors.accuracy
            fetches["learning_rate"] = self._tensors.learning_rate
        return tf.train.SessionRunArgs(fetches)

    def after_run(self, run_context, run_values):
        self.step += 1
        self.loss = float(run_values.results["loss"])
        if self._bar is not None:
            self._bar.update(1)
        if "accuracy" in run_values.results:
            self._report(run_values.results)

    def end(self, session):
        if self._bar is not None:
            self._bar.close()

    def _report(self, results):
        now = time.time()
        step, then = self._reported
        self._reported = self.step, now
        speed = (self.step - step) * self._config.batch_size / (now - then)
        value = tf.Summary.Value(tag="examples_per_second", simple_value=speed)
        self.writer.add_summary(tf.Summary(value=[value]), self.step)
        line = (
            f"loss {results['loss']:.4f}, accuracy {results['accuracy']:.4f}, "
            f"learning rate {results['learning_rate']:.4g}, {speed:.0f} examples/s"
        )
        if self._bar is None:
            print(f"step {self.step}/{self._config.max_steps}: {line}", flush=True)
        else:
            self._bar.set_postfix_str(line)
