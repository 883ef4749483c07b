"""Who reaches a port after it was kept to one address of this machine."""

import contextlib
import socket
import sys

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.workers import handshake, own_address

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has such filters"
)
OURS, OTHER = "127.0.0.1", "127.0.0.2"


def free_port():
    with socket.socket() as holder:
        holder.bind((OURS, 0))
        return holder.getsockname()[1]


def reach(address, port):
    return socket.create_connection((address, port), timeout=0.3)


@pytest.fixture(params=[None, 3.0], ids=["no_default_timeout", "default_timeout"])
def _default_timeout(request):
    socket.setdefaulttimeout(request.param)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("_default_timeout")
def test_the_server_hears_of_its_address_alone(capfd):
    port = free_port()
    server = tf.train.Server({"worker": [f"{OURS}:{port}"]}, "worker", 0, start=False)
    strangers = [reach(address, port) for address in (OTHER, "127.0.0.3")]
    own_address.keep(OURS, port)
    server.start()
    for address in (OTHER, "127.0.0.3"):
        with pytest.raises(socket.timeout):
            reach(address, port)
    with reach(OURS, port) as peer:
        assert peer.recv(1)  # HTTP/2 begins
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1 << 10):
                pass  # what TensorFlow 2 said before
    with tf.Session(server.target) as session:
        assert session.run(tf.constant(1) + 1) == 2
    assert "cannot be kept" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, heard, not_heard",
    [
        (OURS, [OURS], [OTHER, "::1"]),
        ("::1", ["::1"], [OURS]),
        ("::", ["::1", OURS], []),
    ],
)
def test_addresses_of_both_protocols(name, heard, not_heard):
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen(8)
        listener.setblocking(False)
        port = listener.getsockname()[1]
        own_address.keep(name, port)
        for address in heard:
            reach(address, port).close()
        for address in not_heard:
            with pytest.raises(socket.timeout):
                reach(address, port)


def test_what_cannot_be_kept_is_said(capsys):
    own_address.keep(OURS, free_port())
    assert "cannot be kept to 127.0.0.1 on this system" in capsys.readouterr().err


def test_the_meeting_is_at_its_address_alone():
    with handshake.listen(f"{OURS}:{free_port()}") as listener:
        port = listener.getsockname()[1]
        reach(OURS, port).close()
        with pytest.raises(ConnectionRefusedError):
            reach(OTHER, port)
