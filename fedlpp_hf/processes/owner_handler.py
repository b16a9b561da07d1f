# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's process: answers requests with the full model, which it alone opens."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig

from ..aggregation.products import join_residual
from ..aggregation.variate import average_variates
from ..base.calibration import Calibration, measure_moments
from ..base.export import export_base
from ..base.full_model import FullModel
from ..base.mark_keys import prepare_mark
from ..base.model_class import change_config, list_float_modules
from ..base.modules import build_meta_model
from ..base.reader import BaseReader
from ..client.checks import find_peft_model
from ..client.memory import ClientMemory
from ..hub.push import push_merged
from ..merge.merge import check_merge, merge_adapter
from ..privacy.marks import Mark
from ..tensors.adapters import load_adapter_, split_tensors, write_adapter
from ..tensors.scratch import replaced_directory
from ..wire.encoding import restore_tensors
from ..wire.messages import ClientTask, LocalOptions
from .between import moved_towards_base, open_base
from .blueprint import TrainerBlueprint
from .measurement import choose_rows, measure_rows, read_loss
from .model_check import check_adapter_fits
from .sentence_models import copy_configs, is_sentence_trainer, list_module_configs


_COMPUTED_IN_EVALUATE = ("ref_chosen_logps", "ref_rejected_logps")
OWNER_DIR = "_owner"  # beside the federation: what the owner's runs keep from round to round, as clients do


