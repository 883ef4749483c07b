"""SIGTERM and SIGINT for a training job: stop after this step and save.

A Python signal handler does not run while `session.run` blocks, so that a thread reads
the signals from a pipe (`signal.set_wakeup_fd`). The first one asks the loop to stop at
the end of its step. A second one, or a step and save that take longer than the grace
period, end the process at once: nothing is saved then, but nothing is damaged either.
The same signal within a moment of the first one is an echo of it: timeout(1), and a shell
that ends a pipeline, signal a process both by itself and with its group.

Exit codes of such an end: 128 plus the number of the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import Iterator

_STOPPING = (signal.SIGTERM, signal.SIGINT)
# Longer than an echo takes on a busy machine, shorter than a person between two keys.
_ECHO_SECS = 0.2


class StopSignals:
    """What has been received so far.

    Attributes:
        received: int, the number of the first signal; None before.
    """

    def __init__(self, grace_secs: float):
        """`grace_secs`: seconds from the first signal to the end of the process."""
        self.received = None
        self._grace_secs = grace_secs
        self._timer = None
        self._echo_until = 0.0

    def receive(self, number: int) -> None:
        """Notes the first signal, and ends the process at the second one."""
        if self.received == number and time.monotonic() < self._echo_until:
            return  # taken for a second signal, it would end the run without saving
        if self.received is not None:
            _end(number, "a second signal")
        reason = f"the step and its checkpoint took more than {self._grace_secs:g} s"
        # A thread of its own, for the main one may hang within TensorFlow.
        self._timer = threading.Timer(self._grace_secs, _end, [number, reason])
        self._timer.daemon = True
        self._timer.start()
        self._echo_until = time.monotonic() + _ECHO_SECS
        self.received = number

    def end(self) -> None:
        """The job is over: the grace period no longer matters."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def caught(grace_secs: float) -> Iterator[StopSignals]:
    """Catches the signals inside the `with` block, if this is the main thread.

    Python lets no other thread set handlers, and runs none in it. `grace_secs` is as for
    `StopSignals`.
    """
    signals = StopSignals(grace_secs)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    # Sockets and no pipe: Python asks that what it writes to does not block.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_watch, args=[reader, signals], daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer.fileno())
    # A handler of Python's must be there for the pipe to be written to.
    handlers = {number: signal.signal(number, _do_nothing) for number in _STOPPING}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()  # ends the thread
        thread.join()
        reader.close()
        signals.end()


def _watch(reader, signals):
    """Passes on what the kernel's handler writes: one byte for each signal."""
    numbers = reader.recv(1)
    while numbers:
        if numbers[0] in _STOPPING:
            signals.receive(numbers[0])
        numbers = reader.recv(1)


def _do_nothing(number, frame):
    pass


def _end(number, reason):
    """Ends the process without any clean-up: the main thread may hang in C++."""
    name = signal.Signals(number).name
    text = f"error: ended by {name} without saving: {reason}\n"
    os.write(2, text.encode())  # not print: the main thread may hold its lock
    os._exit(128 + number)
