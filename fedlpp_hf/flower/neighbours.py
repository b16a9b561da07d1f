# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Other users of this machine: whose process is at the other end of a connection, and who there is.

Flower 1.41 authenticates its Control and Runtime APIs by nothing that one machine could use alone: accounts need the owner's
OpenID provider, its HTTP client can't show a certificate or open a Unix socket. But a connection on loopback has both its ends in
one kernel, and Linux says which user has made the other one: on a netlink socket (`sock_diag(7)`) in 15 µs, or, where that is not
to be had, in `/proc/net/tcp`, which takes 5 ms to read.
"""

import contextlib
import ipaddress
import os
import pwd
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


TRUST_FLAG = "--trust-local-users"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_ESTABLISHED = "01"
# From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h: headers, and what a request and an answer of one socket have.
_SOCK_DIAG, _BY_FAMILY, _REQUEST = 4, 20, 1
_HEADER, _QUESTION, _ANSWER, _ENDS = "=IHHII", "=BBBBI", "=BBBB", "!HH16s16s"
_ANY_COOKIE = struct.pack("=Iii", 0, -1, -1)  # of any interface
_DIAG_SECONDS = 1.0
_LOGIN_SHELLS_OF_NOBODY = ("nologin", "false", "sync", "shutdown", "halt")
_FIRST_LOGIN_ID = 500 if sys.platform == "darwin" else 1000


class OwnUserOnly:
    """ASGI middleware that answers 403 to everyone but this user's processes on this machine.

    Args:
        app: what it stands in front of.
        trust: take all users of this machine for this one.
    """

    def __init__(self, app: Any, trust: bool = False):
        self.app, self.trust = app, trust

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self.trust or is_own(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(send)


async def refuse(send: Any) -> None:
    """Answer 403, without a word."""
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def is_own(scope: dict[str, Any]) -> bool:
    """Whether a process of this user is at the other end of the connection of an ASGI `scope`."""
    client, server = scope.get("client"), scope.get("server")
    return client is not None and server is not None and find_peer_user(client, server) == os.getuid()


def find_peer_user(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """The id of the user whose process made the connection from `client` to `server`; None if it is not one of this machine.

    A socket that its process has closed belongs to nobody: the kernel then lists user 0, and no inode.
    """
    if (user := _ask_kernel(client, server)) is not None:
        return user
    for table in _TABLES:
        with contextlib.suppress(OSError):
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
            if (user := _find_user(lines, client, server)) is not None:
                return user
    return None


def _ask_kernel(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """As [`find_peer_user`], of the socket that has just these ends; None also where the kernel does not answer."""
    source, target = _read_address(client), _read_address(server)
    if not hasattr(socket, "AF_NETLINK") or source.version != target.version:
        return None
    family = socket.AF_INET if source.version == 4 else socket.AF_INET6
    ends = struct.pack(_ENDS, client[1], server[1], source.packed, target.packed)
    question = struct.pack(_QUESTION, family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ends + _ANY_COOKIE
    length = struct.calcsize(_HEADER) + len(question)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(_DIAG_SECONDS)
            kernel.sendto(struct.pack(_HEADER, length, _BY_FAMILY, _REQUEST, 1, 0) + question, (0, 0))
            answer, sender = kernel.recvfrom(1 << 13)
    except OSError:
        return None
    return _read_answer(answer, family, ends) if sender[0] == 0 else None


def _read_answer(answer: bytes, family: int, ends: bytes) -> int | None:
    """The user of an established socket of this family with these ends, if the answer is about one."""
    place = struct.calcsize(_HEADER)
    try:
        kind = struct.unpack_from(_HEADER, answer)[1]
        found, state = struct.unpack_from(_ANSWER, answer, place)[:2]
        place += struct.calcsize(_ANSWER)
        same = answer[place : place + len(ends)] == ends
        user, inode = struct.unpack_from("=II", answer, place + len(ends) + len(_ANY_COOKIE) + 12)
    except struct.error:  # an error is shorter
        return None
    return (
        user if kind == _BY_FAMILY and found == family and same and state == int(_ESTABLISHED, 16) and inode else None
    )


def _find_user(lines: Iterable[str], client: tuple[str, int], server: tuple[str, int]) -> int | None:
    ends = [(one, other) for one in _write_address(client) for other in _write_address(server)]
    for line in lines:
        fields = line.split()
        if (fields[1], fields[2]) in ends and fields[3] == _ESTABLISHED and fields[9] != "0":
            return int(fields[7])
    return None


def _write_address(address: tuple[str, int]) -> list[str]:
    """An address as the kernel lists it; an IPv4 one also as IPv6 sockets have it."""
    found = _read_address(address)
    forms = [found.packed]
    if found.version == 4:
        forms.append(bytes(10) + b"\xff\xff" + found.packed)
    return [f"{_write_words(packed)}:{address[1]:04X}" for packed in forms]


def _read_address(address: tuple[str, int]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(address[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return found if mapped is None else mapped


def _write_words(packed: bytes) -> str:
    words = (packed[place : place + 4] for place in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def identifies_users() -> bool:
    """Whether this machine says who made a connection: tried on one from this process to itself."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        return find_peer_user(client.getsockname(), client.getpeername()) == os.getuid()


def list_other_users() -> list[str]:
    """Who else can log in on this machine, as far as its list of users says; root, who can do everything, is left out."""
    return sorted(
        entry.pw_name
        for entry in pwd.getpwall()
        if entry.pw_uid >= _FIRST_LOGIN_ID
        and entry.pw_uid not in (os.getuid(), 65534)
        and Path(entry.pw_shell).name not in _LOGIN_SHELLS_OF_NOBODY
    )


def choose_trust(trust: bool) -> bool:
    """Whether all users of this machine must be, or may be, taken for this one.

    Args:
        trust: what the owner of the machine says.

    Raises:
        ValueError: if there are other users, nobody says that they can be trusted, and the machine does not tell them apart.
    """
    if trust or identifies_users():
        return trust
    if others := list_other_users():
        raise ValueError(
            f"This machine does not say which user makes a connection on loopback (no usable /proc/net/tcp), and it has other "
            f"users ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}). Each could run code as you through Flower's "
            "local port. Use a machine or a container without other users, or pass --trust_local_users."
        )
    return True
