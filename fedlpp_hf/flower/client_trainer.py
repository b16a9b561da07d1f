# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer of one client: make it, describe it to the server, train a task with it.

The ClientApp, a new process for every message, imports this module, so nothing at its top may import torch.
"""

import logging
import os
from pathlib import Path
from typing import Any

from .client_settings import ClientSettings
from .errors import SayableError


logger = logging.getLogger(__name__)


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
    overrides = options_beside(FederatedConfig) | {
        "output_dir": str(Path(settings.state_dir) / "trainer"),
        "clients_per_round": None,  # and the next: of the federation, which has more clients than are here
        "min_clients": 1,
    }
    rows = {settings.client_id: load_rows(settings.data)}
    trainer, _ = load_trainer(
        settings.config, settings.flags, model=str(base_dir), train_dataset=rows, overrides=overrides
    )
    trainer.sums = None
    if trainer.args.secure_aggregation:
        from ..client.sums import ClientSums
        from .peers import read_identity

        if not settings.warm:
            raise ValueError(
                "secure_aggregation=True with --cold: a client's keys are in the memory of its trainer alone, from its task to "
                "the end of the round. Leave --cold out."
            )
        trainer.sums = ClientSums(
            trainer.args, trainer.guard.initial, Path(settings.state_dir), read_identity(settings)
        )
    return trainer


def describe_trainer(trainer: Any) -> dict[str, Any]:
    """The trainer's client ids with their numbers of rows, its base, and its process id.

    Under secure aggregation the numbers of rows stay with the client.
    """
    hidden = name_answer(trainer) == "sum"
    rows = {client: None if hidden else len(dataset) for client, dataset in trainer.client_datasets.items()}
    return {"clients": rows, "base": trainer.guard.fingerprint, "pid": os.getpid()}


def name_answer(trainer: Any) -> str:
    """What a client answers its task with: an `update`, or, by its own options, what belongs to a `sum`."""
    return "update" if getattr(trainer, "sums", None) is None else "sum"


def train_task(trainer: Any, task: bytes) -> bytes:
    """Train one client's task: the bytes of a [`ClientTask`] in, those of a [`ClientUpdate`] out.

    Under secure aggregation no update leaves: what comes out are the client's keys of the round's sum.

    Raises:
        RuntimeError: if the base has changed in memory, or the update may not be in the sum.
    """
    from ..privacy.secure_sums.client import RefusedError
    from ..wire.messages import ClientTask

    trainer.guard.prove_base_unmoved()
    trainer.share("train", lambda: task)  # with the other ranks under `accelerate launch`
    given = ClientTask.from_bytes(task)
    update = trainer.train_client(given)
    if name_answer(trainer) == "update":
        return update.to_bytes()
    try:
        return trainer.sums.begin(given, update)
    except RefusedError as error:
        raise SayableError(str(error)) from error


def answer_sum(trainer: Any, client: str, step: str, request: bytes) -> bytes:
    """Answer the next request of the sum under way.

    Args:
        trainer: of the client.
        client: its id.
        step: as in [`SumClient.answer`].
        request: the server's message.

    Raises:
        RuntimeError: if the client refuses; the text says why.
    """
    from ..privacy.secure_sums.client import RefusedError

    if name_answer(trainer) == "update":
        raise SayableError("this client's options have no secure_aggregation")
    try:
        return trainer.sums.answer(client, step, request)
    except RefusedError as error:
        raise SayableError(str(error)) from error
