# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Other users of this machine: whose process is at the other end of a connection, and who there is.

Flower 1.41 authenticates its Control and Runtime APIs by nothing that one machine could use alone: accounts need the owner's
OpenID provider, its HTTP client can't show a certificate or open a Unix socket. But a connection on loopback has both its ends in
one kernel, and Linux says in `/proc/net/tcp` which user has made the other one.
"""

import contextlib
import ipaddress
import os
import pwd
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


TRUST_FLAG = "--trust-local-users"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_ESTABLISHED = "01"
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
    for table in _TABLES:
        with contextlib.suppress(OSError):
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
            if (user := _find_user(lines, client, server)) is not None:
                return user
    return None


def _find_user(lines: Iterable[str], client: tuple[str, int], server: tuple[str, int]) -> int | None:
    ends = [(one, other) for one in _write_address(client) for other in _write_address(server)]
    for line in lines:
        fields = line.split()
        if (fields[1], fields[2]) in ends and fields[3] == _ESTABLISHED and fields[9] != "0":
            return int(fields[7])
    return None


def _write_address(address: tuple[str, int]) -> list[str]:
    """An address as the kernel lists it; an IPv4 one also as IPv6 sockets have it."""
    found = ipaddress.ip_address(address[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    forms = [found.packed]
    if found.version == 4:
        forms.append(bytes(10) + b"\xff\xff" + found.packed)
    return [f"{_write_words(packed)}:{address[1]:04X}" for packed in forms]


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
