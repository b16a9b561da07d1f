# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers whose `train()` runs a federation."""

import copy
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import TrainOutput

from ..audit.requirements import check_auditable
from ..client.adapter_config import check_adapter_config
from ..client.checks import check_loss_weights, check_model, find_peft_model
from ..client.guard import QuantizedBaseCallback
from ..client.logit_adjustment import check_labels
from ..client.partition import check_client_sizes, count_rows, drop_column, partition_clients
from ..config.federated import FederatedConfig
from ..config.rules import check_products
from ..privacy.secure_sums.rounds import RoundSum, list_answered
from ..processes.blueprint import TrainerBlueprint
from ..processes.owner import OwnerProcess
from ..processes.sentence_models import LABELS, is_sentence_trainer
from ..report.rounds import RoundReporter
from ..server.loop import FederatedServer, TrainClients
from ..server.resume import read_resume
from ..server.store import RoundStore
from ..tensors.adapters import adapter_parameters, copy_adapter, load_adapter_
from ..tensors.codebooks import FULL_PRECISION
from ..wire.encoding import encode_message
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .arguments import check_arguments, hidden_arguments
from .finish import finish_federation
from .local_run import LocalRunMixin
from .model import add_adapter, check_adapter_switching, resolve_model, start_adapter
from .publishing import PublishingMixin
from .ranks import RanksMixin, check_launch
from .rounds import Rounds
from .rows import RowsMixin
from .secure_rounds import sum_in_process
from .steering import Steering
from .tracked_run import TrackedRun
from .workers import WorkersMixin


# The underscore keeps it out of `push_to_hub` of the adapter.
CLIENTS_DIR = "_clients"  # what simulated clients keep to themselves from round to round


