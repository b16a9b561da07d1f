# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers whose `train()` runs a federation, with one client's run as the primitive `train_client(task)`."""

import copy
import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import TrainOutput

from ..audit.audit import audit_federation, check_auditable
from ..base.dequantized import hold_dequantized_
from ..base.load import load_base
from ..base.manifest import BASE_MANIFEST
from ..client.guard import QuantizedBaseCallback, audit_model
from ..client.partition import check_client_sizes, partition_clients
from ..client.walks import remember_walks_
from ..config.federated import FederatedConfig
from ..processes.blueprint import TrainerBlueprint, load_full_model
from ..processes.owner import Owner
from ..processes.workers import ClientWorkers, late_reason
from ..report.text import RoundReporter
from ..server.loop import FederatedServer, TrainClients
from ..server.store import FEDERATION_DIR, RoundStore
from ..tensors.adapters import load_adapter_
from ..tensors.quantization import FULL_PRECISION
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate, decode_message, encode_message, restore_tensors
from .publishing import MERGED_DIR, PublishingMixin
from .ranks import broadcast_bytes
from .schedules import start_schedule_at_


# The underscore keeps it out of `push_to_hub` of the adapter.
CLIENTS_DIR = "_clients"  # what simulated clients keep to themselves from round to round
_FREEZE_EVERY = 100  # clients
_TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second", "model_preparation_time")


