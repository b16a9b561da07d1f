# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf server` and `fedlpp-hf client`: start what a federation over Flower needs, and end all of it again."""

import contextlib
import fcntl
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .certificates import (
    CA_CERTIFICATE,
    NODE_PUBLIC_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    make_certificates,
    make_node_key,
)
from .trainer_process import ClientSettings, stop_trainer
from .version import check_flower


SERVER_FILE = "FEDLPP_HF_SERVER"  # as in flower.py, whose import needs Flower
SUPERLINK_PID, SUPERNODE_PID = "superlink.pid", "supernode.pid"
# In the commands of all that a SuperLink or SuperNode starts.
_FLOWERS = ("flower-super", "flwr-", "fedlpp_hf.flower.super")
_START_SECONDS, _END_SECONDS = 180.0, 15.0  # of a machine under load; idle, it takes 3 s
_CONNECTION = "fedlpp"
_APP = {
    "pyproject.toml": """\
[project]
name = "fedlpp-hf-app"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlpp-hf"

[tool.flwr.app.components]
serverapp = "fedlpp_app:server_app"
clientapp = "fedlpp_app:client_app"
""",
    "fedlpp_app.py": """\
from fedlpp_hf.flower import make_client_app, make_server_app


server_app = make_server_app()
client_app = make_client_app()
""",
}


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
    """Start a SuperLink, run the federation of `config` on it to its end, and end the SuperLink.

    `flags` override the configuration. `hosts` are the names by which clients call this machine, `client_keys` a
    directory with the public keys that they sent; `state_dir` gets certificates, logs and the SuperLink's database.

    Returns 0 only if the run completed: `flwr run --stream` alone returns 0 for a run that failed.

    Raises:
        ValueError: for arguments that don't fit together.
        RuntimeError: if the SuperLink or the run can't be started.
    """
    check_flower()
    state = Path(state_dir).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_insecure(insecure, listen)
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "fedlpp_hf.flower.superlink", "--host", listen, "--port", str(port)]
    command += ["--database", str(state / "superlink.db"), "--disable-runtime-dependency-installation"]
    connection = {"address": address, "insecure": insecure}
    if insecure:
        command += ["--insecure"]
    else:
        make_certificates(state, [*hosts, "127.0.0.1", "localhost"])
        files = [str(state / name) for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)]
        command += ["--ssl-ca-certfile", files[0], "--ssl-certfile", files[1], "--ssl-keyfile", files[2]]
        command += ["--enable-supernode-auth"]
        connection["root-certificates"] = files[0]
    _write_app(state, connection, config, flags)
    environment = _environment(state)
    _end_with_signal()
    with _running(command, environment, state / "superlink.log", state / SUPERLINK_PID) as superlink:
        _wait_for_port(port, superlink, state / "superlink.log")
        _register_clients(state, client_keys, environment)
        print(_what_clients_type(config, state, hosts, port, insecure), flush=True)
        return _run_app(state, environment)


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
    insecure: bool = False,
) -> int:
    """Be a client of the federation until interrupted: a SuperNode, restarted when it ends, and a trainer on demand.

    `data` holds the rows, `certificate` is the server's `ca.crt`; `state_dir` gets the node's key and the logs. `base` names
    a copy of the base, where it does not come from the server. With `cold`, there is no long-lived trainer.

    Raises:
        ValueError: for arguments that don't fit together.
    """
    check_flower()
    client_id = client_id or Path(data).stem
    state = Path(state_dir or f"flower-{client_id}").resolve()
    _check_insecure(insecure, server.rsplit(":", 1)[0])
    if not Path(data).exists():
        raise ValueError(f"data='{data}' does not exist.")
    launch = [] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    settings = ClientSettings(
        config=str(Path(config).resolve()),
        data=str(Path(data).resolve()),
        client_id=client_id,
        state_dir=str(state),
        cache_dir=str(Path(cache_dir).expanduser().resolve()),
        flags=list(flags),
        base=base,
        warm=not cold,
        launch=launch,
        parent=os.getpid(),
    )
    with socket.socket() as probe:  # the ClientApp's way to the SuperNode, on loopback
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fedlpp_hf.flower.supernode", "--superlink", server]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--node-config", f'settings="{settings.write()}"']
    if insecure:
        command += ["--insecure"]
    else:
        key = make_node_key(state)
        print(
            f"This client's key is `{state / NODE_PUBLIC_KEY}`. Send that file to the server's owner, who puts it as "
            f"`{client_id}.pub` into the directory of --client_keys.",
            flush=True,
        )
        if certificate is None or not Path(certificate).is_file():
            raise ValueError(
                f"--certificate is `{certificate}`; expected the ca.crt that the server's owner sends you."
            )
        command += ["--root-certificates", str(Path(certificate).resolve()), "--auth-supernode-private-key", str(key)]
    environment = _environment(state)
    _end_with_signal()
    try:
        while True:
            with _running(command, environment, state / "supernode.log", state / SUPERNODE_PID) as node:
                code = node.wait()
            print(
                f"The SuperNode ended with code {code} and starts again in 5 s. Is the server up, and does it know this "
                f"client's key? See `{state / 'supernode.log'}`.",
                flush=True,
            )
            time.sleep(5)
    except KeyboardInterrupt:
        return 130
    finally:
        stop_trainer(settings)


