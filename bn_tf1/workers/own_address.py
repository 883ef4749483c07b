"""Keeps TensorFlow's server to the address that it was given.

`tf.train.Server` listens at 0.0.0.0: it stands in its source (grpc_server_lib.cc, from 1.15
to 2.21), and no option or environment variable changes it. But the socket is one of this
process, and Linux puts what comes in for a socket through a filter before TCP answers it:
here one that drops what is not for the given address. It needs no rights.

Contract: once `keep` has returned, no connection reaches the port by another address of
the machine, and none that did before is left. Where that cannot be had, a warning says so.

Source: Linux, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys

# Linux's number, which Python's `socket` does not have.
_SO_ATTACH_FILTER = 26
# Instructions of a filter, and how it names the header of the network's packet.
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP_IF_EQUAL, _RETURN = 48, 32, 116, 21, 6
_HEADER = 2**32 - 0x100000
_EVERYTHING = 2**32 - 1
# Where the header has the destination, by the version of the protocol.
_DESTINATIONS = {4: 16, 6: 24}


def keep(name: str, port: int) -> None:
    """Lets what listens at `port` in this process hear of one address alone.

    Call it before the server is started, and before another worker may connect: who has
    come until then is sent away.

    Args:
        name: the address, or a name, all of whose addresses are heard. 0.0.0.0 and :: are
            all that there are.
        port: of the server.
    """
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        addresses = sorted({address_in(place) for *_, place in found}, key=str)
        if any(address.is_unspecified for address in addresses):
            return
        listening = [one for one in _sockets_at(port) if _listens(one)]
        if not listening:
            raise OSError("its socket is not found")
        for one in listening:
            _attach(one, _program(addresses))
            _send_away_who_waits(one)
        # TensorFlow 2 takes connections as soon as it listens.
        for one in _sockets_at(port):
            if not _listens(one) and address_in(one.getsockname()) not in addresses:
                one.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        print(
            f"warning: TensorFlow's server listens at port {port} of every address of this "
            f"machine, and cannot be kept to {name} on this system: {error}",
            file=sys.stderr,
            flush=True,
        )


def address_in(place: tuple) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of what `getsockname` gives."""
    address = ipaddress.ip_address(place[0].split("%")[0])
    # A socket for both protocols has IPv4's addresses as some of IPv6.
    return getattr(address, "ipv4_mapped", None) or address


def is_of_this_machine(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> bool:
    """Whether this machine has `address`: it can listen at no other's."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as one:
        one.bind((str(address), 0))
        return True
    return False


def _sockets_at(port):
    """Copies of the sockets of this process, whoever has made them."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                # Of a copy: Python closes what it made a socket of.
                one = socket.socket(fileno=os.dup(descriptor))
                is_tcp = one.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and one.getsockname()[1] == port:
                    found.append(one)
    return found


def _listens(one):
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _program(addresses):
    """Instructions (what, if true, if false, number): pass what is for one of them."""
    program = []
    for address in addresses:
        # The version first: the other one has something else at that place.
        first = _HEADER + _DESTINATIONS[address.version]
        words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
        length = 4 + 2 * len(words)
        part = [(_LOAD_BYTE, 0, 0, _HEADER), (_SHIFT_RIGHT, 0, 0, 4)]
        part.append((_JUMP_IF_EQUAL, 0, length - 3, address.version))
        for i, word in enumerate(words):
            part.append((_LOAD_WORD, 0, 0, first + 4 * i))
            part.append((_JUMP_IF_EQUAL, 0, length - 5 - 2 * i, word))
        program += [*part, (_RETURN, 0, 0, _EVERYTHING)]
    return [*program, (_RETURN, 0, 0, 0)]


def _attach(one, program):
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("HP", len(program), ctypes.addressof(buffer))
    one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def _send_away_who_waits(one):
    # TensorFlow 1.15 takes no connection before it is started: they wait in the kernel.
    one.setblocking(
        False
    )  # as TensorFlow made it; a default timeout of Python would wait
    with contextlib.suppress(BlockingIOError):
        while True:
            one.accept()[0].close()
