"""Two watches over one connection, in one process: who ends, and why."""

import socket
import time

import pytest

from bn_tf1.workers.handshake import LOST, REFUSED, WorkersError
from bn_tf1.workers.liveness import Watch
from bn_tf1.workers.messages import Channel

HOSTS = ["a:1", "b:2"]


@pytest.fixture
def connected():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        other = socket.create_connection(listener.getsockname())
        return Channel(listener.accept()[0]), Channel(other)


@pytest.fixture
def ends(monkeypatch):
    """(rank, reason, code) of each end, which ends no process here."""
    found = []

    def end(self, reason, code):
        found.append((self._rank, reason, code))
        self._is_closing = True

    monkeypatch.setattr(Watch, "_end_process", end)
    return found


@pytest.fixture
def watches(connected, ends):
    return [
        Watch(rank, HOSTS, {1 - rank: channel}, silence_secs=5.0, step_secs=5.0)
        for rank, channel in enumerate(connected)
    ]


def wait_for(ends, count):
    deadline = time.monotonic() + 10
    while len(ends) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ends) >= count


def test_an_error_of_one_ends_the_other(watches, ends):
    watches[1].fail("worker 1 failed: ValueError: of my own")
    wait_for(ends, 1)
    assert ends == [(0, "worker 1 failed: ValueError: of my own", LOST)]


def test_who_is_silent_is_lost(connected, ends):
    Watch(0, HOSTS, {1: connected[0]}, silence_secs=0.7, step_secs=5.0)
    wait_for(ends, 1)
    reason = "worker 1 at b:2 is gone: it said nothing for 0.7 s"
    assert ends[0] == (0, reason, LOST)


def test_other_collectives_and_too_few_runs(watches, ends):
    for watch in watches:
        with watch.run([1, 2]):
            pass
    with watches[0].run([1]), watches[1].run([2]):
        wait_for(ends, 2)
    assert {rank for rank, _, _ in ends} == {0, 1}
    assert "runs with other collectives, the last of them run 2" in ends[0][1]


def test_graphs_that_differ(watches, ends):
    watches[1]._channels[0].send({"ready": ["one", "two"]})
    with pytest.raises(WorkersError, match="graph of worker 1 has 'two' .* 'three'"):
        watches[0].agree(["one", "three"])
    wait_for(ends, 1)
    assert ends[0][0] == 1 and ends[0][2] == REFUSED
