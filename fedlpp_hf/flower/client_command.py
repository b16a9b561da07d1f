# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf client`: keep a SuperNode running, and a trainer on demand, until interrupted."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .addresses import check_loopback, parse_server
from .answers import check_client_id
from .certificates import NODE_PUBLIC_KEY, check_authority, make_node_key
from .client_settings import ClientSettings
from .environment import check_flower, make_environment
from .local_trainer import stop_trainer
from .log_files import keep_small
from .neighbours import TRUST_FLAG, choose_trust
from .peers import read_peers
from .process_group import exit_on_sigterm, run_group


SUPERNODE_PID = "supernode.pid"
_RESTART_SECONDS = 5


def run_client(
    config: str,
    data: str,
    flags: Sequence[str] = (),
    *,
    server: str = "127.0.0.1:8000",
    certificate: str | None = None,
    client_id: str | None = None,
    state_dir: str | None = None,
    cache_dir: str = "~/.cache/fedlpp_hf/bases",
    base: str | None = None,
    processes: int = 1,
    cold: bool = False,
    policy: str | None = None,
    dry_run: bool = False,
    insecure: bool = False,
    peer_keys: str | None = None,
    trust_local_users: bool = False,
) -> int:
    """Be a client of the federation until interrupted: run a SuperNode, restart it when it ends, train on demand.

    Returns 130 after ^C, and 0 after a dry run.

    Args:
        config: YAML file of the federation.
        data: the client's rows: .jsonl, .csv, .parquet, or a directory of `save_to_disk`.
        flags: flags that override the configuration.
        server: HOST:PORT of the server.
        certificate: the server's `ca.crt`.
        client_id: name in the federation; by default the name of the file of rows.
        state_dir: directory for the node's key and the logs; by default `flower-CLIENT_ID`.
        cache_dir: directory for bases that the server sends.
        base: directory or Hub id of the base, if the server should not send it.
        processes: GPUs to train on, by `accelerate launch`.
        cold: keep no trainer running; load everything for each task.
        policy: YAML file of the client's own conditions.
        dry_run: train one task, show what would leave, send nothing, and end.
        insecure: neither TLS nor a node key; on loopback only.
        peer_keys: directory with the public keys of all clients, under their ids. Under secure aggregation this client then
            takes part with these alone.
        trust_local_users: let all users of this machine use Flower's local port, through which they can run code as this one.

    Raises:
        ValueError: if arguments conflict, a file does not exist, or other users of this machine can't be kept out.
    """
    check_flower()
    address = parse_server(server)
    if insecure:
        check_loopback(address.host)
        if peer_keys is not None:
            raise ValueError("--peer_keys with --insecure: without a node key this client can't sign. Leave one out.")
    if peer_keys is not None:
        read_peers(peer_keys)
    for option, path in (("--config", config), ("--data", data)):
        if not Path(path).exists():
            raise ValueError(f"{option} `{path}` does not exist.")
    client_id = client_id or Path(data).stem
    try:
        check_client_id(client_id)
    except ValueError as error:
        raise ValueError(f"--client_id: {error}.") from None
    state = Path(state_dir or f"flower-{client_id}").resolve()
    settings = ClientSettings(
        config=str(Path(config).resolve()),
        data=str(Path(data).resolve()),
        client_id=client_id,
        state_dir=str(state),
        cache_dir=str(Path(cache_dir).expanduser().resolve()),
        flags=list(flags),
        base=base,
        warm=not cold,
        launch=[] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)],
        parent=os.getpid(),
        policy=None if policy is None else str(Path(policy).resolve()),
        dry_run=dry_run,
        peer_keys=None if peer_keys is None else str(Path(peer_keys).resolve()),
    )
    command = [sys.executable, "-m", "fedlpp_hf.flower.supernode", "--superlink", str(address)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(_find_free_port()),
    ]  # for the ClientApp, which runs on this machine
    command += ["--node-config", f'settings="{settings.write()}"']
    command += [TRUST_FLAG] if choose_trust(trust_local_users) else []
    command += ["--insecure"] if insecure else _prepare_credentials(state, client_id, certificate)
    exit_on_sigterm()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            with keep_small(state / "supernode.log", settings.log_file):
                _keep_running(command, settings)
            return 0
        finally:
            stop_trainer(settings)
    return 130


def _prepare_credentials(state: Path, client_id: str, certificate: str | None) -> list[str]:
    """Make the node's key, say what to do with it, and return the SuperNode's arguments."""
    public = state / NODE_PUBLIC_KEY
    before = public.read_bytes() if public.is_file() else None
    key = make_node_key(state)
    if before not in (None, public.read_bytes()):
        print("A new key was made, because the earlier one was lost: the server's owner must register it.", flush=True)
    print(
        f"This client's key is `{public}`. Send that file to the server's owner, who saves it as "
        f"`{client_id}.pub` in the directory of --client_keys.",
        flush=True,
    )
    if certificate is None:
        raise ValueError("--certificate is not given; expected the ca.crt that the server's owner sends you.")
    check_authority(certificate)
    return ["--root-certificates", str(Path(certificate).resolve()), "--auth-supernode-private-key", str(key)]


def _keep_running(command: Sequence[str], settings: ClientSettings) -> None:
    """Restart the SuperNode whenever it ends; return after a dry run's task."""
    state = Path(settings.state_dir)
    environment = make_environment(state)
    settings.dry_run_file.unlink(missing_ok=True)  # of an earlier one
    while True:
        with run_group(command, environment, state / "supernode.log", state / SUPERNODE_PID) as node:
            code = _wait_for_dry_run(node, settings.dry_run_file) if settings.dry_run else node.wait()
        if code is None:
            return
        print(
            f"The SuperNode ended with code {code} and restarts in {_RESTART_SECONDS} s. Is the server up, and does it know "
            f"this client's key? See `{state / 'supernode.log'}`.",
            flush=True,
        )
        time.sleep(_RESTART_SECONDS)


def _wait_for_dry_run(node: subprocess.Popen, file: Path) -> int | None:
    """The SuperNode's exit code, or None once `file` is there and was shown."""
    while not file.exists():
        if node.poll() is not None:
            return node.returncode
        time.sleep(0.2)
    print(file.read_text(encoding="utf-8"), flush=True)
    print(f"Nothing was sent. The same is in `{file}`.", flush=True)
    time.sleep(_RESTART_SECONDS)  # for the SuperNode to tell the server so, which would wait for this client
    return None


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
