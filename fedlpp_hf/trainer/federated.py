# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers whose `train()` runs a federation."""

import copy
import dataclasses
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import TrainOutput

from ..audit.audit import audit_federation, check_auditable
from ..client.adapter_config import check_adapter_config
from ..client.checks import check_loss_weights, check_model, find_peft_model
from ..client.guard import QuantizedBaseCallback
from ..client.partition import check_client_sizes, partition_clients
from ..config.federated import FederatedConfig
from ..config.rules import check_products
from ..processes.blueprint import TrainerBlueprint
from ..processes.owner import OwnerProcess
from ..processes.workers import ClientWorkers
from ..report.rounds import RoundReporter
from ..server.loop import FederatedServer, TrainClients
from ..tensors.codebooks import FULL_PRECISION
from ..wire.encoding import encode_message
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .local_run import LocalRunMixin
from .model import add_adapter, check_adapter_switching, resolve_model, start_adapter
from .publishing import MERGED_DIR, PublishingMixin
from .ranks import RanksMixin
from .rows import RowsMixin


# The underscore keeps it out of `push_to_hub` of the adapter.
CLIENTS_DIR = "_clients"  # what simulated clients keep to themselves from round to round

_HIDDEN: dict[str, Any] = {"report_to": [], "model_init_kwargs": None}