class FederatedMixin(RowsMixin, LocalRunMixin, RanksMixin, WorkersMixin, PublishingMixin):
    """Makes a `Trainer` subclass federated: `class FederatedSFTTrainer(FederatedMixin, SFTTrainer)`.

    `train()` runs the federation; `train_client(task)` is one client's run, through the parent's `train()`, so that
    `compute_loss` and every other override counts on every client.

    Args:
        model: A base (a directory written by `export_base`, or a quantized model), or the path or Hub id of the owner's full
            model: then, and where `args.full_model` is set, a separate owner process opens it (see [`OwnerProcess`]).
        args: The options. The trainer works on a copy.
        train_dataset: A `datasets.Dataset`, partitioned by `args.partition`, or a mapping of client ids to datasets; an
            empty one where the clients are elsewhere (see [`train_remotely`]).
        peft_config: Of the adapter, unless `model` is a PeftModel already.
        owner_dataset: Rows of the owner, which never reach a client.
        selection_dataset: Rows of the owner, apart from all others, by which it chooses in each round what it keeps, and at the
            end the round: [`AggregationOptions`] says what.
        model_class: The class of the full model and the base. By default the one that the checkpoint names, with the
            head for `peft_config.task_type` or the trainer.
        model_init_kwargs: For `from_pretrained` of both, such as `{"num_labels": 5}`. Where `args` has the field, too, as
            in TRL's configurations, these override it.

    All other arguments are those of the trainer.

    Raises:
        ValueError: for arguments that a federation can't have.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        args: FederatedConfig,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        peft_config: PeftConfig | None = None,
        owner_dataset: Any = None,
        selection_dataset: Any = None,
        model_class: type | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ):
        check_arguments(args, kwargs)
        check_launch(args)
        if peft_config is not None:
            check_adapter_config(peft_config)
        elif isinstance(model, str | Path):
            raise ValueError("`peft_config` is missing: say which adapter to train, e.g. LoraConfig(r=8).")
        args = copy.copy(args)
        args.output_dir = os.path.abspath(args.output_dir)  # a script may change its working directory later
        self.server: FederatedServer | None = None
        self.steering = Steering(args)
        self.users_callbacks = list(callbacks or [])
        self.raw_datasets = partition_clients(train_dataset, args)
        if is_sentence_trainer(type(self)) and args.partition not in LABELS:
            self.raw_datasets = drop_column(self.raw_datasets, args.partition)
        if self.raw_datasets:
            args.check_clients(len(self.raw_datasets))
        self.blueprint = TrainerBlueprint(
            full_model=args.full_model or "",
            args=args,
            trainer_class=type(self),
            model_class=model_class,
            peft_config=peft_config,
            model_init_kwargs={**(getattr(args, "model_init_kwargs", None) or {}), **(model_init_kwargs or {})},
            owner_dataset=owner_dataset,
            selection_dataset=selection_dataset,
            client_datasets=self.raw_datasets if args.compare_full_precision else None,
            trainer_arguments={"data_collator": data_collator, "eval_dataset": eval_dataset, **kwargs},
        )
        self.blueprint.check(isinstance(model, str | Path))
        model, self.owner = resolve_model(model, self.blueprint)
        model = add_adapter(model, peft_config, args.seed)
        unquantized = args.base_bits == FULL_PRECISION
        check_model(model, unquantized)
        self.blueprint.follow(find_peft_model(model))
        check_products(args.aggregation, self.blueprint.peft_config)
        memories = Path(args.output_dir) / CLIENTS_DIR
        self.guard = QuantizedBaseCallback(memory_dir=memories, allow_full_precision=unquantized)
        start = copy_adapter(adapter_parameters(find_peft_model(model)))
        arguments = {
            "data_collator": data_collator,
            "train_dataset": self.rows_for_constructor(self.raw_datasets, eval_dataset),
            "eval_dataset": eval_dataset,
            **kwargs,
        }
        with hidden_arguments(args):
            super().__init__(
                model=model,
                args=args,
                callbacks=[self.guard, *(callbacks or [])],
                **{name: value for name, value in arguments.items() if value is not None},
            )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        # TRL casts the adapter of a quantized model to bfloat16, where a small step rounds to nothing.
        self.guard.restore_start(start)
        check_loss_weights(self)
        check_adapter_switching(self.model, args)
        self.client_datasets = self.prepare_clients(self.raw_datasets)
        check_labels(find_peft_model(self.model), self.client_datasets, args.logit_adjustment)
        least = args.train_batch_size * args.world_size if args.dataloader_drop_last else 1
        check_client_sizes(self.client_datasets, least)
        if self.owner is None and args.full_model and self.is_world_process_zero():
            self.owner = OwnerProcess(self.blueprint)
        if self.owner is not None and args.merge:
            self.owner.check_merge(self.guard.initial, self.guard.peft_config)
        self.prepare_local_runs()

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Run the federation's rounds, and leave the live model as what a client holds after the last one.

        Args:
            resume_from_checkpoint: True continues after the last committed round; so does the path of `output_dir`.

        Raises:
            ValueError: if `output_dir` holds a federation and neither resuming nor overwriting was asked for, or if the one to
                resume had other options, clients, rows or another base.
        """
        if not self.client_datasets:
            raise ValueError("There are no clients here: `train_dataset` is empty. Use `train_remotely`.")
        if self.record_budget is not None:
            self.check_record_training()  # once, and not in each client's run
        resume = read_resume(resume_from_checkpoint, RoundStore(self.args.output_dir))
        self.share_cores()
        # What lives long is frozen, else the `gc.collect()` in accelerate's `free_memory` walks all of it in every run.
        gc.collect()
        gc.freeze()
        try:
            if not self.is_world_process_zero():
                self.follow()
                return TrainOutput(0, 0.0, {})
            num_examples = count_rows(self.client_datasets)
            if self.args.client_workers == 1:
                return self.train_remotely(self._mask(self.train_clients), num_examples, resume)
            workers = self.start_workers()
            try:
                return self.train_remotely(self._mask(workers.train_clients), num_examples, resume)
            finally:
                self.end_workers(workers)
        finally:
            gc.unfreeze()

    def train_remotely(
        self,
        train_clients: TrainClients,
        num_examples: Mapping[str, int | None],
        resume_from_checkpoint: bool | str | None = None,
    ) -> TrainOutput:
        """[`train`] with clients elsewhere: `num_examples` maps each to its number of rows, `train_clients` reaches them.

        Under `secure_aggregation` these clients mask their updates, and `train_clients` yields a [`RoundSum`].

        Raises:
            ValueError: as [`train`].
        """
        resume = read_resume(resume_from_checkpoint, RoundStore(self.args.output_dir))
        if self.args.audit:
            check_auditable(self)
            if None in num_examples.values():
                raise ValueError(
                    "audit=True needs rows that can be read again, but some clients have streams. Give them datasets "
                    "with a length, or set audit=False."
                )
        reporter = RoundReporter(self.args, self._make_trackers(resume))
        rounds = self.rounds = Rounds(self.args, self.callback_handler, self.evaluates)

        def on_round(record: dict[str, Any]) -> bool:
            reporter.on_round(record)
            self.steering.on_round(record)
            return rounds.on_round(record)

        def train_and_report(tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure | RoundSum]:
            self.steering.begin_round(tasks)
            for answer in rounds.follow(train_clients)(tasks):
                for client in list_answered(answer):
                    self.steering.end_client(client)
                yield answer
                for client in list_answered(answer):
                    reporter.on_client(client)

        self.server = self._make_server(num_examples, on_round)
        rounds.start_clock = self.steering.begin_client
        if resume:
            self.server.store.read()  # before a directory is made
        with self.steering.listen(), reporter:
            self.steering.follow(self.server, resume)
            rounds.begin()
            try:
                records = self.server.run(train_and_report, resume)
                self.steering.finish()
                self.share("hold", lambda: encode_message("adapter", {}, self._client_adapter()))
                self.share("stop")
                output = rounds.finish(records)
                finish_federation(self, records, reporter)
            finally:
                self.state = rounds.state  # a local run has put its own there
                load_adapter_(self.guard.parameters, self._client_adapter())
        return output

    def _mask(self, train_clients: TrainClients) -> TrainClients:
        if not self.args.secure_aggregation:
            return train_clients
        return sum_in_process(self.args, self.guard.initial, train_clients, self.count_opening)

    def count_opening(self, number: int) -> None:
        """Told by what opens the sums of rounds, before it does."""
        if self.server is not None:
            self.server.count_opening(number)

    def _client_adapter(self) -> Mapping[str, torch.Tensor]:
        """What a client holds: the last round's proxy; before the rounds, and where nothing is sent, the base's adapter."""
        held = None if self.server is None else self.server.client_adapter()
        return self.guard.initial if held is None else held

    def _make_server(
        self, num_examples: Mapping[str, int | None], on_round: Callable[[dict[str, Any]], bool]
    ) -> FederatedServer:
        adapter = dict(self.guard.initial)
        if self.owner is not None:
            adapter = start_adapter(find_peft_model(self.model), adapter, self.owner.initial_adapter())
        return FederatedServer(
            self.args,
            adapter,
            self.guard.peft_config,
            num_examples,
            self.guard.fingerprint,
            owner=self.owner,
            evaluate_proxy=self._evaluate_together if self.evaluates else None,
            on_round=on_round,
        )

    def _make_trackers(self, resume: bool) -> TrackedRun:
        trackers = [make() for make in get_reporting_integration_callbacks(self.args.report_to)]
        trackers += self.callback_handler.trackers
        return TrackedRun(trackers, self.model, RoundStore(self.args.output_dir), resume)

    def _evaluate_together(self, adapter: Mapping[str, torch.Tensor]) -> dict[str, float]:
        self.share("evaluate", lambda: encode_message("adapter", {}, adapter))
        return self.evaluate_proxy(adapter)


class FederatedTrainer(FederatedMixin, Trainer):
    """[`~transformers.Trainer`] whose `train()` runs a federation; see [`FederatedMixin`]."""
