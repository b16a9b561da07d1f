# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf server`: start a SuperLink, run a federation on it, and end everything that was started."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .certificates import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, check_loopback, make_certificates
from .environment import check_flower, make_environment
from .process_group import exit_on_sigterm, run_group
from .superlink_control import register_clients, run_app, write_app


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
) -> int:
    """Start a SuperLink, run the federation of `config` on it to the end, and stop the SuperLink.

    Returns 0 only if the run completed; `flwr run --stream` returns 0 for a failed run too.

    Args:
        config: YAML file of the federation.
        flags: flags that override it.
        state_dir: directory for certificates, logs and the SuperLink's database.
        listen: address to listen on.
        port: the one port that clients connect to.
        hosts: names and addresses of this machine that clients connect to; they go into the certificate.
        client_keys: directory with the public keys (`*.pub`) that clients sent.
        insecure: neither TLS nor node keys; on loopback only.

    Raises:
        ValueError: if arguments conflict, or there is no such file.
        RuntimeError: if the SuperLink or the run can't be started.
    """
    check_flower()
    if insecure:
        check_loopback(listen)
    if not Path(config).is_file():
        raise ValueError(f"config='{config}' does not exist; expected the YAML file of the federation.")
    state = Path(state_dir).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-m", "fedlpp_hf.flower.superlink", "--host", listen, "--port", str(port)]
    command += ["--database", str(state / "superlink.db"), "--disable-runtime-dependency-installation"]
    connection = {"address": f"127.0.0.1:{port}", "insecure": insecure}
    if insecure:
        command += ["--insecure"]
    else:
        make_certificates(state, [*hosts, "127.0.0.1", "localhost"])
        files = [str(state / name) for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)]
        command += ["--ssl-ca-certfile", files[0], "--ssl-certfile", files[1], "--ssl-keyfile", files[2]]
        command += ["--enable-supernode-auth"]
        connection["root-certificates"] = files[0]
    write_app(state, connection, config, flags)
    environment = make_environment(state)
    exit_on_sigterm()
    with run_group(command, environment, state / "superlink.log", state / SUPERLINK_PID) as superlink:
        wait_for_port(port, superlink, state / "superlink.log")
        register_clients(state, client_keys, environment)
        host = hosts[0] if hosts else "127.0.0.1"
        print(_describe_client_command(config, f"{host}:{port}", None if insecure else state), flush=True)
        return run_app(state, environment)


def wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until `process` listens on `port` of this machine.

    Raises:
        RuntimeError: if it ends first, or takes too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"The SuperLink did not start on port {port}; see `{log}`.")


def _describe_client_command(config: str, address: str, state: Path | None) -> str:
    """What clients have to run; without `state`, the directory of the certificates, they run without TLS."""
    command = f"fedlpp-hf client --config {Path(config).name} --data ROWS.jsonl --server {address}"
    if state is None:
        return f"Clients run: {command} --insecure"
    return (
        f"Clients run: {command} --certificate ca.crt\n"
        f"They need `{state / CA_CERTIFICATE}`; you need their node.pub files in the directory of --client_keys."
    )
