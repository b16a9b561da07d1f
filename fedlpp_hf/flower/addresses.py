# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Names and addresses of machines, as people type them: read them, or say how to write them."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass


_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_EXPECTED = "expected a name (fl.example.org) or an IP address (192.0.2.7, 2001:db8::7)"


@dataclass(frozen=True, slots=True)
class Address:
    """A machine's name in ASCII, or its IP address without brackets, and a port if one was given."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


def parse_address(text: str, option: str) -> Address:
    """Read `HOST`, `HOST:PORT`, an IPv6 address with or without brackets, or a URL; international names become ASCII.

    Args:
        text: what the user typed.
        option: where, for the message.

    Raises:
        ValueError: if it is no address of a machine, saying how to write it.
    """
    rest = re.sub(r"^https?://", "", text.strip(), flags=re.IGNORECASE).removesuffix("/")
    host, port = rest, None
    if match := re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest):
        host, port = match[1], match[2]
        if ":" not in host:
            raise ValueError(f"{option} `{text}`: brackets are for IPv6 addresses; {_EXPECTED}.")
    elif rest.count(":") == 1:
        host, port = rest.split(":")
    try:
        return Address(_read_host(host), None if port is None else _read_port(port))
    except ValueError as error:
        raise ValueError(f"{option} `{text}`: {error}.") from None


def parse_server(text: str, default_port: int = 8000) -> Address:
    """Read what `--server` was given, the address of the server.

    Args:
        text: what the user typed.
        default_port: if it has no port.

    Raises:
        ValueError: if nobody can connect to it.
    """
    address = parse_address(text, "--server")
    if ":" in address.host and "[" not in text:
        raise ValueError(f"--server `{text}` may end in a port; write an IPv6 address as [2001:db8::7]:PORT.")
    if is_wildcard(address.host):
        raise ValueError(
            f"--server `{text}` stands for all addresses of a machine; {_EXPECTED} of the server, and its port."
        )
    return Address(address.host, address.port or default_port)


def parse_hosts(texts: Sequence[str], port: int | None = None) -> list[str]:
    """Read what `--hosts` was given: names and addresses of one machine, separated by spaces or commas.

    Args:
        texts: what the user typed.
        port: the server's. One beside a host must be the same.

    Raises:
        ValueError: if one is not a name or an address that clients can connect to.
    """
    words = [word for text in texts for word in re.split(r"[\s,;]+", text) if word]
    if texts and not words:
        raise ValueError(f"--hosts is empty; {_EXPECTED}.")
    hosts = []
    for word in words:
        address = parse_address(word, "--hosts")
        if port is not None and address.port not in (None, port):
            raise ValueError(
                f"--hosts `{word}`: the server listens on port {port}. Leave the port out, or set --port {address.port}."
            )
        if port is not None and "[" not in word and address.host.endswith(f":{port}"):
            raise ValueError(
                f"--hosts `{word}` may end in the port; write an IPv6 address in brackets: [2001:db8::7]."
            )
        if is_wildcard(address.host):
            raise ValueError(
                f"--hosts `{word}` stands for all addresses of a machine, and nobody can connect to it; {_EXPECTED} by "
                "which clients reach this machine."
            )
        hosts.append(address.host)
    return list(dict.fromkeys(hosts))


def is_wildcard(host: str) -> bool:
    """Whether it is `0.0.0.0` or `::`: to listen on all interfaces."""
    return _is(host, "is_unspecified")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host == "localhost" or _is(host, "is_loopback")


def check_loopback(host: str) -> None:
    """Check a host that is to be used without TLS and keys.

    Raises:
        ValueError: if other machines can reach it.
    """
    if not is_loopback(host):
        raise ValueError(
            f"--insecure with `{host}`: without TLS and keys only loopback is allowed. Leave --insecure out."
        )


def check_local(host: str) -> None:
    """Check an address to listen on.

    Raises:
        ValueError: if it is not one of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"--listen `{host}` can't be used ({error.strerror}); expected an address of this machine: 127.0.0.1, that of "
            "one interface, or 0.0.0.0 (`::` for IPv6) for all."
        ) from None


def find_own_address(listen: str) -> str:
    """The address at which this machine reaches its own server, which listens on `listen`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)


def explain_unreachable(host: str, listen: str) -> str | None:
    """Why a server that listens on `listen` can't be reached at `host`; None if that can't be told."""
    if is_loopback(listen) and not is_loopback(host):
        return f"--listen {listen} is for this machine alone; set --listen 0.0.0.0, or the address of one interface"
    if is_loopback(host) and not is_loopback(listen) and not is_wildcard(listen):
        return f"--listen {listen} does not listen on loopback"
    versions = [ipaddress.ip_address(text).version for text in (host, listen) if _is_address(text)]
    if len(set(versions)) == 2:
        return f"it is an IPv{versions[0]} address, and --listen {listen} is for IPv{versions[1]}"
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is(host: str, kind: str) -> bool:
    return _is_address(host) and getattr(ipaddress.ip_address(host), kind)


def _read_host(host: str) -> str:
    if "%" in host:
        raise ValueError(
            "an address with a zone (%) has a meaning on one machine only; expected another address of it"
        )
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    name = host.removesuffix(".").lower()
    if not name.isascii():
        import idna  # an international name: TLS and DNS know its ASCII form, and Flower's HTTP client makes the same

        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f"not a valid international name ({error})") from None
    if not _NAME.fullmatch(name) or len(name) > 253:
        raise ValueError(f"not the name of a machine; {_EXPECTED}")
    if re.fullmatch(r"(0x[0-9a-f]+|\d+)", name.rpartition(".")[2]):  # no domain ends in a number
        raise ValueError(f"looks like an IP address and is none; {_EXPECTED}")
    return name


def _read_port(port: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"`{port}` is not a port; expected a number from 1 to 65535")
    return int(port)
