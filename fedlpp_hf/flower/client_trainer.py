# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer of one client: make it, describe it to the server, train a task with it.

The ClientApp, a new process for every message, imports this module, so nothing at its top may import torch.
"""

import os
from pathlib import Path
from typing import Any

from .client_settings import ClientSettings


def make_client_trainer(settings: ClientSettings, base_dir: str | os.PathLike) -> Any:
    """Make the trainer of a client from the base in `base_dir` and the rows in `settings.data`.

    Raises:
        ValueError: if the base contains a linear layer in full precision, or the data can't be read.
    """
    from ..base.manifest import read_manifest
    from ..config.federated import FederatedConfig
    from ..config.options import options_beside
    from .loading import load_rows, load_trainer

    exposed = read_manifest(base_dir)["full_precision_linears"]
    if exposed:
        raise ValueError(
            f"The base in `{base_dir}` contains {len(exposed)} linear layers in full precision ({exposed[0]}); this client "
            "rejects it. Ask the owner for a base exported with fewer `embedding_bits`."
        )
    overrides = {name: value for name, value in options_beside(FederatedConfig).items() if name != "log_json"}
    overrides |= {
        "output_dir": str(Path(settings.state_dir) / "trainer"),
        "clients_per_round": None,  # and the next: of the federation, which has more clients than are here
        "min_clients": 1,
    }
    rows = {settings.client_id: load_rows(settings.data)}
    trainer, _ = load_trainer(
        settings.config, settings.flags, model=str(base_dir), train_dataset=rows, overrides=overrides
    )
    return trainer


def describe_trainer(trainer: Any) -> dict[str, Any]:
    """The trainer's client ids with their numbers of rows, its base, and its process id."""
    rows = {client: len(dataset) for client, dataset in trainer.client_datasets.items()}
    return {"clients": rows, "base": trainer.guard.fingerprint, "pid": os.getpid()}


def train_task(trainer: Any, task: bytes) -> bytes:
    """Train one client's task: the bytes of a [`ClientTask`] in, those of a [`ClientUpdate`] out.

    Raises:
        RuntimeError: if the base has changed in memory.
    """
    from ..wire.messages import ClientTask

    trainer.guard.prove_base_unmoved()
    trainer.share("train", lambda: task)  # with the other ranks under `accelerate launch`
    return trainer.train_client(ClientTask.from_bytes(task)).to_bytes()
