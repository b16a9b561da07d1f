# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf server`: start a SuperLink, run a federation on it, and end everything that was started."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .addresses import (
    Address,
    check_local,
    check_loopback,
    explain_unreachable,
    find_own_address,
    is_wildcard,
    parse_address,
    parse_hosts,
)
from .certificates import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, make_certificates
from .environment import check_flower, make_environment
from .log_files import keep_small
from .neighbours import TRUST_FLAG, choose_trust
from .process_group import exit_on_sigterm, run_group
from .superlink_control import register_clients, run_app, watch_keys, write_app


SUPERLINK_PID = "superlink.pid"
_START_SECONDS = 180.0  # on a busy machine; an idle one needs 3 s


def run_server(
    config: str,
    flags: Sequence[str] = (),
    *,
    state_dir: str = "flower-server",
    listen: str = "127.0.0.1",
    port: int = 8000,
    hosts: Sequence[str] = (),
    client_keys: str | None = None,
    insecure: bool = False,
    trust_local_users: bool = False,
) -> int:
    """Start a SuperLink, run the federation of `config` on it to the end, and stop the SuperLink.

    Returns 0 only if the run completed; `flwr run --stream` returns 0 for a failed run too.

    Args:
        config: YAML file of the federation.
        flags: flags that override it.
        state_dir: directory for certificates, logs and the SuperLink's database.
        listen: address to listen on: of loopback, of one interface, or `0.0.0.0` or `::` for all of one kind.
        port: the one port that clients connect to.
        hosts: names and addresses of this machine that clients connect to; they go into the certificate. By default that
            of `listen`.
        client_keys: directory with the public keys that clients sent, each named after its client's id (`ID.pub`). Files
            can be added and removed while the server runs.
        insecure: neither TLS nor node keys; on loopback only.
        trust_local_users: let all users of this machine use Flower's local port, through which they can run code as this one.

    Raises:
        ValueError: if arguments conflict, there is no such file, or other users of this machine can't be kept out.
        RuntimeError: if the SuperLink or the run can't be started.
    """
    check_flower()
    listen, hosts = read_addresses(listen, port, hosts, insecure)
    for host in hosts:
        if reason := explain_unreachable(host, listen):
            print(f"Note: clients do not reach `{host}`: {reason}, unless something forwards it.", flush=True)
    if not Path(config).is_file():
        raise ValueError(f"--config `{config}` does not exist; expected the YAML file of the federation.")
    if client_keys is not None and not Path(client_keys).is_dir():
        raise ValueError(
            f"--client_keys `{client_keys}` is not a directory; expected that of the clients' *.pub files."
        )
    if client_keys is None and not insecure:
        raise ValueError(
            "--client_keys is not given, so no client could connect; expected the directory of the clients' *.pub files, "
            "each named after its client's id. It may be empty at first."
        )
    if client_keys is not None and insecure:
        raise ValueError("--client_keys with --insecure: without TLS no node shows its key. Leave one of them out.")
    state = Path(state_dir).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = find_own_address(listen)
    command = [sys.executable, "-m", "fedlpp_hf.flower.superlink", "--host", listen, "--port", str(port)]
    command += ["--database", str(state / "superlink.db"), "--disable-runtime-dependency-installation"]
    command += [TRUST_FLAG] if choose_trust(trust_local_users) else []
    connection = {"address": str(Address(own, port)), "insecure": insecure}
    if insecure:
        command += ["--insecure"]
    else:
        for notice in make_certificates(state, [*hosts, own, "127.0.0.1", "localhost"]):
            print(notice, flush=True)
        files = [str(state / name) for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)]
        command += ["--ssl-ca-certfile", files[0], "--ssl-certfile", files[1], "--ssl-keyfile", files[2]]
        command += ["--enable-supernode-auth"]
        connection["root-certificates"] = files[0]
    write_app(state, connection, config, flags, client_keys)
    environment = make_environment(state)
    exit_on_sigterm()
    log = state / "superlink.log"
    with keep_small(log), run_group(command, environment, log, state / SUPERLINK_PID) as superlink:
        wait_for_port(port, superlink, log, own)
        if client_keys is not None:
            register_clients(state, client_keys, environment)
        address = str(Address(hosts[0], port))
        print(_describe_client_command(config, address, None if insecure else state), flush=True)
        with watch_keys(state, client_keys, environment):
            return run_app(state, environment)


def read_addresses(listen: str, port: int, hosts: Sequence[str], insecure: bool) -> tuple[str, list[str]]:
    """Read `--listen` and `--hosts`: where to listen, and by which names clients reach this machine, at least one.

    Args:
        listen: as typed.
        port: of the server.
        hosts: as typed.
        insecure: whether only loopback is allowed.

    Raises:
        ValueError: if one of them is wrong, or they do not go together.
    """
    address = parse_address(listen, "--listen")
    if address.port not in (None, port):
        raise ValueError(f"--listen `{listen}` ends in a port; expected an address alone. Set --port {address.port}.")
    names = parse_hosts(hosts, port)
    if insecure:
        for host in (address.host, *names):
            check_loopback(host)
    if not names and is_wildcard(address.host):
        raise ValueError(
            f"--listen `{listen}` is for other machines. Give --hosts, the names or addresses by which they reach this one: "
            "the certificate holds them."
        )
    check_local(address.host)
    return address.host, names or [address.host]


def wait_for_port(port: int, process: subprocess.Popen, log: Path, host: str = "127.0.0.1") -> None:
    """Wait until `process` listens on `port` of `host`.

    Args:
        port: where it listens.
        process: that was started just now.
        log: of the process, for the message.
        host: at which this machine reaches it.

    Raises:
        ValueError: if another process listens there.
        RuntimeError: if it ends first, or takes too long.
    """
    address = str(Address(host, port))
    deadline = time.monotonic() + _START_SECONDS
    if _is_listening(host, port):  # the SuperLink needs a second to import what it needs
        raise ValueError(f"Another process listens on {address}. End it, or choose another --port.")
    while time.monotonic() < deadline and process.poll() is None:
        if _is_listening(host, port):
            return
        time.sleep(0.1)
    raise RuntimeError(f"The SuperLink did not start on {address}; see `{log}`.")


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _describe_client_command(config: str, address: str, state: Path | None) -> str:
    """What clients have to run; without `state`, the directory of the certificates, they run without TLS."""
    command = f"fedlpp-hf client --config {Path(config).name} --data ROWS.jsonl --server {address}"
    if state is None:
        return f"Clients run: {command} --insecure"
    return (
        f"Clients run: {command} --certificate ca.crt\n"
        f"They need `{state / CA_CERTIFICATE}`; you need each one's node.pub, as ID.pub, in the directory of --client_keys."
    )