def _check_insecure(insecure: bool, host: str) -> None:
    try:
        local = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = False
    if insecure and not local:
        raise ValueError(
            f"--insecure with `{host}`: without TLS and keys only loopback is allowed. Leave --insecure out."
        )


def _environment(state: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # a second by default, in every message
        SERVER_FILE: str(state / "server.json"),
        # Flower finds its own commands by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def _write_app(state: Path, connection: dict[str, Any], config: str, flags: Sequence[str]) -> None:
    for name, text in _APP.items():
        (state / "app").mkdir(exist_ok=True)
        (state / "app" / name).write_text(text, encoding="utf-8")
    lines = [f"{name} = {json.dumps(value)}" for name, value in connection.items()]
    (state / "flwr").mkdir(exist_ok=True)
    (state / "flwr" / "config.toml").write_text(
        "\n".join(["[superlink]", f'default = "{_CONNECTION}"', f"[superlink.{_CONNECTION}]", *lines, ""])
    )
    server = {"config": str(Path(config).resolve()), "flags": list(flags)}
    (state / "server.json").write_text(json.dumps(server, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], log: Path, pid_file: Path
) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, which is ended as a whole: a ServerApp can outlive its SuperLink, and a ClientApp
    that waits for its trainer its SuperNode. The group of one that was killed before it could do so is ended first."""
    with open(pid_file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"`{pid_file.parent}` is in use: a server or client that runs has it as its --state_dir. End that one, or "
                "give this one a directory of its own."
            ) from None
        _end_group(pid_file)
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        pid_file.write_text(str(process.pid))
        try:
            yield process
        finally:
            _end_group(pid_file)
            process.wait()


def _end_group(pid_file: Path) -> None:
    """End Flower's processes in the group whose id a file holds; whatever else has that id by now is spared."""
    if not pid_file.exists():
        return
    group, asked = pid_file.read_text(), set[int]()
    deadline = time.monotonic() + _END_SECONDS
    while members := _find_members(group):
        late = time.monotonic() > deadline
        for pid in members if late else members - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= members
        time.sleep(0.1)
    pid_file.unlink()


def _find_members(group: str) -> set[int]:
    ps = ["ps", "-A", "-ww", "-o", "pgid=", "-o", "pid=", "-o", "stat=", "-o", "command="]
    listed = subprocess.run(ps, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    found = set()
    for line in listed.splitlines():
        pgid, pid, state, command = [*line.split(None, 3), ""][:4]
        # The dead stay listed until their parent asks for them.
        if pgid == group and state[0] != "Z" and any(word in command for word in _FLOWERS):
            found.add(int(pid))
    return found


def _wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"The SuperLink did not start on port {port}; see `{log}`.")


def _flwr(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = ["flwr", *arguments, "--format", "json"]
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    place = result.stdout.find("{")
    try:
        return json.loads(result.stdout[place:])
    except ValueError:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stdout}{result.stderr}") from None


def _register_clients(state: Path, client_keys: str | None, environment: dict[str, str]) -> None:
    known = state / "registered"
    known.mkdir(exist_ok=True)
    for path in sorted(Path(client_keys).glob("*.pub")) if client_keys else ():
        text = path.read_text()
        if any(text == seen.read_text() for seen in known.iterdir()):
            continue
        answer = _flwr(environment, "supernode", "register", str(path), _CONNECTION, "--name", path.stem)
        if not answer.get("success"):
            raise RuntimeError(f"The key `{path}` can't be registered: {answer}")
        (known / path.name).write_text(text)


def _run_app(state: Path, environment: dict[str, str]) -> int:
    answer = _flwr(environment, "run", str(state / "app"), _CONNECTION)
    if not answer.get("success"):
        raise RuntimeError(f"The run can't be started: {answer}")
    run = str(answer["run-id"])
    subprocess.run(["flwr", "log", run, _CONNECTION, "--stream"], env=environment, stdin=subprocess.DEVNULL)
    while True:
        [status] = _flwr(environment, "list", _CONNECTION, "--run-id", run)["runs"]
        if status["status"].startswith("finished"):
            print(f"Run {run}: {status['status']}.", flush=True)
            return 0 if status["status"] == "finished:completed" else 1
        time.sleep(2)


def _end_with_signal() -> None:
    """Let a plain `kill` run the clean-up, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _what_clients_type(config: str, state: Path, hosts: Sequence[str], port: int, insecure: bool) -> str:
    address = f"{hosts[0] if hosts else '127.0.0.1'}:{port}"
    command = f"fedlpp-hf client --config {Path(config).name} --data ROWS.jsonl --server {address}"
    if insecure:
        return f"Clients start: {command} --insecure"
    return (
        f"Clients start: {command} --certificate ca.crt\n"
        f"They need `{state / CA_CERTIFICATE}`, and you need their node.pub in the directory of --client_keys."
    )
