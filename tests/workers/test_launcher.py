"""The launcher, with programs that need no TensorFlow."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bn_tf1.workers.handshake import LOST
from bn_tf1.workers.launcher import launch
from tests import ROOT

PROLOGUE = (
    "import json, os, pathlib, signal, sys, time\n"
    "task = json.loads(os.environ['TF_CONFIG'])\n"
    "index = task['task']['index']\n"
)


def program(text):
    return [sys.executable, "-c", PROLOGUE + text]


def test_each_worker_gets_its_place_and_its_lines_are_marked(capfd):
    text = "print(len(set(task['cluster']['worker'])), index)"
    assert launch(program(text), 3) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert lines == ["[0] 3 0", "[1] 3 1", "[2] 3 2"]


@pytest.mark.parametrize(
    "text, code, message",
    [
        ("sys.exit(5 * index)", 5, "worker 1 ended with exit code 5"),
        ("os.kill(os.getpid(), 9) if index else time.sleep(60)", 137, "by SIGKILL"),
        (f"sys.exit({LOST})", LOST, "the workers lost each other"),
    ],
)
def test_the_exit_code_is_that_of_the_one_that_failed(text, code, message, capfd):
    assert launch(program(text), 2, grace_secs=0.3) == code
    assert message in capfd.readouterr().err


def test_a_loss_is_tried_again_and_an_error_is_not(tmp_path, capfd):
    text = (
        f"path = pathlib.Path({str(tmp_path)!r}, str(index))\n"
        "tried = len(path.read_text()) if path.exists() else 0\n"
        "path.write_text('x' * (tried + 1))\n"
    )
    kill = "if index and tried < 2: os.kill(os.getpid(), 9)\n"
    assert launch(program(text + kill), 2, restarts=3) == 0
    assert "worker 1 was killed by SIGKILL: starting all again (2 of 3)" in (
        capfd.readouterr().err
    )
    assert launch(program(text + "sys.exit(1)"), 2, restarts=3) == 1
    assert len((tmp_path / "0").read_text()) == 4


def test_signals_are_passed_on():
    text = (
        "def end(number, frame): sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-m", "bn_tf1", "launch", "--restarts=5", "--"]
    process = subprocess.Popen(
        [*command, *program(text)],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for _ in range(2):
        process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
