# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers whose `train()` runs a federation."""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import TrainOutput

from ..audit.audit import check_auditable
from ..client.checks import check_model
from ..client.guard import QuantizedBaseCallback
from ..client.partition import check_client_sizes, count_rows, partition_clients
from ..config.federated import FederatedConfig
from ..processes.blueprint import TrainerBlueprint
from ..processes.owner import OwnerProcess
from ..report.rounds import RoundReporter
from ..server.loop import FederatedServer, TrainClients
from ..server.resume import read_resume
from ..server.store import RoundStore
from ..tensors.adapters import load_adapter_
from ..tensors.codebooks import FULL_PRECISION
from ..wire.encoding import encode_message
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .callbacks import EventHandler
from .finish import finish_federation
from .local_run import LocalRunMixin
from .model import add_adapter, resolve_model
from .publishing import PublishingMixin
from .ranks import RanksMixin, check_launch
from .rounds import Rounds
from .trackers import check_uploads
from .workers import WorkersMixin


# The underscore keeps it out of `push_to_hub` of the adapter.
CLIENTS_DIR = "_clients"  # what simulated clients keep to themselves from round to round


class FederatedMixin(LocalRunMixin, RanksMixin, WorkersMixin, PublishingMixin):
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
        model_class: The class of the full model and the base.

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
        model_class: type | None = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, FederatedConfig):
            raise ValueError(f"args is a {type(args).__name__}; expected a FederatedConfig (or a subclass of it).")
        check_launch(args)
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init makes a new model for each run, but a client's base is fixed; pass `model`.")
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError(
                "`optimizers` would carry one optimizer's state from client to client; each starts cold. Set "
                "args.optim, or `optimizer_cls_and_kwargs`."
            )
        args = copy.copy(args)
        self.server: FederatedServer | None = None
        self.users_callbacks = list(callbacks or [])
        self.raw_datasets = partition_clients(train_dataset, args)
        if self.raw_datasets:
            args.check_clients(len(self.raw_datasets))
        self.blueprint = TrainerBlueprint(
            full_model=args.full_model or "",
            args=args,
            trainer_class=type(self),
            model_class=model_class,
            peft_config=peft_config,
            owner_dataset=owner_dataset,
            client_datasets=self.raw_datasets if args.compare_full_precision else None,
            trainer_arguments={"data_collator": data_collator, "eval_dataset": eval_dataset, **kwargs},
        )
        model, self.owner = resolve_model(model, self.blueprint)
        peft_model = add_adapter(model, peft_config, args.seed)
        self.blueprint.peft_config = peft_model.peft_config["default"]
        unquantized = args.base_bits == FULL_PRECISION
        check_model(peft_model, unquantized)
        memory_dir = Path(args.output_dir) / CLIENTS_DIR
        self.guard = QuantizedBaseCallback(memory_dir=memory_dir, allow_full_precision=unquantized)
        # An empty list of trackers for the parent: a client's run would open and close them each time.
        report_to, args.report_to = args.report_to, []
        super().__init__(
            peft_model,
            args,
            data_collator,
            next(iter(self.raw_datasets.values()), None),
            eval_dataset,
            callbacks=[self.guard, *(callbacks or [])],
            **kwargs,
        )
        args.report_to = report_to
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        for parameter in self.guard.parameters.values():
            # TRL casts the adapter of a quantized model to bfloat16, where a small step rounds to nothing.
            parameter.data = parameter.data.float()
        self.client_datasets = {
            client: self.prepare_client_dataset(rows, client) for client, rows in self.raw_datasets.items()
        }
        check_client_sizes(
            self.client_datasets, args.train_batch_size * args.world_size if args.dataloader_drop_last else 1
        )
        if self.owner is None and args.full_model and self.is_world_process_zero():
            self.owner = OwnerProcess(self.blueprint)
        self.prepare_local_runs()

    def prepare_client_dataset(self, dataset: Any, client_id: str) -> Any:
        """What a client trains on, from the rows it was given. TRL's trainers tokenize here."""
        prepare = getattr(super(), "_prepare_dataset", None)
        if prepare is None:
            return dataset
        formatting = getattr(self, "_formatting_func", None)
        return prepare(dataset, self.processing_class, self.args, self.args.packing, formatting, client_id)

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Run the federation's rounds, and leave the live model as what a client holds after the last one.

        Args:
            resume_from_checkpoint: True goes on after the last committed round; so does the path of `output_dir`.

        Raises:
            ValueError: if `output_dir` holds a federation and neither resuming nor overwriting was asked for, or if the one to
                resume had other options, clients, rows or another base.
        """
        if not self.client_datasets:
            raise ValueError("There are no clients here: `train_dataset` is empty. Use `train_remotely`.")
        resume = read_resume(resume_from_checkpoint, RoundStore(self.args.output_dir))
        # What lives long is frozen, else the `gc.collect()` in accelerate's `free_memory` walks all of it in every run.
        gc.collect()
        gc.freeze()
        try:
            if not self.is_world_process_zero():
                self.follow()
                return TrainOutput(0, 0.0, {})
            num_examples = count_rows(self.client_datasets)
            if self.args.client_workers == 1:
                return self.train_remotely(self.train_clients, num_examples, resume)
            workers = self.start_workers()
            try:
                return self.train_remotely(workers.train_clients, num_examples, resume)
            finally:
                workers.close()
        finally:
            gc.unfreeze()

    def train_remotely(
        self,
        train_clients: TrainClients,
        num_examples: Mapping[str, int | None],
        resume_from_checkpoint: bool | str | None = None,
    ) -> TrainOutput:
        """[`train`] with clients elsewhere: `num_examples` maps each to its number of rows, `train_clients` reaches them.

        Raises:
            ValueError: as [`train`].
        """
        resume = read_resume(resume_from_checkpoint, RoundStore(self.args.output_dir))
        if self.args.audit:
            check_auditable(self)
            if None in num_examples.values():
                raise ValueError(
                    "audit=True compares clients by their rows, and some stream theirs. Give them datasets."
                )
        reporter = RoundReporter(self.args, self._make_trackers())
        rounds = self.rounds = Rounds(self.args, self.callback_handler, self.eval_dataset is not None)

        def on_round(record: dict[str, Any]) -> bool:
            reporter.on_round(record)
            return rounds.on_round(record)

        def train_and_report(tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for answer in rounds.follow(train_clients)(tasks):
                yield answer
                reporter.on_client(answer.client_id)

        self.server = self._make_server(num_examples, on_round)
        with reporter:
            rounds.begin()
            try:
                records = self.server.run(train_and_report, resume)
                self.share("hold", lambda: encode_message("adapter", {}, self._client_adapter()))
                self.share("stop")
                output = rounds.finish(records)
                finish_federation(self, records, reporter)
            finally:
                self.state = rounds.state  # a local run has put its own there
                load_adapter_(self.guard.parameters, self._client_adapter())
        return output

    def _client_adapter(self) -> Mapping[str, torch.Tensor]:
        """What a client holds: the last round's proxy; before the rounds, and where nothing is sent, the base's adapter."""
        held = None if self.server is None else self.server.client_adapter()
        return self.guard.initial if held is None else held

    def _make_server(
        self, num_examples: Mapping[str, int | None], on_round: Callable[[dict[str, Any]], bool]
    ) -> FederatedServer:
        adapter = dict(self.guard.initial)
        if self.owner is not None:
            own = self.owner.initial_adapter()
            adapter |= {key: value for key, value in own.items() if "lora_" not in key}
        return FederatedServer(
            self.args,
            adapter,
            self.model.peft_config["default"],
            num_examples,
            self.guard.fingerprint,
            owner=self.owner,
            evaluate_proxy=self._evaluate_together if self.eval_dataset is not None else None,
            on_round=on_round,
        )

    def _make_trackers(self) -> EventHandler:
        trackers = [make() for make in get_reporting_integration_callbacks(self.args.report_to)]
        trackers += self.callback_handler.trackers
        check_uploads(trackers)
        return EventHandler([DefaultFlowCallback, *trackers], self.model, self.processing_class)

    def _evaluate_together(self, adapter: Mapping[str, torch.Tensor]) -> dict[str, float]:
        self.share("evaluate", lambda: encode_message("adapter", {}, adapter))
        return self.evaluate_proxy(adapter)


class FederatedTrainer(FederatedMixin, Trainer):
    """[`~transformers.Trainer`] whose `train()` runs a federation; see [`FederatedMixin`]."""