class FederatedMixin(PublishingMixin):
    """Makes a `Trainer` subclass federated: `class FederatedSFTTrainer(FederatedMixin, SFTTrainer)`.

    `train_dataset` is a `datasets.Dataset`, partitioned by `args.partition`, or a mapping of client ids to datasets; an
    empty one where the clients are elsewhere (see [`train_remotely`]).
    `model` is a base (a directory written by `export_base`, or a quantized model), or the path or Hub id of the owner's
    full model: then, and where `args.full_model` is set, a spawned process plays the owner (see [`Owner`]).
    `peft_config` describes the adapter, unless `model` is a PeftModel already. `owner_dataset` holds rows of the
    owner's own, which never reach a client. All other arguments are those of the trainer.

    `train()` runs the federation; `train_client(task)` is one client's run, through the parent's `train()`, so that
    `compute_loss` and every other override counts on every client.
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
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init makes a new model for each run, but a client's base is fixed; pass `model`.")
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError(
                "`optimizers` would carry one optimizer's state from client to client; each starts cold. Set "
                "args.optim, or `optimizer_cls_and_kwargs`."
            )
        self.owner: Owner | None = None
        self.server: FederatedServer | None = None
        self.raw_datasets = partition_clients(train_dataset, args)
        if self.raw_datasets:
            args.check_clients(len(self.raw_datasets))
        blueprint = TrainerBlueprint(
            full_model=args.full_model or "",
            args=args,
            trainer_class=type(self),
            model_class=model_class,
            peft_config=peft_config,
            owner_dataset=owner_dataset,
            client_datasets=self.raw_datasets if args.compare_full_precision else None,
            trainer_arguments={"data_collator": data_collator, "eval_dataset": eval_dataset, **kwargs},
        )
        self._blueprint = blueprint
        peft_model = _add_adapter(self._resolve_model(model, blueprint), peft_config, args.seed)
        blueprint.peft_config = peft_model.peft_config["default"]
        unquantized = args.base_bits == FULL_PRECISION
        audit_model(peft_model, unquantized)
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
            self.owner = Owner(blueprint)
        self._adapter = torch.nn.ParameterList(self.guard.parameters.values())
        self._horizon = (0, 1)
        self._decay_names: list[str] | None = None
        self._trimmed: set[str] = set()  # clients whose rows have only the columns that the model takes

    def prepare_client_dataset(self, dataset: Any, client_id: str) -> Any:
        """What a client trains on, from the rows it was given. TRL's trainers tokenize here."""
        prepare = getattr(super(), "_prepare_dataset", None)
        if prepare is None:
            return dataset
        formatting = getattr(self, "_formatting_func", None)
        return prepare(dataset, self.processing_class, self.args, self.args.packing, formatting, client_id)

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
                self._follow()
                return TrainOutput(0, 0.0, {})
            num_examples = {client: len(rows) for client, rows in self.client_datasets.items()}
            if self.args.client_workers == 1:
                return self._lead(num_examples, self._train_clients, bool(resume_from_checkpoint))
            workers = self._hire()
            try:
                return self._lead(num_examples, workers.train_clients, bool(resume_from_checkpoint))
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
        return self._lead(num_examples, train_clients, bool(resume_from_checkpoint))

    def train_client(self, task: ClientTask) -> ClientUpdate:
        """One client's local run: from the task's proxy, on the client's rows, by the parent's `train()`.

        Raises:
            ValueError: if the task is for another base, or for a client whose rows are not here.
        """
        if task.client_id not in self.client_datasets:
            raise ValueError(f"The task is for client {task.client_id!r}, whose data are not here.")
        self.train_dataset = self.client_datasets[task.client_id]
        # A fresh sampler seeds itself from both: with one alone every client would see the order of the first.
        set_seed(task.seed)
        self.accelerator.dataloader_config.data_seed = task.seed
        self.optimizer = self.lr_scheduler = None
        self.guard.accept(task)
        federation = self.args.learning_rate_horizon == "federation"
        self._horizon = (task.round - 1, task.num_rounds) if federation else (0, 1)
        held = hold_dequantized_(self.model) if self.args.hold_dequantized else nullcontext()
        with remember_walks_(self.model), held:
            super().train()
        if self.guard.update is None:
            raise RuntimeError("The local run ended without an update; was QuantizedBaseCallback removed?")
        return self.guard.update

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The local schedule, or this round's part of one that runs over the federation."""
        place, rounds = self._horizon
        scheduler = super().create_scheduler(num_training_steps * rounds, optimizer)
        if rounds > 1:
            start_schedule_at_(scheduler, place * num_training_steps)
        return scheduler

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """The parent's, once for each client: every call makes `datasets` take a fingerprint of the table."""
        if dataset is not self.train_dataset or self.guard.task is None:
            return super()._remove_unused_columns(dataset, description)
        client = self.guard.task.client_id
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
        """The parent's, of the adapter alone: nothing else has gradients, but it would ask every parameter for its own."""
        return super()._clip_grad_norm(model if self.is_fsdp_enabled else self._adapter)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the parent counts all parameters anew in every step, longer than a small model's step takes."""
        return 0

    def evaluate_metrics(self, eval_dataset: Any = None) -> dict[str, float]:
        """The trainer's evaluation without its timings; empty where there is no evaluation dataset."""
        if eval_dataset is None and self.eval_dataset is None:
            return {}
        metrics = self.evaluate(eval_dataset)
        return {key: value for key, value in metrics.items() if key != "epoch" and not key.endswith(_TIMINGS)}

    def evaluate_proxy(self, adapter: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of what a client would hold: the base with `adapter`."""
        load_adapter_(self.guard.parameters, adapter)
        return self.evaluate_metrics()

    def _lead(self, num_examples: Mapping[str, int | None], train_clients: TrainClients, resume: bool) -> TrainOutput:
        if self.args.audit:
            check_auditable(self)
        adapter = dict(self.guard.initial)
        if self.owner is not None:
            own = self.owner.initial_adapter()
            adapter |= {key: value for key, value in own.items() if "lora_" not in key}
        trackers = get_reporting_integration_callbacks(self.args.report_to)
        handler = CallbackHandler([DefaultFlowCallback, *trackers], self.model, self.processing_class, None, None)
        reporter = RoundReporter(self.args, handler)
        self.server = FederatedServer(
            self.args,
            adapter,
            self.model.peft_config["default"],
            num_examples,
            self.guard.fingerprint,
            owner=self.owner,
            evaluate_proxy=self._evaluate_together if self.eval_dataset is not None else None,
            on_round=reporter.on_round,
        )

        def train_and_report(tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            for answer in train_clients(tasks):
                yield answer
                reporter.on_client(answer.client_id)

        with reporter:
            records = self.server.run(train_and_report, resume)
            self._share("stop")
            self.guard.prove_base_unmoved()
            references = {}
            if self.owner is not None:
                if self.args.compare_full_precision:
                    references["federation in full precision"] = self.owner.run_reference()
                    if self.owner.has_rows:
                        references["owner's own rows alone"] = self.owner.run_reference(own_rows=True)
                if self.args.merge:
                    self.owner.merge(self.args.output_dir, Path(self.args.output_dir) / MERGED_DIR)
            audit = audit_federation(self) if self.args.audit else None
            reporter.finish(records, references, audit)
        if audit is not None:
            audit.check_threshold()
        self.state = TrainerState(global_step=len(records) - 1, is_world_process_zero=True)
        losses = [client["loss"] for client in records[-1]["clients"].values()]
        loss = sum(losses) / len(losses) if losses else float("nan")
        return TrainOutput(len(records) - 1, loss, records[-1]["metrics"].get("server", {}))

    def _train_clients(self, tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        began, timeout = time.monotonic(), self.args.round_timeout
        for place, task in enumerate(tasks, 1):
            if timeout is not None and time.monotonic() - began > timeout:
                yield ClientFailure(task.client_id, late_reason(timeout))
                continue
            self._share("train", task.to_bytes())
            yield self.train_client(task)
            if place % _FREEZE_EVERY == 0:
                # What is kept of each client would be walked in every later run. The last run's optimizer must not be
                # among it: what is frozen is not collected.
                self.optimizer = self.lr_scheduler = None
                self.accelerator.free_memory()
                gc.freeze()

    def _hire(self) -> ClientWorkers:
        args, blueprint = self.args, self._blueprint
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
        self._share("evaluate", encode_message("adapter", {}, adapter))
        return self.evaluate_proxy(adapter)

    def _follow(self) -> None:
        """What ranks other than 0 do: the same runs and evaluations as rank 0, which alone speaks to the server."""
        while True:
            command, data = self._receive()
            if command == "train":
                self.train_client(ClientTask.from_bytes(data))
            elif command == "evaluate":
                self.evaluate_proxy(restore_tensors(decode_message("adapter", data)[1]))
            else:
                return

    def _share(self, command: str, data: bytes = b"") -> None:
        if self.args.world_size > 1:
            broadcast_bytes(command.ljust(8).encode() + data, self.args.device)

    def _receive(self) -> tuple[str, bytes]:
        data = broadcast_bytes(None, self.args.device)
        return data[:8].decode().strip(), data[8:]

    def _resolve_model(self, model: str | torch.nn.Module, blueprint: TrainerBlueprint) -> torch.nn.Module:
        args = blueprint.args
        if not isinstance(model, str | Path):
            return model
        if (Path(model) / BASE_MANIFEST).is_file():
            blueprint.base_dir = str(model)
            return load_base(model, blueprint.model_class)
        # A name that is no base is the owner's full model, which only the owner's process may open.
        if args.full_model not in (None, "", str(model)):
            raise ValueError(
                f"model='{model}' is no quantized base (it has no {BASE_MANIFEST}), and full_model='{args.full_model}' "
                "names another full model. Give one of them."
            )
        args.full_model = blueprint.full_model = str(model)
        if args.base_bits == FULL_PRECISION:
            return load_full_model(args.full_model, blueprint.model_class, args)
        base_dir = Path(args.output_dir) / FEDERATION_DIR / "base"
        blueprint.base_dir = str(base_dir)
        if args.process_index == 0:
            self.owner = Owner(blueprint)
            # Only a federation that can be resumed keeps its base; another one may want other bits.
            if args.overwrite or not (RoundStore(args.output_dir).exists and (base_dir / BASE_MANIFEST).is_file()):
                self.owner.export_base(base_dir)
        PartialState().wait_for_everyone()
        return load_base(base_dir, blueprint.model_class)


def _add_adapter(model: torch.nn.Module, peft_config: PeftConfig | None, seed: int) -> Any:
    if isinstance(model, PeftModel):
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: say which adapter to train, e.g. LoraConfig(r=8).")
    set_seed(seed)  # every client's untouched adapter must start at the same A
    return get_peft_model(model, copy.deepcopy(peft_config))  # PEFT writes the base's path into it


class FederatedTrainer(FederatedMixin, Trainer):
    """[`~transformers.Trainer`] whose `train()` runs a federation; see [`FederatedMixin`]."""
