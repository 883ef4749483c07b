"""Signals as other programs send them, in processes that need no TensorFlow session."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from bn_tf1.jobs import stop_signals
from tests import ROOT


def test_an_echo_of_the_first_signal_is_not_a_second_one(monkeypatch):
    """timeout(1) signals its child, and then the group in which the child is."""
    ends = []
    monkeypatch.setattr(stop_signals, "_end", lambda number, _: ends.append(number))
    clock = [100.0]
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: clock[0])
    signals = stop_signals.StopSignals(grace_secs=999)
    signals.receive(signal.SIGTERM)
    clock[0] += 0.1
    signals.receive(signal.SIGTERM)
    assert (signals.received, ends) == (signal.SIGTERM, [])
    signals.receive(signal.SIGINT)
    clock[0] += 1
    signals.receive(signal.SIGTERM)
    assert ends == [signal.SIGINT, signal.SIGTERM]
    signals.end()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_an_interrupt_while_tensorflow_is_imported_leaves_no_traceback(
    tmp_path, script
):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "--model_dir", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while "tensorflow" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
