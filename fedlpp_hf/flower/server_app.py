# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ServerApp: the federation's rounds, with clients that Flower reaches.

Flower is the transport only. The rounds, their state and the rules for updates are those of [`FederatedServer`], so a
federation over Flower gives the same bits as one in a single process.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .base_transfer import PackedBase
from .clients import FlowerClients
from .environment import SERVER_FILE, check_flower


def make_server_app() -> ServerApp:
    """The ServerApp; it runs the federation described in the file that the variable `FEDLPP_HF_SERVER` names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # Only this package's log: the root logger would also show a line for every request of Flower's HTTP client.
        log = logging.getLogger(__package__)
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
        log.propagate = False
        check_flower()
        if SERVER_FILE not in os.environ:
            raise ValueError(f"{SERVER_FILE} is not set in the SuperLink's environment; `fedlpp-hf server` sets it.")
        path = Path(os.environ[SERVER_FILE])
        settings = json.loads(path.read_text(encoding="utf-8"))
        with _write_pid(path.with_suffix(".pid")):
            run_federation(grid, settings["config"], settings["flags"])

    return app


def run_federation(grid: Grid, config: str, flags: list[str]) -> None:
    """Make the server's trainer, wait for the clients, run or resume the rounds, and merge at the end.

    Raises:
        ValueError: if the configuration is wrong.
        RuntimeError: if too few clients join, or a round gets too few updates.
    """
    from ..server.store import FEDERATION_DIR, RoundStore
    from .loading import load_trainer

    trainer, network = load_trainer(config, flags, model=None, train_dataset={})
    args = trainer.args
    store = RoundStore(args.output_dir)
    directory = store.output_dir / FEDERATION_DIR
    exported = directory / "base"
    base_dir = exported if network.base is None or trainer.owner is not None else network.base
    base = PackedBase(base_dir, directory / "base.packed")
    clients = FlowerClients(grid, network, base, args.round_timeout)
    if args.resume_from_checkpoint and store.latest() is not None:
        # The same clients as at the start, whoever is connected now: sampling depends on them.
        num_examples = store.read()["clients"]
        clients.gather(len(num_examples), at_least=args.min_clients)
    else:
        num_examples = clients.gather(args.num_clients)
    trainer.train_remotely(clients.train, num_examples, args.resume_from_checkpoint)


@contextlib.contextmanager
def _write_pid(path: Path) -> Iterator[None]:
    # A ServerApp can outlive its SuperLink; with the id it can be ended.
    path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
