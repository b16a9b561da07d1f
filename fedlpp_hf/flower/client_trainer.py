# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer of one client: make it, describe it to the server, train a task with it.

The ClientApp, a new process for every message, imports this module, so nothing at its top may import torch.
"""

import os
from pathlib import Path
from typing import Any

from .client_settings import ClientSettings
from .errors import SayableError


def make_client_trainer(settings: ClientSettings, base_dir: str | os.PathLike) -> Any:
    """Make the trainer of a client from the base in `base_dir` and the rows in `settings.data`.

    Raises:
        ValueError: if the base contains a linear layer in full precision, the data or the client's policy can't be read, or the
            policy asks for record-level privacy that this trainer can't have.
    """
    from ..base.manifest import read_manifest
    from ..client.policy import ClientPolicy
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
    if settings.policy is not None:
        trainer.obey(ClientPolicy.read(settings.policy), settings.ledger_dir, settings.dry_run)
    trainer.dry_run_file = settings.dry_run_file if settings.dry_run else None
    trainer.sums = None
    if trainer.args.secure_aggregation:
        from ..client.sums import ClientSums
        from .peers import read_identity

        if not settings.warm:
            raise ValueError(
                "secure_aggregation=True with --cold: a client's keys are in the memory of its trainer alone, from its task to "
                "the end of the round. Leave --cold out."
            )
        gate = trainer.guard.gate
        trainer.sums = ClientSums(
            trainer.args,
            trainer.guard.initial,
            Path(settings.state_dir),
            read_identity(settings),
            None if gate is None else gate.policy.min_clients,
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
        RuntimeError: if the base has changed in memory, the client's policy refuses the task, the update may not be in the sum, or
            this is a dry run, which sends nothing.
    """
    from ..client.outgoing import describe_update
    from ..privacy.secure_sums.client import RefusedError
    from ..wire.messages import ClientTask

    trainer.guard.prove_base_unmoved()
    received = ClientTask.from_bytes(task)
    if trainer.dry_run_file is not None:
        try:
            text = describe_update(_train(trainer, received, task), trainer.guard.initial)
        except Exception as error:
            _show(trainer.dry_run_file, f"The task was not trained: {type(error).__name__}: {error}")
            raise
        _show(trainer.dry_run_file, text)
        raise SayableError("this client makes a dry run: it trained the task and sends nothing")
    update = _train(trainer, received, task)
    if name_answer(trainer) == "update":
        return update.to_bytes()
    try:
        return trainer.sums.begin(received, update)
    except RefusedError as error:
        raise SayableError(str(error)) from error


def _train(trainer: Any, task: Any, data: bytes) -> Any:
    if task.options.share_noise and name_answer(trainer) == "update":
        # The server refuses an update in the clear, too, but only once it has it.
        raise SayableError(
            "the task leaves the noise to the clients of a secure sum, and this client would send its update in the clear, "
            "without noise; set secure_aggregation=True at the client, too"
        )
    trainer.guard.admit(task)
    trainer.share("train", lambda: data)  # with the other ranks under `accelerate launch`
    return trainer.train_client(task)


def _show(file: Path, text: str) -> None:
    from ..tensors.atomic import write_atomically

    write_atomically(file, f"{text}\n".encode(), mode=0o600)


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
