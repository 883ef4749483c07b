"""How workers come together: what is proved, what is compared, what is turned away."""

import contextlib
import socket
import threading
import time

import pytest

from bn_tf1.workers import handshake
from bn_tf1.workers.handshake import LOST, REFUSED, Introduction, WorkersError

VERSIONS = {"bn_tf1": "1", "TensorFlow": "2"}


@contextlib.contextmanager
def waiting_chief(workers=2, seconds=5.0, secret=b"s"):
    """Yields (hosts, results): the chief waits in a thread for so many workers."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    hosts = [f"127.0.0.1:{port}"] + [f"127.0.0.1:{i + 1}" for i in range(workers - 1)]
    listener = handshake.listen(hosts[0])
    results = []

    def wait():
        try:
            channels = handshake.gather(
                listener,
                Introduction(0, hosts, VERSIONS),
                {"step": 7},
                secret=secret,
                seconds=seconds,
            )
            results.append(sorted(channels))
        except WorkersError as error:
            results.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield hosts, results
    finally:
        thread.join()


def join(hosts, rank=1, secret=b"s", versions=VERSIONS, said_hosts=None):
    own = Introduction(rank, said_hosts or hosts, versions)
    return handshake.join(own, secret=secret, seconds=5.0)


def test_all_get_the_message_of_the_chief():
    with waiting_chief(workers=3) as (hosts, results):
        messages = []
        threads = [
            threading.Thread(target=lambda r=r: messages.append(join(hosts, r)[1]))
            for r in (2, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert messages == [{"step": 7}] * 2
    assert results == [[1, 2]]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"versions": {**VERSIONS, "TensorFlow": "1"}},
            "worker 1 has .*TensorFlow 1, ",
        ),
        ({"rank": 0}, "there is a second worker 0"),
        (
            {"said_hosts": ["127.0.0.1:PORT", "b:2"]},
            "worker 1 was started with the hosts",
        ),
    ],
)
def test_what_does_not_fit_ends_all(options, message):
    with waiting_chief() as (hosts, results):
        if "said_hosts" in options:
            options = {"said_hosts": [hosts[0], "b:2"]}
        with pytest.raises(WorkersError, match=message) as caught:
            join(hosts, **options)
    assert caught.value.exit_code == REFUSED
    assert str(results[0]) == str(caught.value)


def test_two_of_one_index_end_all_but_one_that_went_may_come_again():
    with waiting_chief(workers=3) as (hosts, results):
        own = Introduction(1, hosts, VERSIONS)
        gone = handshake._connected(hosts[0], b"s", time.monotonic() + 5, 5.0)
        gone.send({"introduction": own})
        gone.close()
        time.sleep(0.2)
        again = handshake._connected(hosts[0], b"s", time.monotonic() + 5, 5.0)
        again.send({"introduction": own})
        time.sleep(0.2)
        with pytest.raises(
            WorkersError, match="two processes say that they are worker 1"
        ):
            join(hosts)
    assert "two processes" in str(results[0])


def test_strangers_are_turned_away_and_end_nothing(capfd):
    with waiting_chief() as (hosts, results):
        address = handshake.address_of(hosts[0])
        with pytest.raises(WorkersError, match="the chief has another secret"):
            join(hosts, secret=b"wrong")
        with socket.create_connection(address) as garbage:
            garbage.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 100_000)
            with contextlib.suppress(ConnectionError):
                while garbage.recv(1 << 16):
                    pass
        assert join(hosts)[1] == {"step": 7}
    assert results == [[1]]
    assert "does not know the secret" in capfd.readouterr().err


def test_who_is_absent_is_named():
    with waiting_chief(seconds=0.3) as (hosts, results):
        pass
    assert "worker 1 at 127.0.0.1:1 did not join within 0.3 s" in str(results[0])
    assert results[0].exit_code == LOST
    with pytest.raises(WorkersError, match="there was no chief at .* within 0.3 s"):
        own = Introduction(1, hosts, VERSIONS)
        handshake.join(own, secret=b"", seconds=0.3)


def test_another_program_at_the_chief_s_address():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        hosts = [f"127.0.0.1:{other.getsockname()[1]}", "b:2"]
        thread = threading.Thread(
            target=lambda: other.accept()[0].sendall(b"220 mail.example.org ESMTP\r\n")
        )
        thread.start()
        with pytest.raises(WorkersError, match="no chief that waits .*: the others go"):
            join(hosts)
        thread.join()
        with pytest.raises(WorkersError, match="cannot listen at .*: Address already"):
            handshake.listen(hosts[0])


def test_a_name_that_is_the_loopback_address_here_alone():
    with handshake.listen("localhost:0") as listener:
        handshake.check_reach(listener, ["localhost:1", "127.0.0.1:2"], 0)
        # Whoever is on this machine (any is "0.0.0.0") comes to the loopback address, too.
        handshake.check_reach(listener, ["localhost:1", "0.0.0.0:2"], 0)
        with pytest.raises(WorkersError, match="192.0.2.1:2 cannot reach it: give an"):
            handshake.check_reach(listener, ["localhost:1", "192.0.2.1:2"], 0)
