# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a trainer gives the workers that train its clients beside it."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from ..client.guard import QuantizedBaseCallback
from ..client.memory import sweep_memories
from ..processes.blueprint import TrainerBlueprint
from ..processes.workers import ClientWorkers
from ..server.store import RoundStore
from ..tensors.codebooks import FULL_PRECISION
from .callbacks import EventHandler, means_rounds


_Parent: Any = Trainer if TYPE_CHECKING else object


class WorkersMixin(_Parent):
    """The part of [`FederatedMixin`] that starts and ends `client_workers`.

    `guard` keeps the clients' memories; `users_callbacks` are those that the trainer was made with, `own_callbacks` all it had then.
    """

    blueprint: TrainerBlueprint
    guard: QuantizedBaseCallback
    owner: Any
    raw_datasets: dict[str, Any]
    callback_handler: EventHandler
    users_callbacks: list[Any]
    own_callbacks: list[Any]
    rounds: Any

    def start_workers(self) -> ClientWorkers:
        """The processes of `client_workers`, which train a round's clients.

        Raises:
            ValueError: under a launch of several processes, and where the base is no directory that they could load.
        """
        args, blueprint = self.args, self.blueprint
        if args.world_size > 1:
            raise ValueError(
                f"client_workers={args.client_workers} in a launch of {args.world_size} processes, which train each "
                "client together. Launch one process, or set client_workers=1."
            )
        if not blueprint.base_dir and not (args.base_bits == FULL_PRECISION and blueprint.full_model):
            raise ValueError(
                f"client_workers={args.client_workers}: each loads the base; give `model` as the path of a base or of "
                "the full model, not as a model in memory."
            )
        # What is the owner's stays out of it.
        arguments = blueprint.trainer_arguments | {"callbacks": self._callbacks_of_runs()}
        theirs = dataclasses.replace(
            blueprint,
            owner_dataset=None,
            selection_dataset=None,
            client_datasets=self.raw_datasets,
            trainer_arguments=arguments,
        )
        if blueprint.base_dir:
            theirs = dataclasses.replace(theirs, full_model="")
        return ClientWorkers(theirs, args.client_workers, None, self._begin_client)

    def share_cores(self) -> None:
        """Let the owner work beside the clients only if they leave it cores."""
        if self.owner is not None:
            self.owner.works_ahead = leaves_cores(self.args, self.args.client_workers, torch.get_num_threads())

    def end_workers(self, workers: ClientWorkers) -> None:
        """Close the processes, and sweep what one that died has left of its clients' memories."""
        workers.close()
        if self.guard.memory_dir is not None:
            sweep_memories(self.guard.memory_dir, RoundStore(self.args.output_dir).latest() or 0)

    def _begin_client(self, client_id: str) -> None:
        if self.rounds is not None:
            self.rounds.begin_client(client_id)

    def _callbacks_of_runs(self) -> list[Any]:
        """The user's callbacks that local runs need in a worker, too: each worker has its copy."""
        here = self.callback_handler.callbacks
        passed = [entry for entry in here if any(entry is one or type(entry) is one for one in self.users_callbacks)]
        added = [entry for entry in here if entry not in self.own_callbacks]
        return [entry for entry in [*passed, *added] if not means_rounds(entry)]


def leaves_cores(args: TrainingArguments, workers: int, threads: int) -> bool:
    """Whether the clients leave the owner's process as many cores as it has threads.

    On a GPU they do not: without more said, both use the first one.

    Args:
        args: Of the trainer.
        workers: Processes that train clients.
        threads: Of this process, which trains them if there is one worker.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    owner = int(given) if given.isdecimal() else here
    taken = max(here // workers, 1) * workers if workers > 1 else threads * args.world_size
    return args.device.type == "cpu" and taken + owner <= here
