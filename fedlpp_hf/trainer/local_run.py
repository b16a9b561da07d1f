# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""One client's run through the Trainer's own `train()`, and what makes many of them in one process cheap."""

import gc
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import set_seed
from transformers.integrations.neftune import deactivate_neftune
from transformers.utils import logging

from ..client.gate import ClientGate
from ..client.guard import BaseMovedError, QuantizedBaseCallback
from ..client.policy import ClientPolicy
from ..processes.workers import failure_reason, late_reason
from ..report.metrics import keep_values
from ..tensors.adapters import load_adapter_
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .callbacks import EventHandler
from .record_run import RecordRunMixin
from .rounds import Rounds


logger = logging.get_logger(__name__)

_FREEZE_EVERY = 100  # clients
_TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second", "model_preparation_time")


class LocalRunMixin(RecordRunMixin):
    """The part of [`FederatedMixin`] that is a client.

    `client_datasets` maps client ids to rows that are ready to train on; `guard` is the [`QuantizedBaseCallback`].
    """

    client_datasets: dict[str, Any]
    guard: QuantizedBaseCallback
    callback_handler: EventHandler
    rounds: Rounds | None  # of the federation that runs, or has run
    neftune_hook_handle: Any

    def prepare_local_runs(self) -> None:
        """Set up what runs share. Called once, when the trainer is made."""
        self.rounds = None
        self.callback_handler = EventHandler.of(self.callback_handler)
        self.own_callbacks = list(self.callback_handler.callbacks)  # those that a trainer elsewhere makes by itself
        self._skipped: set[str] = set()  # metrics that are no values
        self._horizon = (0, 1)
        self._decay_names: list[str] | None = None
        self._trimmed: set[str] = set()  # clients whose rows have only the columns that the model takes

    def obey(self, policy: ClientPolicy, ledger_dir: str | os.PathLike, dry_run: bool = False) -> None:
        """Hold this trainer's client to a policy of its own, whatever its tasks say.

        Args:
            policy: The client's.
            ledger_dir: Directory for the client's ledger; it must stay between runs.
            dry_run: Count nothing, because nothing will be sent.

        Raises:
            ValueError: if several clients are here, or the policy asks for record-level privacy that can't be had.
        """
        if len(self.client_datasets) != 1:
            raise ValueError(f"A policy is of one client, and this trainer has {len(self.client_datasets)}.")
        self.guard.gate = ClientGate(policy, Path(ledger_dir), dry_run, self.args.secure_aggregation)
        if policy.record_budget is not None:
            self.check_record_training()

    def train_client(self, task: ClientTask, rows: Any = None) -> ClientUpdate:
        """One client's local run: from the task's proxy, on the client's rows, by the parent's `train()`.

        Args:
            task: What to start from and how to train.
            rows: Prepared rows to train on instead of the client's, as the audit's attackers do.

        Raises:
            ValueError: if the task is for another base, or for a client whose rows are not here.
        """
        if rows is None and task.client_id not in self.client_datasets:
            raise ValueError(
                f"The task is for client {task.client_id!r}, but this process has rows of "
                f"{list(self.client_datasets)!r:.200} only. Send the task to its client, or add that client to "
                "`train_dataset`."
            )
        self.train_dataset = self.client_datasets[task.client_id] if rows is None else rows
        # A fresh sampler seeds itself from both: with one alone every client would see the order of the first.
        set_seed(task.seed)
        self.accelerator.dataloader_config.data_seed = task.seed
        self.optimizer = self.lr_scheduler = None
        self.guard.accept(task)
        federation = self.args.learning_rate_horizon == "federation"
        self._horizon = (task.round - 1, task.num_rounds) if federation else (0, 1)
        self._forget_run()
        # The samplers of TRL's online trainers and of sentence-transformers start at this seed.
        seed, self.args.seed = self.args.seed, task.seed
        try:
            with self.record_run(is_client=rows is None), self.callback_handler.local_run():
                super().train()
        finally:
            self.args.seed = seed
        if self.guard.update is None:
            raise RuntimeError("The local run ended without an update; was QuantizedBaseCallback removed?")
        return self.guard.update

    def _forget_run(self) -> None:
        """Drop what TRL's online trainers keep from run to run: completions of the client before, and their place in them."""
        for name, value in (("_buffered_inputs", None), ("_step", 0), ("_last_loaded_step", -1)):
            if name in vars(self):
                setattr(self, name, value)

    def train_clients(self, tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """An answer to each of `tasks`, one after the other in this process. A run that raises costs its client alone."""
        began, timeout = time.monotonic(), self.args.round_timeout
        for place, task in enumerate(tasks, 1):
            if timeout is not None and time.monotonic() - began > timeout:
                yield ClientFailure(task.client_id, late_reason(timeout))
                continue
            self.share("train", task.to_bytes)
            if self.rounds is not None:
                self.rounds.begin_client(task.client_id)
            yield self._try_client(task)
            if place % _FREEZE_EVERY == 0:
                # What is kept of each client would be walked in every later run. The last run's optimizer must not be
                # among it: what is frozen is not collected.
                self._drop_run()
                gc.freeze()

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on: rows, or an evaluator of sentence-transformers."""
        return self.eval_dataset is not None or getattr(self, "evaluator", None) is not None

    def _try_client(self, task: ClientTask) -> ClientUpdate | ClientFailure:
        try:
            return self.train_client(task)
        except BaseMovedError:
            raise  # all later clients train on it
        except Exception as error:
            if self.args.world_size > 1:
                raise  # the other ranks are in the middle of the run, and would wait for this one for ever
            reason = failure_reason(error)
            logger.warning(f"Client {task.client_id!r}: {reason}\n{traceback.format_exc()}")
        # After the exception is gone, and with it what its frames hold.
        self.is_in_train = False
        if getattr(self, "neftune_hook_handle", None) is not None:
            deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
            self.neftune_hook_handle = None
        self.model.zero_grad()
        self._drop_run()
        self.guard.prove_base_unmoved()
        return ClientFailure(task.client_id, reason)

    def _drop_run(self) -> None:
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()

    def evaluate_metrics(self, eval_dataset: Any = None) -> dict[str, Any]:
        """The trainer's evaluation without its timings, and without what JSON can't hold; empty without a dataset."""
        if eval_dataset is None and not self.evaluates:
            return {}
        set_seed(self.args.seed)  # TRL's online trainers sample completions to evaluate
        with self.callback_handler.silence():
            metrics = self.evaluate(eval_dataset)
        metrics = {key: value for key, value in metrics.items() if key != "epoch" and not key.endswith(_TIMINGS)}
        kept = keep_values(metrics)
        if skipped := metrics.keys() - kept.keys() - self._skipped:
            self._skipped |= skipped
            logger.warning(
                f"Metrics that are left out, since JSON can't hold them: {', '.join(sorted(skipped))}. Return numbers, text, "
                "lists or dicts from compute_metrics."
            )
        return kept

    def evaluate_proxy(self, adapter: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of what a client would hold: the base with `adapter`."""
        load_adapter_(self.guard.parameters, adapter)
        return self.evaluate_metrics()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The local schedule, or this round's part of one that runs over the federation."""
        place, rounds = self._horizon
        scheduler = super().create_scheduler(num_training_steps * rounds, optimizer)
        if rounds > 1:
            start_schedule_at_(scheduler, place * num_training_steps)
        return scheduler

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """The parent's, once for each client: every call makes `datasets` take a fingerprint of the table."""
        client = None if self.guard.task is None else self.guard.task.client_id
        if client is None or dataset is not self.client_datasets.get(client):
            return super()._remove_unused_columns(dataset, description)
        if client not in self._trimmed:
            self.client_datasets[client] = self.train_dataset = super()._remove_unused_columns(dataset, description)
            self._trimmed.add(client)
        return self.train_dataset

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The parent's, found once: it walks the whole model, and each client's run makes a new optimizer."""
        if self._decay_names is None:
            self._decay_names = super().get_decay_parameter_names(model)
        return self._decay_names

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """The parent's, of what the optimizer steps: it would ask every parameter of the model for a gradient.

        TRL's DPO switches adapters in each step, after which factors that the rule freezes have gradients, too.
        """
        if self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        return super()._clip_grad_norm(self.guard.trained)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the parent counts all parameters anew in every step, longer than a small model's step takes."""
        return 0


def start_schedule_at_(scheduler: LRScheduler, step: int) -> None:
    """Put a new schedule where it would be after `step` steps.

    Raises:
        ValueError: if its learning rate is no function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"learning_rate_horizon='federation' with a {type(scheduler).__name__}; expected a schedule that is a "
            "function of the step alone. Set lr_scheduler_type='linear' or 'cosine', or learning_rate_horizon='round'."
        )
    scheduler.last_epoch = step
    for group, rate, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(step)
