# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Control a running SuperLink through Flower's command `flwr`: register clients, start the app, wait for its end."""

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tensors.atomic import write_atomically
from .client_keys import read_public_key
from .installed_app import APP_FILES
from .repeating import repeating


_CONNECTION = "fedlpp"
_WATCH_SECONDS = 2.0


def write_app(
    state_dir: Path, connection: dict[str, Any], config: str, flags: Sequence[str], client_keys: str | None
) -> None:
    """Write into `state_dir` what the other functions, the ServerApp and the gate read.

    Args:
        state_dir: the server's directory; gets `app/`, `flwr/config.toml` and `server.json`.
        connection: how `flwr` reaches the SuperLink: `address`, `insecure` and perhaps `root-certificates`.
        config: YAML file of the federation.
        flags: flags that override it.
        client_keys: directory of the clients' keys; None where ids are not bound to keys.
    """
    (state_dir / "app").mkdir(exist_ok=True)
    for name, text in APP_FILES.items():
        (state_dir / "app" / name).write_text(text, encoding="utf-8")
    lines = [f"{name} = {json.dumps(value)}" for name, value in connection.items()]
    (state_dir / "flwr").mkdir(exist_ok=True)
    (state_dir / "flwr" / "config.toml").write_text(
        "\n".join(["[superlink]", f'default = "{_CONNECTION}"', f"[superlink.{_CONNECTION}]", *lines, ""])
    )
    server: dict[str, Any] = {"config": str(Path(config).resolve()), "flags": list(flags)}
    if client_keys is not None:
        server["client_keys"] = str(Path(client_keys).resolve())
    (state_dir / "server.limit").unlink(missing_ok=True)  # of another adapter, perhaps
    (state_dir / "server.json").write_text(json.dumps(server, indent=2) + "\n", encoding="utf-8")


def register_clients(state_dir: Path, client_keys: str | None, environment: dict[str, str]) -> None:
    """Register the keys in the `*.pub` files of `client_keys` that are not registered yet.

    Raises:
        ValueError: if a file holds no key.
        RuntimeError: if Flower refuses one.
    """
    registered = state_dir / "registered"
    registered.mkdir(exist_ok=True)
    seen = {read_public_key(path) for path in registered.glob("*.pub")}
    for path in sorted(Path(client_keys).glob("*.pub")) if client_keys else ():
        if (key := read_public_key(path)) in seen:
            continue
        answer = _flwr(environment, "supernode", "register", str(path), _CONNECTION, "--name", path.stem)
        if not answer.get("success"):
            raise RuntimeError(f"The key `{path}` can't be registered: {answer}")
        seen.add(key)
        write_atomically(registered / path.name, path.read_bytes())


def watch_keys(
    state_dir: Path, client_keys: str | None, environment: dict[str, str]
) -> contextlib.AbstractContextManager[None]:
    """Register keys that are added meanwhile. Those that are removed need nothing here: the gate reads the directory."""
    if client_keys is None:
        return contextlib.nullcontext()
    told = ""

    def watch() -> None:
        nonlocal told
        try:
            register_clients(state_dir, client_keys, environment)
        except (ValueError, RuntimeError, OSError) as error:
            if str(error) != told:  # the owner may be writing the file; it is tried again
                told = str(error)
                print(told, flush=True)

    return repeating(watch, _WATCH_SECONDS)


def run_app(state_dir: Path, environment: dict[str, str]) -> int:
    """Run the app that [`write_app`] wrote, and print its log; returns 0 if it completed, else 1.

    Raises:
        RuntimeError: if the run can't be started.
    """
    answer = _flwr(environment, "run", str(state_dir / "app"), _CONNECTION)
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


def _flwr(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = ["flwr", *arguments, "--format", "json"]
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    start = result.stdout.find("{")
    try:
        return json.loads(result.stdout[start:])
    except ValueError:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stdout}{result.stderr}") from None
