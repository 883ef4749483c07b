"""How workers come together, before any of them starts a server of TensorFlow.

A worker connects to the chief at the chief's own address, proves that it knows the secret
and says which worker it is, of which hosts, in which versions. Does anything not fit, all
end with the reason: such a run could only hang. A stranger, or a wrong secret, ends
nothing but its own connection.

The chief listens at the address that it is given and at no other, until all are there;
TensorFlow's server takes the port then, while the connections go on, and `own_address`
keeps it to the same address.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from typing import Any, Mapping, NamedTuple, Sequence

from bn_tf1.workers import messages
from bn_tf1.workers.messages import Channel
from bn_tf1.workers.own_address import address_in, is_of_this_machine

# Sysexits' EX_UNAVAILABLE and EX_PROTOCOL.
LOST = 69
REFUSED = 76

_RETRY_SECS = 0.2
# Each has a thread for some seconds.
_MAX_STRANGERS = 32


class WorkersError(RuntimeError):
    """The workers did not come together, or do not fit together.

    Attributes:
        exit_code: `LOST` where it may help to start all of them again, else `REFUSED`.
    """

    def __init__(self, message: str, exit_code: int = REFUSED):
        super().__init__(message)
        self.exit_code = exit_code


class Introduction(NamedTuple):
    """What a worker says of itself.

    Attributes:
        rank: which of `hosts` it is.
        hosts: "host:port" of all workers.
        versions: what must be the same everywhere for the bits to be.
    """

    rank: int
    hosts: Sequence[str]
    versions: Mapping[str, str]


def address_of(host: str) -> tuple[str, int]:
    """("host", port) of "host:port"."""
    name, _, port = host.rpartition(":")
    return name.strip("[]"), int(port)


def listen(host: str) -> socket.socket:
    """A listening socket at "host:port", which nobody else can take meanwhile.

    Raises:
        WorkersError: the port is taken, or the address is not one of this machine.
    """
    name, port = address_of(host)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind)
        # TensorFlow's server is going to listen here, beside the open connections.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_MAX_STRANGERS)
    except OSError as error:
        raise WorkersError(
            f"this worker cannot listen at its address {host}: {error.strerror}; give "
            "a free port of an address of this machine"
        ) from error
    return listener


def check_reach(listener: socket.socket, hosts: Sequence[str], rank: int) -> None:
    """Raises WorkersError if others could not reach worker `rank` where it listens.

    Debian writes a host's own name into its /etc/hosts as 127.0.1.1: the others look the
    name up elsewhere, and would find nobody at the address that it has there.
    """
    own = address_in(listener.getsockname())
    for host in hosts if own.is_loopback else ():
        try:
            found = socket.getaddrinfo(address_of(host)[0], None)
        except OSError:
            continue  # who does not come is named later
        # Who is on this machine, too, comes from any of its addresses.
        if not any(is_of_this_machine(address_in(place)) for *_, place in found):
            raise WorkersError(
                f"worker {rank} is to listen at {hosts[rank]}, which on this machine is "
                f"the address {own}, where {host} cannot reach it: give an address of the "
                "network, or mend /etc/hosts"
            )


def gather(
    listener: socket.socket,
    own: Introduction,
    message: Any,
    *,
    secret: bytes,
    seconds: float,
) -> dict[int, Channel]:
    """The chief's side: waits for all workers, and gives them `message`.

    Args:
        listener: of `listen`; it is closed.
        own: the chief's introduction.
        message: what JSON can hold.
        secret: what the others have to know.
        seconds: how long to wait.

    Returns:
        The channel by rank.

    Raises:
        WorkersError: they did not come in time, or do not fit together.
    """
    arrivals: queue.Queue = queue.Queue()
    closing = threading.Event()
    thread = threading.Thread(
        target=_admit_all, args=[listener, secret, arrivals, closing], daemon=True
    )
    thread.start()
    channels: dict[int, Channel] = {}
    try:
        _meet(arrivals, channels, own, time.monotonic() + seconds, seconds)
        for rank, channel in channels.items():
            try:
                channel.send({"welcome": message})
            except OSError as error:
                raise WorkersError(f"worker {rank} is gone: {error}", LOST) from error
    except WorkersError as error:
        for channel in channels.values():
            tell_end(channel, error.exit_code, str(error))
        raise
    finally:
        closing.set()
        listener.close()
        thread.join()
    return channels


def tell_end(channel: Channel, code: int, reason: str) -> None:
    """Tells another worker to end, if it still is there."""
    try:
        channel.send({"end": [code, reason]})
    except OSError:
        pass  # it has ended already


def _meet(arrivals, channels, own, deadline, seconds):
    refused = []
    while len(channels) < len(own.hosts) - 1:
        try:
            channel, other = arrivals.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            absent = [r for r in range(1, len(own.hosts)) if r not in channels]
            names = ", ".join(f"worker {r} at {own.hosts[r]}" for r in absent)
            turned_away = f" (turned away: {'; '.join(refused)})" if refused else ""
            raise WorkersError(
                f"{names} did not join within {seconds:g} s{turned_away}", LOST
            ) from None
        if channel is None:
            # Told if somebody is missing: it may be a worker with a wrong secret.
            refused.append(other)
            continue
        try:
            _check(other, own, channels)
        except WorkersError as error:
            tell_end(channel, error.exit_code, str(error))
            raise
        channels[other.rank] = channel


def _check(other, own, channels):
    who = f"worker {other.rank}"
    if list(other.hosts) != list(own.hosts):
        raise WorkersError(
            f"{who} was started with the hosts {', '.join(other.hosts)}, but the chief "
            f"with {', '.join(own.hosts)}: give all the same list"
        )
    if not 1 <= other.rank < len(own.hosts):
        raise WorkersError("there is a second worker 0: give each its own index")
    # Other versions have other kernels, and so other bits.
    if dict(other.versions) != dict(own.versions):
        raise WorkersError(
            f"{who} has {_shown(other.versions)}, but the chief has "
            f"{_shown(own.versions)}: install the same everywhere"
        )
    # One that ended, and was started again while the chief waits, is no second one.
    if other.rank in channels and channels[other.rank].is_open():
        raise WorkersError(
            f"two processes say that they are {who}, the second at "
            f"{channels[other.rank].address}: give each its own index"
        )


def _shown(versions):
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _admit_all(listener, secret, arrivals, closing):
    listener.settimeout(_RETRY_SECS)
    places = threading.Semaphore(_MAX_STRANGERS)
    while not closing.is_set():
        try:
            connection, address = listener.accept()
        except OSError:  # nobody came, or the listener was closed
            continue
        connection.setblocking(True)  # on some systems it is as the listener is
        if not places.acquire(blocking=False):
            connection.close()
            continue
        # Each in a thread: a stranger that says nothing must not keep workers waiting.
        threading.Thread(
            target=_admit, args=[connection, address, secret, arrivals, places]
        ).start()


def _admit(connection, address, secret, arrivals, places):
    try:
        channel = messages.admit(connection, secret)
        said = channel.receive_one(messages.PROOF_SECS)
        arrivals.put((channel, Introduction(*said["introduction"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        connection.close()
        text = f"{address[0]}:{address[1]}: {error}"
        print(f"warning: turned away {text}", file=sys.stderr, flush=True)
        arrivals.put((None, text))
    finally:
        places.release()


def join(own: Introduction, *, secret: bytes, seconds: float) -> tuple[Channel, Any]:
    """A worker's side: the channel to the chief, and the chief's message.

    Raises:
        WorkersError: there is no chief, or it says why this worker does not fit.
    """
    chief = own.hosts[0]
    deadline = time.monotonic() + seconds
    channel = _connected(chief, secret, deadline, seconds)
    try:
        channel.send({"introduction": own})
        # The chief may have been started that much later, and waits as long for the others.
        answer = channel.receive_one(max(deadline - time.monotonic(), 0) + seconds)
    except (OSError, ValueError) as error:
        raise WorkersError(
            f"the chief at {chief} ended before all workers had joined: {error}", LOST
        ) from error
    if "end" in answer:
        code, reason = answer["end"]
        raise WorkersError(reason, code)
    return channel, answer["welcome"]


def _connected(chief, secret, deadline, seconds):
    while True:
        try:
            connection = socket.create_connection(
                address_of(chief), max(deadline - time.monotonic(), 0.01)
            )
            # Where nobody listens yet, a port of the range for clients may be given to
            # this very connection, which then leads to itself and keeps the chief out.
            if connection.getsockname() == connection.getpeername():
                connection.close()
                raise ConnectionError("nobody listens there")
            return messages.introduce(connection, secret)
        except messages.WrongSecret as error:
            raise WorkersError(
                f"the chief at {chief} refuses this worker: {error}"
            ) from error
        except messages.NoChief as error:
            raise WorkersError(
                f"{error} at {chief}: the others go on without this worker, or another "
                "program has the port; end all workers and start them again",
                LOST,
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorkersError(
                    f"there was no chief at {chief} within {seconds:g} s: {error}", LOST
                ) from error
        time.sleep(_RETRY_SECS)