class OwnerHandler:
    """One method for each request of [`OwnerProcess`], which returns (JSON values, tensors)."""

    def __init__(self, blueprint: TrainerBlueprint, scratch: Path):
        self.blueprint, self.scratch = blueprint, scratch
        self._trainer: Any = None
        self._base_trainer: Any = None

    def export_base(self, tensors, output_dir: str, mark: list[str] | None):
        args, blueprint = self.blueprint.args, self.blueprint
        check_adapter_fits(self.source, self.config, self.model_class, blueprint.peft_config)
        configs = list_module_configs(self.source) if is_sentence_trainer(blueprint.trainer_class) else {}
        calibration = self._calibrate() if args.calibration_rows else None
        skip = list_float_modules(self.config, self.model_class, blueprint.peft_config.modules_to_save)
        manifest = export_base(
            blueprint.full_model,
            output_dir,
            bits=args.base_bits,
            block_size=args.base_block_size,
            embedding_bits=args.embedding_bits,
            skip_modules=skip,
            model_class=self.model_class,
            revision=blueprint.init_kwargs.get("revision"),
            overwrite=True,
            calibration=calibration,
            mark=None if mark is None else self._prepare_mark(mark[0], mark[1], skip),
        )
        shutil.rmtree(self._moments_dir, ignore_errors=True)
        copy_configs(configs, Path(output_dir))
        return manifest["totals"], {}

    def _calibrate(self) -> Calibration:
        """The inputs of the full model's Linears on the owner's rows, which go through the trainer as evaluation rows do."""
        args, trainer = self.blueprint.args, self.trainer
        rows = choose_rows(self._read_rows("owner"), args.calibration_rows, args.seed)
        load_adapter_(trainer.guard.parameters, trainer.guard.initial)
        return measure_moments(
            find_peft_model(trainer.model), lambda: trainer.evaluate_metrics(rows), len(rows), self._moments_dir
        )

    @property
    def _moments_dir(self) -> Path:
        return self.scratch / "moments"

    def _prepare_mark(self, key_file: str, holder: str, skip: list[str] | None) -> Mark:
        args = self.blueprint.args
        if args.base_bits not in (1, 2, 3, 4):
            raise ValueError(
                f"base_bits={args.base_bits}: only a base of 1 to 4 bits has the levels that a mark needs; leave mark_key out."
            )
        kind = type(build_meta_model(self.config, self.model_class))
        if getattr(transformers, kind.__name__, None) is not kind:
            raise ValueError(
                f"{kind.__name__} is no class of transformers, so its copies could not be traced; leave mark_key out."
            )
        # As `fedlpp-hf quantize --mark` has it, so that both can make copies with one key.
        name = None if [kind.__name__] == self.config.architectures else kind.__name__
        settings = {
            "bits": args.base_bits,
            "block_size": args.base_block_size,
            "skip_modules": skip,
            "model_class": name,
        }
        return prepare_mark(key_file, holder, self.blueprint.full_model, settings)

    def initial_adapter(self, tensors):
        return {}, self.trainer.guard.initial

    def evaluate(self, tensors, base_weight: float):
        with self._holding(tensors), self._towards_base(base_weight):
            return self.trainer.evaluate_metrics(), {}

    def measure_selection(self, tensors, base_weights: list[float]):
        losses = []
        with self._holding(tensors):
            for weight in base_weights:
                with self._towards_base(weight):
                    losses.append(read_loss(self.trainer.evaluate_metrics(self.selection_rows)))
        return {"losses": losses}, {}

    def measure_rows(self, tensors, base_weight: float):
        args = self.blueprint.args
        with self._holding(tensors), self._towards_base(base_weight):
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

    def _towards_base(self, weight: float):
        """W − λE in the place of W."""
        return moved_towards_base(find_peft_model(self.trainer.model), self.base, weight) if weight else nullcontext()

    def estimate_variate(self, tensors, round_number: int, seeds: list[int]):
        args = self.blueprint.args
        options = LocalOptions(args.aggregation, args.fedprox_mu, args.logit_adjustment)
        if self._base_trainer is None:
            self._base_trainer = self._make_trainer({"owner": self.blueprint.owner_dataset}, self.blueprint.base_dir)
        goes_on = not args.broadcasts and args.num_rounds > 1  # as the clients do
        memory_dir = Path(args.output_dir) / OWNER_DIR
        self._base_trainer.guard.memory_dir, self.trainer.guard.memory_dir = memory_dir / "base", memory_dir / "full"

        def train(trainer: Any, number: int, seed: int) -> dict[str, torch.Tensor]:
            # The order of rows and the masks of dropout follow from the task's seed.
            task = ClientTask(
                "owner",
                round_number,
                args.num_rounds,
                f"owner-{number}",
                seed,
                trainer.guard.fingerprint,
                proxy=None if goes_on else tensors,
                options=options,
            )
            if goes_on:
                trainer.guard.initial = tensors
                if round_number > 1 and not ClientMemory(trainer.guard.memory_dir, task).read():
                    raise RuntimeError(
                        f"The owner's adapters of earlier rounds are gone from `{memory_dir}`; the control variate needs them. "
                        "Put them back, or start another federation."
                    )
            rows = trainer.client_datasets["owner"]
            return restore_tensors(trainer.train_client(task, rows).delta)

        estimates = []
        for number, seed in enumerate(seeds):
            on_base, on_full = train(self._base_trainer, number, seed), train(self.trainer, number, seed)
            estimates.append({key: on_base[key] - on_full[key] for key in on_base})
        variate, share = average_variates(estimates)
        return {"share": share}, variate

    def check_merge(self, tensors, peft_config: dict[str, Any]):
        blueprint, directory = self.blueprint, self.scratch / "untrained"
        write_adapter(directory, tensors, PeftConfig.from_peft_type(**peft_config))
        revision = blueprint.init_kwargs.get("revision")
        base_dir = blueprint.base_dir if any(blueprint.args.base_weights) else None
        check_merge(
            blueprint.full_model, directory, base_dir=base_dir, model_class=self.model_class, revision=revision
        )
        return {}, {}

    def merge(self, tensors, adapter_dir: str, output_dir: str, base_weight: float):
        blueprint = self.blueprint
        revision = blueprint.init_kwargs.get("revision")
        with replaced_directory(Path(output_dir), "merging into") as fresh:
            merge_adapter(
                blueprint.full_model,
                adapter_dir,
                fresh,
                base_dir=blueprint.base_dir if base_weight else None,
                base_weight=base_weight,
                model_class=self.model_class,
                revision=revision,
            )
            change_config(fresh, blueprint.init_kwargs)
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

    @cached_property
    def selection_rows(self) -> Any:
        """The selection rows, prepared as a client's are."""
        return self._read_rows("selection")

    def _read_rows(self, name: str) -> Any:
        """The owner's rows to evaluate on: the `selection`, or the `owner`'s."""
        rows = self.trainer.client_datasets[name]
        # DPO's `evaluate` computes the reference's part anew, and a table can't have it twice.
        computed = [name for name in getattr(rows, "column_names", None) or () if name in _COMPUTED_IN_EVALUATE]
        return rows.remove_columns(computed) if computed else rows

    @cached_property
    def base(self) -> BaseReader:
        return open_base(find_peft_model(self.trainer.model), self.blueprint.base_dir)

    @property
    def trainer(self):
        if self._trainer is None:
            rows = {"owner": self.blueprint.owner_dataset, "selection": self.blueprint.selection_dataset}
            rows = {name: dataset for name, dataset in rows.items() if dataset is not None}
            if not rows:  # some trainers insist on training rows even to evaluate; these are never trained on
                evaluated = self.blueprint.trainer_arguments.get("eval_dataset")
                evaluated = next(iter(evaluated.values())) if isinstance(evaluated, dict) else evaluated
                rows = {} if evaluated is None else {"owner": evaluated}
            self._trainer = self._make_trainer(rows)
        return self._trainer

    def _make_trainer(self, datasets: Mapping[str, Any], base_dir: str = "", reference: bool = False):
        return self.blueprint.build(datasets, self.scratch / "trainer", base_dir, reference)
