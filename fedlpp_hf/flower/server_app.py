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
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .base_copies import Bases, CommonBase, MarkedCopies
from .client_keys import ClientKeys, name_holder
from .clients import FlowerClients
from .environment import SERVER_FILE, check_flower
from .fleet_limits import write_limit
from .patience import make_patient_
from .sums import limit_sum, sum_over_flower


if TYPE_CHECKING:
    from .loading import NetworkConfig

logger = logging.getLogger(__name__)


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
        # On a busy machine a handshake with the SuperLink beside it can time out, which would end the run. The name is private;
        # a Flower without it is as impatient as before.
        if (invoker := getattr(grid, "_retry_invoker", None)) is not None:
            make_patient_(invoker)
        if SERVER_FILE not in os.environ:
            raise ValueError(f"{SERVER_FILE} is not set in the SuperLink's environment; `fedlpp-hf server` sets it.")
        path = Path(os.environ[SERVER_FILE])
        settings = json.loads(path.read_text(encoding="utf-8"))
        with _write_pid(path.with_suffix(".pid")):
            directory = settings.get("client_keys")
            keys = None if directory is None else ClientKeys(directory)
            run_federation(grid, settings["config"], settings["flags"], keys)

    return app


def run_federation(grid: Grid, config: str, flags: list[str], keys: ClientKeys | None = None) -> None:
    """Make the server's trainer, wait for the clients, run or resume the rounds, and merge at the end.

    Args:
        grid: Flower's.
        config: YAML file of the federation.
        flags: flags that override it.
        keys: which ids each node may announce; None where ids are free.

    Raises:
        ValueError: if the configuration is wrong.
        RuntimeError: if too few clients join, or a round gets too few updates.
    """
    from ..server.store import RoundStore
    from ..wire.messages import limit_update
    from .loading import is_given, load_trainer

    overrides = {}
    if not is_given(config, flags, "weighting"):
        overrides["weighting"] = "uniform"
        logger.info(
            "weighting: uniform. Each client names its own number of rows; to weigh by it, set `weighting: examples`."
        )
    if keys is None:
        logger.warning("Client ids are not bound to keys: whoever connects first as a client is that client.")
    trainer, network = load_trainer(config, flags, model=None, train_dataset={}, overrides=overrides)
    args = trainer.args
    store = RoundStore(args.output_dir)
    limit = limit_update(trainer.guard.initial)
    secure = args.secure_aggregation
    write_limit(limit_sum(limit.num_bytes, args.num_clients) if secure else limit.num_bytes)
    bases = _find_bases(trainer, network, store.root, keys)
    clients = FlowerClients(
        grid, network, bases, limit, round_timeout=args.round_timeout, keys=keys, hides_rows=secure
    )
    with trainer.steering.listen(clients.find_network, clients.attend):
        if args.resume_from_checkpoint and store.latest() is not None:
            # The same clients as at the start, whoever is connected now: sampling depends on them.
            known = store.read()["clients"]
            num_examples = clients.gather(len(known), at_least=args.min_clients, known=known)
        else:
            num_examples = clients.gather(args.num_clients)
        train = (
            sum_over_flower(args, trainer.guard.initial, clients, trainer.count_opening) if secure else clients.train
        )
        trainer.train_remotely(train, num_examples, args.resume_from_checkpoint)


def _find_bases(trainer: Any, network: "NetworkConfig", directory: Path, keys: ClientKeys | None) -> Bases:
    exported = directory / "base"
    base_dir = exported if network.base is None or trainer.owner is not None else Path(network.base)
    if network.mark_key is None:
        return CommonBase(base_dir, directory / "base.packed")
    given = f"mark_key={network.mark_key!r}"
    if keys is None:
        raise ValueError(
            f"{given}: without --client_keys nobody knows whose copy a node is sent. Leave --insecure out."
        )
    if trainer.owner is None:
        raise ValueError(f"{given}: copies are made of the full model; set `full_model`, and not `base`.")
    copies = MarkedCopies(directory / "copies", trainer.owner, network.mark_key, trainer.guard.fingerprint)
    copies.forget_others(name_holder(ids) for ids in keys.list_holders())
    return copies


@contextlib.contextmanager
def _write_pid(path: Path) -> Iterator[None]:
    # A ServerApp can outlive its SuperLink; with the id it can be ended.
    path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
