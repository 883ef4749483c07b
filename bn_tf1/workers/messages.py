"""Messages between workers: JSON over one TCP connection, behind a proof of a secret.

Contract: before the other side has proved that it knows the secret, exactly 64 bytes of it
are read, within seconds. Whatever else is read is bounded too. The secret itself never
travels; what follows the proof is neither encrypted nor signed, as is TensorFlow's own
traffic between workers.

    chief    GREETING, 32 random bytes
    worker   32 random bytes, HMAC(secret, "worker", both)
    chief    HMAC(secret, "chief", both), or 32 zeros for a wrong proof
    both     messages: 4 bytes of length, JSON
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import select
import socket
import threading
import time
from typing import Any

# The number is to grow when what follows changes, so that old and new tell each other apart.
GREETING = b"bn_tf1 workers 1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_REFUSED = bytes(_PROOF_BYTES)
PROOF_SECS = 5.0
_SEND_SECS = 5.0
# The longest are a configuration and the names of all collectives, some kilobytes each.
_MAX_BYTES = 1 << 24


class WrongSecret(ValueError):
    """The other side does not know the secret, or is no worker."""


class NoChief(ValueError):
    """What answers at the chief's address is no chief that waits for workers."""


class Channel:
    """A connection to another worker after the proof.

    Attributes:
        address: "host:port" of the other side.
    """

    def __init__(self, connection: socket.socket):
        # A beat is less than a packet, and must not wait for more to fill one.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SEND_SECS)
        self.address = "{}:{}".format(*connection.getpeername()[:2])
        self._connection = connection
        self._received = b""
        # The thread of the beats and the main thread both send.
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Of the socket, for `select`."""
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Sends what JSON can hold; raises OSError where the other side is gone."""
        # JSON and no pickle, with which the other side could run what it likes here.
        data = json.dumps(message).encode("utf-8")
        with self._lock:
            self._connection.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self) -> list:
        """The messages that have arrived; waits for bytes if there are none.

        Raises:
            ConnectionError: the other side closed the connection.
            ValueError: it sent something else than messages.
            OSError: it is gone.
        """
        data = self._connection.recv(1 << 16)
        if not data:
            raise ConnectionError("it closed its connection")
        self._received += data
        messages = []
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            # Before it has arrived: it must not fill the memory first.
            if end > _MAX_BYTES:
                raise ValueError(f"it sent a message of {end} bytes")
            if len(self._received) < end:
                break
            messages.append(json.loads(self._received[4:end].decode("utf-8")))
            self._received = self._received[end:]
        return messages

    def receive_one(self, seconds: float) -> Any:
        """The next message, within so many seconds; errors as of `receive`."""
        deadline = time.monotonic() + seconds
        while True:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                messages = self.receive()
            finally:
                self._connection.settimeout(_SEND_SECS)
            if messages:
                return messages[0]

    def is_open(self) -> bool:
        """Whether the other side has not closed the connection."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        try:
            return not readable or self._connection.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def admit(connection: socket.socket, secret: bytes) -> Channel:
    """The chief's side of the proof.

    Raises:
        WrongSecret: the other side did not prove that it knows the secret.
        OSError: it is gone, or silent.
    """
    # Random numbers of both sides: who has listened to one meeting cannot replay it.
    nonce = os.urandom(_NONCE_BYTES)
    connection.settimeout(PROOF_SECS)
    connection.sendall(GREETING + nonce)
    answer = _exactly(connection, _NONCE_BYTES + _PROOF_BYTES)
    other, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"worker", nonce, other)):
        connection.sendall(_REFUSED)
        raise WrongSecret("it does not know the secret")
    connection.sendall(_proof(secret, b"chief", nonce, other))
    return Channel(connection)


def introduce(connection: socket.socket, secret: bytes) -> Channel:
    """The worker's side of the proof.

    Raises:
        NoChief: something else answers there.
        WrongSecret: the chief has another secret.
        OSError: it is gone, or silent.
    """
    connection.settimeout(PROOF_SECS)
    greeting = _exactly(connection, len(GREETING))
    if greeting != GREETING:
        raise NoChief("what answers is no chief that waits for workers")
    nonce, own = _exactly(connection, _NONCE_BYTES), os.urandom(_NONCE_BYTES)
    connection.sendall(own + _proof(secret, b"worker", nonce, own))
    proof = _exactly(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"chief", nonce, own)):
        raise WrongSecret("the chief has another secret")
    return Channel(connection)


def _proof(secret, side, *nonces):
    # The side is in it, so that the chief's own proof cannot be sent back to it as one.
    return hmac.new(secret, side + b"".join(nonces), hashlib.sha256).digest()


def _exactly(connection, count):
    # One deadline for all: a byte every few seconds must not hold the place for ever.
    deadline = time.monotonic() + PROOF_SECS
    data = b""
    while len(data) < count:
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("it closed its connection")
        data += piece
    return data