class FederatedMixin(RowsMixin, LocalRunMixin, RanksMixin, PublishingMixin):
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
        model_class: The class of the full model and the base. By default the one that the checkpoint names, with the head
            that `peft_config.task_type` or the trainer needs.
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
        model_class: type | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        callbacks: list | None = None,
        **kwargs: Any,
    ):
        _check_arguments(args, kwargs)
        if peft_config is not None:
            check_adapter_config(peft_config)
        elif isinstance(model, str | Path):
            raise ValueError("`peft_config` is missing: say which adapter to train, e.g. LoraConfig(r=8).")
        args = copy.copy(args)
        self.server: FederatedServer | None = None
        self.raw_datasets = partition_clients(train_dataset, args)
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
        memory_dir = Path(args.output_dir) / CLIENTS_DIR
        self.guard = QuantizedBaseCallback(memory_dir=memory_dir, allow_full_precision=unquantized)
        arguments = {
            "data_collator": data_collator,
            "train_dataset": self.rows_for_constructor(self.raw_datasets, eval_dataset),
            "eval_dataset": eval_dataset,
            **kwargs,
        }
        # An empty list of trackers for the parent: a client's run would open and close them each time. And no arguments for
        # a model that is loaded already: some of TRL's trainers would refuse, others warn.
        shown = {name: getattr(args, name) for name in _HIDDEN if hasattr(args, name)}
        for name in shown:
            setattr(args, name, _HIDDEN[name])
        super().__init__(
            model=model,
            args=args,
            callbacks=[self.guard, *(callbacks or [])],
            **{name: value for name, value in arguments.items() if value is not None},
        )
        for name, value in shown.items():
            setattr(args, name, value)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        for parameter in self.guard.parameters.values():
            # TRL casts the adapter of a quantized model to bfloat16, where a small step rounds to nothing.
            parameter.data = parameter.data.float()
        check_loss_weights(self)
        check_adapter_switching(self.model, args)
        self.client_datasets = self.prepare_clients(self.raw_datasets)
        check_client_sizes(
            self.client_datasets, args.train_batch_size * args.world_size if args.dataloader_drop_last else 1
        )
        if self.owner is None and args.full_model and self.is_world_process_zero():
            self.owner = OwnerProcess(self.blueprint)
        if self.owner is not None and args.merge:
            self.owner.check_merge(self.guard.initial, self.guard.peft_config)
        self.prepare_local_runs()

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Run the federation's rounds; `resume_from_checkpoint=True` goes on after the last committed one.

        Raises:
            ValueError: if `output_dir` holds a federation and neither resuming nor overwriting was asked for.
        """
        if not self.client_datasets:
            raise ValueError("There are no clients here: `train_dataset` is empty. Use `train_remotely`.")
        # What lives long is frozen, else the `gc.collect()` in accelerate's `free_memory` walks all of it in every run.
        gc.collect()
        gc.freeze()
        try:
            if not self.is_world_process_zero():
                self.follow()
                return TrainOutput(0, 0.0, {})
            num_examples = {client: len(rows) for client, rows in self.client_datasets.items()}
            if self.args.client_workers == 1:
                return self.train_remotely(self.train_clients, num_examples, resume_from_checkpoint)
            workers = self._start_workers()
            try:
                return self.train_remotely(workers.train_clients, num_examples, resume_from_checkpoint)
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
        if self.args.audit:
            check_auditable(self)
        reporter = RoundReporter(self.args, self._make_trackers())
        self.server = self._make_server(num_examples, reporter)

        def train_and_report(tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for answer in train_clients(tasks):
                yield answer
                reporter.on_client(answer.client_id)

        with reporter:
            records = self.server.run(train_and_report, bool(resume_from_checkpoint))
            self.share("stop")
            self.guard.prove_base_unmoved()
            references = self._run_references()
            if self.owner is not None and self.args.merge:
                self.owner.merge(self.args.output_dir, Path(self.args.output_dir) / MERGED_DIR)
            audit = audit_federation(self) if self.args.audit else None
            if audit is not None:
                audit.write(self.args.output_dir)
            reporter.finish(records, references, audit.summarize() if audit else [])
        if audit is not None:
            audit.check_threshold()
        self.state = TrainerState(global_step=len(records) - 1, is_world_process_zero=True)
        losses = [client["loss"] for client in records[-1]["clients"].values()]
        loss = sum(losses) / len(losses) if losses else float("nan")
        return TrainOutput(len(records) - 1, loss, records[-1]["metrics"].get("server", {}))

    def _make_server(self, num_examples: Mapping[str, int | None], reporter: RoundReporter) -> FederatedServer:
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
            on_round=reporter.on_round,
        )

    def _make_trackers(self) -> CallbackHandler:
        trackers = get_reporting_integration_callbacks(self.args.report_to)
        return CallbackHandler([DefaultFlowCallback, *trackers], self.model, self.processing_class, None, None)

    def _run_references(self) -> dict[str, dict[str, float]]:
        references: dict[str, dict[str, float]] = {}
        if self.owner is not None and self.args.compare_full_precision:
            references["federation in full precision"] = self.owner.run_reference()
            if self.owner.has_rows:
                references["owner's own rows alone"] = self.owner.run_reference(own_rows=True)
        return references

    def _start_workers(self) -> ClientWorkers:
        args, blueprint = self.args, self.blueprint
        if args.world_size > 1:
            raise ValueError(
                f"client_workers={args.client_workers} in a launch of {args.world_size} processes, which train each "
                "client together. Launch one process, or set client_workers=1."
            )
        if not blueprint.base_dir and not (args.base_bits == FULL_PRECISION and blueprint.full_model):
            raise ValueError(
                f"client_workers={args.client_workers}: each loads the base; give `model` as the path of one, not as a model."
            )
        # What is the owner's stays out of it.
        theirs = dataclasses.replace(blueprint, owner_dataset=None, client_datasets=self.raw_datasets)
        if blueprint.base_dir:
            theirs = dataclasses.replace(theirs, full_model="")
        return ClientWorkers(theirs, args.client_workers)

    def _evaluate_together(self, adapter: Mapping[str, torch.Tensor]) -> dict[str, float]:
        self.share("evaluate", lambda: encode_message("adapter", {}, adapter))
        return self.evaluate_proxy(adapter)


def _check_arguments(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a Trainer that a federation can't have."""
    if not isinstance(args, FederatedConfig):
        raise ValueError(f"args is a {type(args).__name__}; expected a FederatedConfig (or a subclass of it).")
    if kwargs.get("model_init") is not None:
        raise ValueError("model_init makes a new model for each run, but a client's base is fixed; pass `model`.")
    if kwargs.get("optimizers", (None, None)) != (None, None):
        raise ValueError(
            "`optimizers` would carry one optimizer's state from client to client; each starts cold. Set "
            "args.optim, or `optimizer_cls_and_kwargs`."
        )
    if kwargs.get("ref_model") is not None:
        raise ValueError(
            "`ref_model` would be one more model on every client. Leave it out: the reference is the base with the adapter "
            "as it starts."
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "`quantization_config` does not go with a federation: the owner quantizes the base once, for all clients. Set "
            "args.base_bits."
        )


class FederatedTrainer(FederatedMixin, Trainer):
    """[`~transformers.Trainer`] whose `train()` runs a federation; see [`FederatedMixin`]."""
