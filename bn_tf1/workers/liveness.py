"""Whether all workers live and do the same: what collectives by themselves do not tell.

A collective waits for all workers, on TensorFlow 1.15 for ever, whatever timeout is set.
Here each worker tells the chief twice a second that it lives, how many runs with
collectives it has begun and ended, and which collectives they hold. Who is silent, gone,
or does something else than the others ends them all: a process that hangs in C++ can only
be ended from a thread of its own.

Contract: a process that is ended says which worker is the cause, on standard error, and
has the exit code `LOST`. A worker that is gone is noticed within a second, one that is
silent within `silence_secs`, a run that does not end within `step_secs`.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import zlib
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from bn_tf1.workers.handshake import LOST, REFUSED, WorkersError, tell_end
from bn_tf1.workers.messages import Channel

# Short enough to notice a closed connection within a second, long enough to cost nothing.
_BEAT_SECS = 0.5
# Runs whose collectives are remembered: more than a beat can hold.
_REMEMBERED = 1 << 16


class Status(NamedTuple):
    """What one worker has said of its runs with collectives; a list, where it travels.

    Attributes:
        begun, ended: how many.
        chain: a checksum of all collectives of the runs that were begun.
        has_left: whether it will make no more.
    """

    begun: int = 0
    ended: int = 0
    chain: int = 0
    has_left: bool = False


class Watch:
    """Watches over the workers from a thread, until `close`."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        channels: Mapping[int, Channel],
        *,
        silence_secs: float,
        step_secs: float,
    ):
        """Begins; `channels` are those to all others for the chief, else to the chief."""
        self._rank = rank
        self._hosts = hosts
        self._channels = dict(channels)
        self._silence_secs = silence_secs
        self._step_secs = step_secs
        self._own = Status()
        self._others = {other: Status() for other in channels}
        self._heard = dict.fromkeys(channels, time.monotonic())
        self._changed = time.monotonic()
        self._chains = {0: 0}
        self._ready: dict[int, Any] = {}
        self._goes = False
        self._byes: set[int] = set()
        self._is_closing = False
        self._condition = threading.Condition()
        # `session.run` gives Python's lock away, even where it hangs.
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ what the main thread says

    @contextlib.contextmanager
    def run(self, collectives: Sequence[str]) -> Iterator[None]:
        """Around a `session.run` that holds these collectives."""
        # A checksum of the whole history and no list: a beat stays as short as the first.
        with self._condition:
            own = self._own
            chain = zlib.crc32(repr(collectives).encode(), own.chain)
            self._own = own._replace(begun=own.begun + 1, chain=chain)
            self._chains[self._own.begun] = chain
            self._chains.pop(self._own.begun - _REMEMBERED, None)
            self._changed = time.monotonic()
        yield
        with self._condition:
            self._own = self._own._replace(ended=self._own.ended + 1)
            self._changed = time.monotonic()

    def agree(self, collectives: Sequence[str]) -> None:
        """Waits until all workers have a graph with these collectives.

        Raises:
            WorkersError: another one has others.
        """
        if self._rank:
            self._channels[0].send({"ready": list(collectives)})
            self._wait(lambda: self._goes, "the chief did not build its graph")
            return
        self._wait(
            lambda: len(self._ready) == len(self._channels),
            "some worker did not build its graph",
        )
        for rank, theirs in sorted(self._ready.items()):
            if theirs != list(collectives):
                error = WorkersError(_difference(rank, theirs, list(collectives)))
                self.fail(str(error), REFUSED)
                raise error
        for channel in self._channels.values():
            channel.send({"go": True})

    def await_end(self) -> None:
        """After an error that a lost worker may be the cause of: time to be ended."""
        # 2.21 raises within 0.3 s, and before the beat knows who is gone: its sentence
        # names no worker, ours does.
        time.sleep(2 * _BEAT_SECS + self._silence_secs)

    def fail(self, reason: str, code: int = LOST) -> None:
        """Tells the others that this worker ends, and why; watches no more."""
        if not self._is_closing:
            self._is_closing = True
            for channel in self._channels.values():
                tell_end(channel, code, reason)
            self._stop()

    def close(self) -> None:
        """Waits until all workers have made their last run, and watches no more."""
        if self._is_closing:
            return
        self._own = self._own._replace(has_left=True)
        # In this order, or a worker that ends early would look like one that is lost, and
        # take the server away that others still read from.
        if self._rank:
            self._channels[0].send({"bye": self._own})
            self._wait(lambda: 0 in self._byes, "the chief did not end")
        else:
            everybody = set(self._channels)
            self._wait(lambda: self._byes == everybody, "some worker did not end")
            for channel in self._channels.values():
                channel.send({"bye": self._own})
        self._stop()

    def _stop(self):
        self._is_closing = True
        self._thread.join()
        for channel in self._channels.values():
            channel.close()

    def _wait(self, is_done, what):
        with self._condition:
            if not self._condition.wait_for(is_done, self._step_secs):
                self._end(f"{what} within {self._step_secs:g} s")

    # ----------------------------------------------------------------- what the thread does

    def _watch(self):
        beaten = 0.0
        while not self._is_closing:
            ready, _, _ = select.select(
                list(self._channels.values()), [], [], _BEAT_SECS / 2
            )
            for rank, channel in self._channels.items():
                if channel in ready:
                    self._receive(rank, channel)
            now = time.monotonic()
            if now - beaten >= _BEAT_SECS:
                beaten = now
                self._beat()
            for rank, heard in self._heard.items():
                if now - heard > self._silence_secs and rank not in self._byes:
                    self._lose(rank, f"it said nothing for {self._silence_secs:g} s")
            # The chief alone knows of all; what it finds it tells the others.
            if self._rank == 0:
                self._check_runs(now)

    def _beat(self):
        for rank, channel in self._channels.items():
            try:
                channel.send({"beat": self._own})
            except OSError as error:
                self._lose(rank, str(error))

    def _receive(self, rank, channel):
        try:
            messages = channel.receive()
        except (OSError, ValueError) as error:
            self._lose(rank, str(error))
            return
        self._heard[rank] = time.monotonic()
        with self._condition:
            for message in messages:
                for kind, content in message.items():
                    self._take(rank, kind, content)
            self._condition.notify_all()

    def _take(self, rank, kind, content):
        if kind == "beat":
            before, self._others[rank] = self._others[rank], Status(*content)
            if before != self._others[rank]:
                self._changed = time.monotonic()
        elif kind == "ready":
            self._ready[rank] = content
        elif kind == "go":
            self._goes = True
        elif kind == "bye":
            self._byes.add(rank)
            self._others[rank] = Status(*content)
        elif kind == "end" and not self._is_closing:
            code, reason = content
            self._end(reason, code, but=rank)

    def _lose(self, rank, reason):
        if rank in self._byes or self._is_closing:
            return  # it has made its last run
        name = f"worker {rank}" + (" (the chief)" if rank == 0 else "")
        self._end(f"{name} at {self._hosts[rank]} is gone: {reason}", but=rank)

    def _check_runs(self, now):
        """The chief's look at who is in which run."""
        with self._condition:
            everybody = {0: self._own, **self._others}
            most = max(status.begun for status in everybody.values())
            for rank, status in self._others.items():
                # One that is ahead of the chief is compared when the chief is there, too.
                known = self._chains.get(status.begun, status.chain)
                if known != status.chain:
                    self._end(
                        f"worker {rank} and the chief made runs with other collectives, "
                        f"the last of them run {status.begun}: what only one of them "
                        "does must not reach a collective"
                    )
            waiting = [s for s in everybody.values() if s.begun > s.ended]
            behind = [rank for rank, s in everybody.items() if s.begun < most]
            left = [rank for rank in behind if everybody[rank].has_left]
            # Nothing can come any more: told at once, and not after `step_secs`.
            if waiting and left:
                self._end(
                    f"worker {left[0]} made its last run, number "
                    f"{everybody[left[0]].begun}, but others are in run {most}: all "
                    "workers must make the same runs"
                )
            if waiting and now - self._changed > self._step_secs:
                where = "all workers are in it"
                if behind:
                    where = f"worker {behind[0]} has not begun it"
                self._end(f"run {most} did not end in {self._step_secs:g} s: {where}")

    def _end(self, reason, code=LOST, but=None):
        """Ends all workers; `but` is gone, or knows it."""
        if self._rank == 0:
            for rank, channel in self._channels.items():
                if rank != but:
                    tell_end(channel, code, reason)
        self._end_process(reason, code)

    def _end_process(self, reason, code):
        text = f"error: worker {self._rank} ends: {reason}\n"
        # No clean-up: the main thread may hang in C++, and hold any lock of Python's.
        os.write(2, text.encode("utf-8", "replace"))
        os._exit(code)


def _difference(rank, theirs, own):
    for i, (one, other) in enumerate(zip(theirs, own)):
        if one != other:
            return (
                f"the graph of worker {rank} has {one!r} as its collective {i}, that of "
                f"the chief {other!r}: all workers must build the same layers"
            )
    return (
        f"the graph of worker {rank} has {len(theirs)} collectives, that of the chief "
        f"{len(own)}: all workers must build the same layers"
    )
