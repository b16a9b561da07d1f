# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's local run as DP-SGD: secret Poisson batches, gradients of single records, and a budget that is kept."""

import hashlib
import itertools
import math
import random
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from ..client.guard import QuantizedBaseCallback
from ..client.ledger import ClientLedger
from ..client.partition import is_stream
from ..client.policy import PolicyRefusal
from ..client.record_gradients import PoissonBatches, RecordGradients, check_record_model
from ..config.record_dp import check_record_arguments
from ..privacy.noise import ReadBytes
from ..privacy.record_accounting import RecordBudget, compute_record_epsilon, solve_record_noise


logger = logging.get_logger(__name__)

# For type checkers the mixin is the Trainer that it will be mixed with.
_Parent: Any = Trainer if TYPE_CHECKING else object

# Where a loss comes from that is a mean over the labels of single rows, and batches that are made of rows one by one.
_KNOWN = {
    "compute_loss": ("transformers.trainer", "trl.trainer.sft_trainer"),
    "_prepare_inputs": ("transformers.trainer", "transformers.trainer_seq2seq"),
}
_CHECKED = 4  # rows on which a run checks that rows do not change each other
_EXACT, _ROUGH = 1e-3, 5e-2  # relative difference that is allowed in float32, and where products are in bfloat16


@dataclass(slots=True)
class RecordRun:
    """One local run: its batches, its gradients, and the steps that were paid for."""

    batches: PoissonBatches
    gradients: RecordGradients
    steps_left: int
    verified: bool = False


