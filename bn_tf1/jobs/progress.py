"""Progress of a training run: a bar on a terminal, plain lines elsewhere.

Writes the speed, in examples per second, to the summaries too: it is known in Python
only.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Mapping

import tensorflow.compat.v1 as tf

from bn_tf1.jobs.config import Config


class Progress:
    """Reports loss, accuracy, learning rate and speed every `log_steps` steps.

    Attributes:
        step: the last global step that was made or restored.
        loss: the loss of the last step; None before the first.
        writer: `tf.summary.FileWriter` of the run's model directory; None until it begins.
    """

    def __init__(self, config: Config):
        self.step = 0
        self.loss = None
        self.writer = None  # until it begins
        self._config = config
        self._bar = None
        self._reported = None  # (step, time) of the last report

    def begin(self, step: int) -> None:
        """The run begins behind `step`; 0 unless it was restored."""
        self.step = step
        self.writer = tf.summary.FileWriter(self._config.model_dir)
        self._reported = step, time.time()
        if step:
            print(f"resuming {self._config.model_dir} at step {step}", flush=True)
        if sys.stderr.isatty():
            # Here, for it takes 10 ms, and most runs have no terminal.
            from tqdm import tqdm

            self._bar = tqdm(total=self._config.max_steps, initial=step, unit="step")
        # TensorBoard then drops what a run that was killed wrote of later steps.
        log = tf.SessionLog(status=tf.SessionLog.START)
        self.writer.add_session_log(log, step + 1)

    def update(self, results: Mapping[str, Any]) -> None:
        """One step was made; `results` has its loss, accuracy and learning_rate."""
        self.step += 1
        self.loss = float(results["loss"])
        if self._bar is not None:
            self._bar.update(1)
        if self.step % self._config.log_steps == 0:
            self._report(results)

    def end(self) -> None:
        """The run is over. Of one that failed, on a full disk say, nothing is flushed."""
        if self._bar is not None:
            self._bar.close()
        self.writer.flush()

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
