# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's process: answers requests with the full model, which it alone opens."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..aggregation.products import join_residual
from ..aggregation.variate import average_variates
from ..base.export import export_base
from ..base.full_model import FullModel
from ..base.model_class import change_config, list_float_modules
from ..hub.push import push_merged
from ..merge.merge import check_merge, merge_adapter
from ..tensors.adapters import load_adapter_, split_tensors, write_adapter
from ..wire.encoding import restore_tensors
from ..wire.messages import ClientTask, LocalOptions
from .blueprint import TrainerBlueprint
from .measurement import choose_rows, measure_rows
from .model_check import check_adapter_fits
from .sentence_models import copy_modules, is_sentence_trainer


class OwnerHandler:
    """One method for each request of [`OwnerProcess`], which returns (JSON values, tensors)."""

    def __init__(self, blueprint: TrainerBlueprint, scratch: Path):
        self.blueprint, self.scratch = blueprint, scratch
        self._trainer: Any = None
        self._base_trainer: Any = None

    def export_base(self, tensors, output_dir: str):
        args, blueprint = self.blueprint.args, self.blueprint
        check_adapter_fits(self.source, self.config, self.model_class, blueprint.peft_config)
        manifest = export_base(
            blueprint.full_model,
            output_dir,
            bits=args.base_bits,
            block_size=args.base_block_size,
            double_quant=args.double_quant,
            embedding_bits=args.embedding_bits,
            skip_modules=list_float_modules(self.config, self.model_class, blueprint.peft_config.modules_to_save),
            model_class=self.model_class,
            revision=blueprint.init_kwargs.get("revision"),
            overwrite=True,
        )
        if is_sentence_trainer(blueprint.trainer_class):
            copy_modules(self.source, Path(output_dir))
        return manifest["totals"], {}

    def initial_adapter(self, tensors):
        return {}, self.trainer.guard.initial

    def evaluate(self, tensors):
        with self._holding(tensors):
            return self.trainer.evaluate_metrics(), {}

    def measure_rows(self, tensors):
        args = self.blueprint.args
        with self._holding(tensors):
            rows = choose_rows(self.trainer.eval_dataset, args.audit_rows, args.seed)
            found = measure_rows(self.trainer, rows)
        arrays = {name: torch.from_numpy(values) for name, values in found.measures.items()}
        return {"num_outputs": found.num_outputs}, arrays

    @contextmanager
    def _holding(self, tensors) -> Iterator[None]:
        """The full model with an adapter, and with what the adapter's rank could not hold."""
        adapter, residual = split_tensors(tensors, "adapter:"), split_tensors(tensors, "residual:")
        parameters = self.trainer.guard.parameters
        load_adapter_(parameters, adapter)
        if not residual:
            yield
            return
        joined, _ = join_residual(adapter, residual, self.trainer.guard.peft_config)
        small = {key: parameter.data for key, parameter in parameters.items()}
        try:
            for key, parameter in parameters.items():
                parameter.data = joined[key].to(parameter)  # LoRA's layers multiply factors of any rank
            yield
        finally:
            for key, parameter in parameters.items():
                parameter.data = small[key]

    def estimate_variate(self, tensors, round_number: int, seeds: list[int]):
        args = self.blueprint.args
        options = LocalOptions(rule=args.aggregation, proximal_mu=args.fedprox_mu)
        if self._base_trainer is None:
            self._base_trainer = self._make_trainer({"owner": self.blueprint.owner_dataset}, self.blueprint.base_dir)

        def train(trainer: Any, seed: int) -> dict[str, torch.Tensor]:
            # The order of rows and the masks of dropout follow from the task's seed.
            fingerprint = trainer.guard.fingerprint
            task = ClientTask(
                "owner", round_number, args.num_rounds, "owner", seed, fingerprint, proxy=tensors, options=options
            )
            return restore_tensors(trainer.train_client(task).delta)

        estimates = []
        for seed in seeds:
            on_base, on_full = train(self._base_trainer, seed), train(self.trainer, seed)
            estimates.append({key: on_base[key] - on_full[key] for key in on_base})
        variate, share = average_variates(estimates)
        return {"share": share}, variate

    def check_merge(self, tensors, peft_config: dict[str, Any]):
        blueprint, directory = self.blueprint, self.scratch / "untrained"
        write_adapter(directory, tensors, PeftConfig.from_peft_type(**peft_config))
        revision = blueprint.init_kwargs.get("revision")
        check_merge(blueprint.full_model, directory, model_class=self.model_class, revision=revision)
        return {}, {}

    def merge(self, tensors, adapter_dir: str, output_dir: str):
        # The model of an earlier run stays until there is another to take its place.
        fresh = Path(f"{output_dir}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        blueprint = self.blueprint
        revision = blueprint.init_kwargs.get("revision")
        merge_adapter(blueprint.full_model, adapter_dir, fresh, model_class=self.model_class, revision=revision)
        change_config(fresh, blueprint.init_kwargs)
        shutil.rmtree(output_dir, ignore_errors=True)
        os.replace(fresh, output_dir)
        return {}, {}

    def push_merged(self, tensors, directory: str, repo_id: str, options: dict[str, Any]):
        options = {"source": self.blueprint.full_model, "token": self.blueprint.args.hub_token, **options}
        return {"commit_url": push_merged(directory, repo_id, **options).commit_url}, {}

    def run_reference(self, tensors, own_rows: bool):
        datasets = {"owner": self.blueprint.owner_dataset} if own_rows else self.blueprint.client_datasets
        trainer = self._make_trainer(datasets, reference=True)
        trainer.train()
        load_adapter_(trainer.guard.parameters, trainer.server.adapter)
        return trainer.evaluate_metrics(), {}

    @cached_property
    def source(self) -> FullModel:
        return FullModel(self.blueprint.full_model, self.blueprint.init_kwargs.get("revision"))

    @cached_property
    def config(self) -> Any:
        return self.source.read_config()

    @property
    def model_class(self) -> Any:
        return self.blueprint.choose_class(self.config)

    @property
    def trainer(self):
        if self._trainer is None:
            rows = self.blueprint.owner_dataset
            if rows is None:  # some trainers insist on training rows even to evaluate; these are never trained on
                rows = self.blueprint.trainer_arguments.get("eval_dataset")
                rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
            self._trainer = self._make_trainer({} if rows is None else {"owner": rows})
        return self._trainer

    def _make_trainer(self, datasets: Mapping[str, Any], base_dir: str = "", reference: bool = False):
        return self.blueprint.build(datasets, self.scratch / "trainer", base_dir, reference)
