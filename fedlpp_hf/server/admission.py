# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which updates a round takes. Nothing from a client is trusted: each is checked, or rejected by its client's name."""

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.clipping import check_norm
from ..privacy.secure_sums.rounds import RoundSum
from ..tensors.files import TensorFile, close_files
from ..wire.compression import decompress_update
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from ..wire.text import make_printable


_MAX_EXAMPLES = 2**53  # from there on a float64 skips numbers
_MAX_STEPS = 10**9  # of a client in one round


@dataclass(frozen=True, slots=True)
class AcceptedUpdate:
    """What a round keeps of an update: `delta` is in the server's shapes, float32; `num_bytes` is of the message.

    `num_examples` is None where the server does not learn it.
    """

    num_examples: int | None
    metrics: dict[str, float]
    num_bytes: int
    delta: TensorFile


class Admission:
    """Checks the answers to a round's tasks, and keeps the accepted updates in files under `updates_dir`.

    Memory is flat in the number of clients: one update is held at a time. `adapter` gives keys and shapes;
    `num_examples` maps each client to its number of rows, where the server knows them, else to None.

    Raises:
        ValueError: for a number of rows that is none, or an id that can't be stored.
    """

    def __init__(
        self,
        args: FederatedConfig,
        adapter: Mapping[str, torch.Tensor],
        num_examples: Mapping[str, int | None],
        updates_dir: Path,
    ):
        check_clients(num_examples)
        self.args = args
        self.shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in adapter.items()}
        self.num_examples = num_examples
        self.updates_dir = updates_dir
        # What the round under way has cost: by client that was asked, bytes down, bytes up of an accepted update, and seconds
        # from its run's begin to its answer, None without one.
        self.traffic: dict[str, dict[str, Any]] = {}
        self.report: dict[str, Any] = {}  # what else the round's record says of its updates
        self.rejected: dict[str, str] = {}  # of the round under way, with the reasons
        self._began: dict[str, float] = {}

    def begin(self, client_id: str) -> None:
        """Time a client from now on. One whose run begins elsewhere is timed from the moment the tasks went out."""
        self._began[client_id] = time.perf_counter()

    def collect(
        self, tasks: Mapping[str, ClientTask], answers: Iterable[ClientUpdate | ClientFailure | RoundSum]
    ) -> tuple[dict[str, AcceptedUpdate], dict[str, str]]:
        """Acceptable updates in the order of the tasks, and the reason for every client without one.

        The files are there until the next call, or [`forget`].
        """
        self.forget()
        self.updates_dir.mkdir(parents=True)
        self._began = dict.fromkeys(tasks, time.perf_counter())
        self.traffic = {
            client: {"bytes_down": task.num_bytes, "bytes_up": 0, "seconds": None} for client, task in tasks.items()
        }
        accepted: dict[str, AcceptedUpdate] = {}
        rejected: dict[str, str] = {}
        self.rejected = rejected
        # Poisson sampling may ask more than `clients_per_round` as well.
        wanted = (self.args.over_sample and self.args.clients_per_round) or len(tasks)
        for answer in answers:
            if isinstance(answer, RoundSum):
                raise ValueError("The clients sum their updates, but here secure_aggregation=False; set it to True.")
            client = answer.client_id
            if client in tasks and client not in accepted:
                self.traffic[client]["seconds"] = round(time.perf_counter() - self._began[client], 3)
            if client not in tasks:
                rejected[client] = "it was not asked in this round"
            elif isinstance(answer, ClientFailure):
                rejected[client] = answer.reason
            elif client in accepted:
                rejected[client] = "it answered twice"
            else:
                try:
                    delta = self.open_update(answer, tasks[client])
                except ValueError as error:
                    rejected[client] = make_printable(str(error))  # it quotes what the client sent
                    continue
                # By number: what a client is called must never become a path.
                file = self.updates_dir / f"{len(accepted):05d}.safetensors"
                save_file(delta, file)
                self.traffic[client]["bytes_up"] = answer.num_bytes
                accepted[client] = AcceptedUpdate(
                    answer.num_examples, answer.metrics, answer.num_bytes, TensorFile(file)
                )
            if len(accepted) == wanted < len(tasks):
                break  # over-sampled: the round closes with those who were first
        for client in tasks:
            if client not in accepted and client not in rejected:
                rejected[client] = "the round closed without it" if len(accepted) == wanted else "it did not answer"
        return {client: accepted[client] for client in tasks if client in accepted}, rejected

    def sweep(self, done: int) -> None:
        """Delete what a killed run left; `done` is the last round that it committed."""
        self.forget()

    def forget(self) -> None:
        """Delete the updates that are kept: they are the clients', and of no use once their round is committed."""
        close_files()
        shutil.rmtree(self.updates_dir, ignore_errors=True)

    def open_update(self, update: ClientUpdate, task: ClientTask) -> dict[str, torch.Tensor]:
        """The update as tensors in the server's shapes.

        Raises:
            ValueError: for whatever makes it unacceptable.
        """
        for name in ("federation_id", "round", "base_fingerprint"):
            if getattr(update, name) != getattr(task, name):
                raise ValueError(f"its {name} is {getattr(update, name)!r}; the task's is {getattr(task, name)!r}")
        limit = self.num_examples.get(update.client_id)
        limit = _MAX_EXAMPLES if limit is None else limit
        if not 1 <= update.num_examples <= limit:
            raise ValueError(f"it claims {update.num_examples} examples; expected 1 to {limit}")
        for name in ("loss", "steps"):
            if name not in update.metrics:
                raise ValueError(f"its metrics have no `{name}`; expected `loss` and `steps`")
        if not 1 <= update.metrics["steps"] <= _MAX_STEPS:
            raise ValueError(f"it claims {update.metrics['steps']} steps; expected 1 to {_MAX_STEPS}")
        trained = {key: self.shapes[key] for key in trainable_keys(self.args.aggregation, self.shapes)}
        delta = decompress_update(update.delta, trained)
        if self.args.max_update_norm is not None:
            check_norm(delta, self.args.max_update_norm)
        return delta


def check_clients(num_examples: Mapping[str, int | None]) -> None:
    """Refuse what a federation could not store, weigh by, or resume with.

    Raises:
        ValueError: naming the client.
    """
    for client, count in num_examples.items():
        if type(client) is not str or not client or any("\ud800" <= letter <= "\udfff" for letter in client):
            raise ValueError(f"{client!r:.120} is no client id; expected text that can be stored as UTF-8.")
        if count is not None and (type(count) is not int or not 0 <= count <= _MAX_EXAMPLES):
            raise ValueError(
                f"Client {client!r:.120} has {count!r:.40} rows; expected a number from 0 to {_MAX_EXAMPLES}, or None where it "
                "is unknown."
            )