class RecordRunMixin(_Parent):
    """The part of a client that trains by DP-SGD where its policy, or else the configuration, has a `record_epsilon`."""

    guard: QuantizedBaseCallback
    read_bytes: ReadBytes = staticmethod(secrets.token_bytes)  # of batches and noise; tests put a seed here
    _record: RecordRun | None = None

    @property
    def record_budget(self) -> RecordBudget | None:
        """What any row may be exposed to: the client's own word, if it has a policy with one."""
        own = None if self.guard.gate is None else self.guard.gate.policy.record_budget
        args = self.args
        if own is not None or args.record_epsilon is None:
            return own
        return RecordBudget(args.record_epsilon, args.record_delta, args.record_clip, args.num_rounds)

    def check_record_training(self) -> None:
        """Refuse what can't be trained by DP-SGD.

        Raises:
            ValueError: naming it, with the reason.
        """
        check_record_arguments(self.args)
        if self.args.world_size > 1:
            raise ValueError(
                f"Record-level differential privacy with {self.args.world_size} ranks: each would draw batches and noise of its "
                "own. Train this client in one process."
            )
        for name, known in _KNOWN.items():
            source = getattr(type(self), name).__module__
            if source not in known:
                raise ValueError(
                    f"{type(self).__name__} has a `{name}` of its own (in {source}), and nobody knows whether it mixes rows. "
                    f"Record-level differential privacy goes with the losses of {' and '.join(_KNOWN['compute_loss'])}."
                )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(
                "compute_loss_func: nobody knows whether it mixes rows. Leave it out with record_epsilon."
            )
        check_record_model(self.model)

    @contextmanager
    def record_run(self, is_client: bool) -> Iterator[None]:
        """Make the local run inside it DP-SGD, if there is a budget, and enter it into the ledger before it begins.

        Args:
            is_client: Whether it trains on the client's rows; an attacker of the audit trains on rows of its own.

        Raises:
            ValueError: as [`check_record_training`], or for a stream.
            PolicyRefusal: if the run would spend more than the budget.
        """
        budget = self.record_budget
        if budget is None or not is_client:
            yield
            return
        self.check_record_training()
        rows, args = self.train_dataset, self.args
        if is_stream(rows):
            raise ValueError(
                "Record-level differential privacy draws rows by number, and a stream has none. Pass a dataset."
            )
        if not budget.delta < 1 / len(rows):
            raise ValueError(
                f"record_delta={budget.delta} for {len(rows)} rows; expected less than {1 / len(rows):.1e}."
            )
        expected = min(args.train_batch_size * args.gradient_accumulation_steps, len(rows))
        rate = expected / len(rows)
        epoch = max(round(1 / rate), 1)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        noise = solve_record_noise(budget, rate, steps)
        self.guard.private_metrics = {
            "loss": math.nan,  # of the rows, without noise
            "record_epsilon": self._spend(budget, (noise, rate, steps)),
            "record_noise_multiplier": noise,
        }
        self._record = RecordRun(
            PoissonBatches(len(rows), rate, epoch, args.gradient_accumulation_steps, self.read_bytes),
            RecordGradients(self.model, list(self.guard.trained), budget.clip, noise, expected, self.read_bytes),
            steps,
        )
        _seed_secretly(self.read_bytes)
        try:
            yield
        finally:
            self._record.gradients.close()
            self._record, self.guard.private_metrics = None, {}

    def _spend(self, budget: RecordBudget, run: tuple[float, float, int]) -> float:
        """Enter a run into the client's ledger; returns the ε of all its runs."""
        gate, task = self.guard.gate, self.guard.current_task
        if gate is not None:
            ledger = gate.ledger
        else:  # a simulation: every client of every federation has its own
            name = hashlib.sha256(f"{task.federation_id}/{task.client_id}".encode()).hexdigest()[:32]
            ledger = ClientLedger.open(Path(str(self.guard.memory_dir)) / "record" / name)
        before = [(noise, rate, int(steps)) for noise, rate, steps in ledger.record]
        epsilon = compute_record_epsilon([*before, run], budget.delta)
        if epsilon > budget.epsilon:
            raise PolicyRefusal(
                f"This run would bring the rows' ε to {epsilon:.4g}; record_epsilon is {budget.epsilon:g} (δ = {budget.delta:g}). "
                f"Runs so far: {len(before)}. The budget is spent."
            )
        if gate is None or not gate.dry_run:
            ledger.record.append(list(run))
            ledger.write()
        logger.warning(
            f"Round {task.round}, client {task.client_id!r}: ε of each row is {epsilon:.4g} of {budget.epsilon:g} after this run "
            f"(δ = {budget.delta:g}, noise {run[0]:.4g} × clip {budget.clip:g}, {run[2]} steps at rate {run[1]:.4g})."
        )
        return epsilon

    def get_train_dataloader(self) -> DataLoader:
        """The parent's, or one of Poisson batches, which may be empty."""
        if self._record is None:
            return super().get_train_dataloader()
        rows, collate = self.train_dataset, self.data_collator
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return DataLoader(
            rows,
            batch_sampler=self._record.batches,
            collate_fn=_CollateSome(collate),
            num_workers=self.args.dataloader_num_workers,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The parent's; without its count of labels over all batches, of which no record's loss may know."""
        if self._record is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The parent's, or one batch of a DP-SGD step; after its last batch, parameters have the noisy gradient."""
        run = self._record
        if run is None:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        if not run.verified:
            self._verify(run)
        loss = torch.zeros((), device=self.args.device)
        if inputs:  # of an empty batch, there is nothing to add
            loss = run.gradients.add(self._compute_record_loss, self._prepare_inputs(inputs))
        if self.accelerator.sync_gradients:
            if run.steps_left < 1:
                raise RuntimeError("The local run takes more steps than its budget was charged for. Look for a callback that "
                                   "changes max_steps.")  # fmt: skip
            run.steps_left -= 1
            run.gradients.finish()
        return loss / self.args.gradient_accumulation_steps

    def _compute_record_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model, inputs)

    def _verify(self, run: RecordRun) -> None:
        """Check on the shortest, the longest and some more rows that rows do not change each other's gradients."""
        rows, loader = self.train_dataset, self.get_train_dataloader()
        lengths = [_length(rows[row]) for row in range(min(len(rows), 64))]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        places = sorted({order[round(share * (len(order) - 1) / (_CHECKED - 1))] for share in range(_CHECKED)})
        batch = self._prepare_inputs(loader.collate_fn([loader.dataset[row] for row in places]))
        kernels = {getattr(module, "compute_dtype", None) for module in self.model.modules()} - {None}
        exact = not self.args.bf16 and kernels <= {torch.float32} and self.args.device.type == "cpu"
        run.gradients.verify(self._compute_record_loss, batch, _EXACT if exact else _ROUGH)
        run.verified = True


def _seed_secretly(read_bytes: ReadBytes) -> None:
    """Seed dropout and random collators anew.

    The task's seed is the server's. With it, one row more would give known other masks to all rows after it, and their
    gradients would move by more than the clip.
    """
    random.seed(read_bytes(32))
    np.random.seed(np.frombuffer(read_bytes(32), "<u4"))
    torch.manual_seed(int.from_bytes(read_bytes(8), "little", signed=True))


class _CollateSome:
    """A collator that makes an empty batch of no rows; a class, since workers of a DataLoader are sent it."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, rows: list) -> Mapping[str, Any]:
        return self.collate(rows) if rows else {}


def _length(row: Any) -> int:
    """Of a row's labels, or else of its tokens."""
    columns = [row[name] for name in ("labels", "input_ids") if name in row] if isinstance(row, Mapping) else []
    return next((len(column) for column in columns if hasattr(column, "__len__")), 0)
