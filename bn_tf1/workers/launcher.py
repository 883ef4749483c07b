"""Starts the workers of one run on this machine, and all of them again after a loss.

Contract: each worker gets a free port of the loopback address, TF_CONFIG, and a mark in
front of its lines. Signals are passed on to all. When one worker ends with an error, the
others have some seconds to end by themselves, and are killed then. What may go away by
itself, a worker that was killed or lost, is tried again from the newest checkpoint; what
would only fail again is not. Imports no TensorFlow.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Sequence

from bn_tf1.workers.handshake import LOST

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_LOOK_SECS = 0.1


def launch(
    command: Sequence[str], workers: int, *, restarts: int = 0, grace_secs: float = 30.0
) -> int:
    """Runs `command` once for each worker, and returns the exit code of the run.

    Args:
        command: what to run, and its arguments.
        workers: how many.
        restarts: how often to start all again when one is killed or lost.
        grace_secs: how long the others have to end after one that failed.

    Returns:
        0 if all ended well; else the code of the first worker that failed by itself, as a
        shell gives it: 128 plus the signal for one that was killed.
    """
    stopped: list[int] = []
    running: list[subprocess.Popen] = []

    def pass_on(number, frame):
        stopped.append(number)
        for process in running:
            _send(process, number)

    # Before the first starts: a signal while they start must reach them, too.
    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        for attempt in range(restarts + 1):
            # On new ports: another program may have taken an old one.
            running[:] = _started(command, workers)
            if stopped:  # meanwhile
                pass_on(stopped[0], None)
            codes = _codes(running, grace_secs)
            if not any(codes) or stopped or not _may_help(codes):
                break
            if attempt < restarts:
                print(
                    f"launch: {_told(codes)}: starting all again "
                    f"({attempt + 1} of {restarts})",
                    file=sys.stderr,
                    flush=True,
                )
        if any(codes):
            print(f"launch: {_told(codes)}", file=sys.stderr, flush=True)
        return _code_of_run(codes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(command, workers):
    hosts = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"type": "worker", "index": index}
        described = {"cluster": {"worker": hosts}, "task": task}
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(described),
            # Into a pipe Python writes by blocks: lines would come when all is over.
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A terminal's Ctrl-C reaches them through this process alone, once.
            start_new_session=True,
        )
        for stream, out in (
            (process.stdout, sys.stdout),
            (process.stderr, sys.stderr),
        ):
            # A thread for each: a full pipe that nobody reads stops the worker.
            threading.Thread(
                target=_mark_lines, args=[stream, out, index], daemon=True
            ).start()
        processes.append(process)
    return processes


def _free_ports(count):
    # All at once, or two of them might be the same.
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


def _mark_lines(stream, out, index):
    for line in stream:
        out.write(f"[{index}] " + line.decode("utf-8", "replace"))
        out.flush()


def _codes(processes, grace_secs):
    """Waits for all, and after the first that fails no longer than `grace_secs`."""
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.poll() for process in processes):
            deadline = time.monotonic() + grace_secs
        # One that hangs in a collective hears no other signal.
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                _send(process, signal.SIGKILL)
        time.sleep(_LOOK_SECS)
    return [process.wait() for process in processes]


def _send(process, number):
    if process.poll() is None:
        process.send_signal(number)


def _may_help(codes):
    """Whether only signals and losses have ended it."""
    # An error of one's own, such as a wrong flag or a loss of NaN, would come again.
    return all(code in (0, LOST) or code < 0 for code in codes)


def _told(codes):
    told = []
    for index, code in enumerate(codes):
        if code < 0:
            told.append(f"worker {index} was killed by {signal.Signals(-code).name}")
        elif code not in (0, LOST):
            told.append(f"worker {index} ended with exit code {code}")
    return ", ".join(told) or f"the workers lost each other (exit code {LOST})"


def _code_of_run(codes):
    # The cause is not who was lost by it, though it may have ended first.
    own = [code for code in codes if code not in (0, LOST)] or [c for c in codes if c]
    code = own[0] if own else 0
    return 128 - code if code < 0 else code
