"""Progress of a training run: lines on standard output, and a bar below on a terminal.

Writes the speed, in examples per second, to the summaries too: it is known in Python
only.
"""

from __future__ import annotations

import collections
import shutil
import sys
import time
from typing import Any, Mapping

import numpy as np
import tensorflow.compat.v1 as tf

from bn_tf1.jobs import summaries
from bn_tf1.jobs.config import Config

# Of so many steps the loss is averaged, where one number has to say how it is.
_RECENT_STEPS = 100
# Seconds between two looks of the bar.
_BAR_SECS = 0.2
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress:
    """Reports loss, accuracy, learning rate and speed every `log_steps` steps.

    Loss and accuracy are averages over the steps since the line before.

    Attributes:
        step: the last global step that was made or restored.
        writer: `summaries.CurveWriter` of the run; None until it begins.
    """

    def __init__(self, config: Config):
        self.step = 0
        self.writer = None  # until it begins
        self._config = config
        self._bar = None
        self._reported = None  # (step, time) of the last line
        self._unreported = []  # (loss, accuracy) of the steps since then
        self._shown = 0.0  # time at which the bar last changed
        self._last = None  # the results of the last step
        self._recent = collections.deque(maxlen=_RECENT_STEPS)  # (loss, labels)

    def begin(self, step: int) -> None:
        """The run begins behind `step`; 0 unless it was restored."""
        self.step = step
        folder = summaries.train_folder(self._config.model_dir)
        self.writer = summaries.CurveWriter(folder)
        self._reported = step, time.time()
        if step:
            print(f"resuming {self._config.model_dir} at step {step}", flush=True)
        if sys.stderr.isatty():
            # Here, for it takes 10 ms, and most runs have no terminal.
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._config.max_steps,
                initial=step,
                bar_format=_BAR,
                ncols=_columns(),
            )
        # TensorBoard then drops what a run that was killed wrote of later steps.
        log = tf.SessionLog(status=tf.SessionLog.START)
        self.writer.add_session_log(log, step + 1)

    def update(self, results: Mapping[str, Any]) -> None:
        """One step was made; `results` are the values of `step_loop.Step` by name."""
        self.step += 1
        self._last = results
        # Of all steps the labels would be as large as the data set, over and over.
        self._recent.append((float(results["loss"]), results["labels"]))
        self._unreported.append((results["loss"], results["accuracy"]))
        if self._bar is not None:
            self._bar.update(1)
            self._show_on_bar()
        if self.step % self._config.log_steps == 0:
            self._report(results["learning_rate"])

    def recent_loss(self) -> float | None:
        """Mean loss of the last steps, at most 100, in nats; None before the first."""
        if not self._recent:
            return None
        return float(np.mean([loss for loss, _ in self._recent]))

    def loss_of_guessing(self) -> float:
        """The least loss of a network that does not look at the images of these steps.

        It gives each class its frequency; the loss is then the entropy of the labels.
        """
        # Not ln(number of classes): where nine tenths are of one class, a network that has
        # learnt nothing has a loss far below that.
        _, counts = np.unique(
            np.concatenate([labels for _, labels in self._recent]), return_counts=True
        )
        shares = counts / counts.sum()
        return float(-np.sum(shares * np.log(shares)))

    def end(self) -> None:
        """The run is over, wherever: its last step becomes a point of the curves.

        Not called where it failed on its disk: what is written there would fail again.
        """
        if self._bar is not None:
            self._bar.close()
        if self._last is not None and not self.writer.has_point("loss", self.step):
            loss = float(self._last["loss"])
            measured = {"loss": loss, "penalty": self._last["total_loss"] - loss}
            for tag in ("accuracy", "learning_rate"):
                measured[tag] = self._last[tag]
            self.writer.add_scalars(measured, self.step)
        self.writer.flush()

    def _show_on_bar(self):
        now = time.time()
        if now - self._shown < _BAR_SECS and self.step < self._config.max_steps:
            return
        self._shown = now
        self._bar.ncols = _columns()  # the window may have another size now
        if self._unreported:  # none right behind a line
            loss, accuracy, speed = self._averages(now)
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, acc {accuracy:.3f}, {speed:.0f}/s", refresh=True
            )

    def _averages(self, now):
        """Loss, accuracy and examples per second since the last line."""
        step, then = self._reported
        # Of all workers: the batch size counts the images of all of them.
        examples = self._config.batch_size * self._config.accumulate_steps
        speed = (self.step - step) * examples / max(now - then, 1e-9)
        return (*np.mean(self._unreported, axis=0), speed)

    def _report(self, learning_rate):
        now = time.time()
        loss, accuracy, speed = self._averages(now)
        self._reported = self.step, now
        self._unreported = []
        self.writer.add_scalars({"examples_per_second": speed}, self.step)
        line = (
            f"step {self.step}/{self._config.max_steps}: loss {loss:.4f}, accuracy "
            f"{accuracy:.4f}, lr {learning_rate:.2g}, {speed:.0f} examples/s"
        )
        if self._bar is None:
            print(line, flush=True)
        else:
            # Above the bar, wherever standard output goes.
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()


def _columns():
    """How wide a bar may be: one column stays free, since some terminals wrap behind it."""
    return shutil.get_terminal_size((80, 24)).columns - 1
