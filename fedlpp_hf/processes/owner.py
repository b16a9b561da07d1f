# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's process: the only one that opens the full model.

In simulation it is spawned beside the clients' process, exports the base, evaluates the server's model W + θ in each
round, and merges at the end. It is asked over a pipe and answers in adapters, metrics and paths: requests and answers
are messages of safetensors and JSON, so that no full-precision weight and no pickle comes back.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..aggregation.products import join_residual
from ..aggregation.variate import average_repairs
from ..base.export import export_base
from ..hub.push import push_merged
from ..merge.merge import merge_adapter
from ..tensors.adapters import load_adapter_, split_tensors
from ..tensors.quantization import FULL_PRECISION
from ..wire.messages import ClientTask, LocalOptions, restore_tensors
from .blueprint import TrainerBlueprint
from .measurement import RowMeasures, choose_rows, measure_rows
from .service import Service


# The step sizes that the owner tries on its own data: a one-shot mean may need a longer or a shorter step.
STEP_GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class Owner:
    """A handle on the owner's process. Every method is one request to it.

    Raises:
        RuntimeError: from any method, if the process died or failed unexpectedly.
        ValueError: from any method, if the owner refused its input.
    """

    def __init__(self, blueprint: TrainerBlueprint):
        for option in ("fit_server_step", "control_variate"):
            if getattr(blueprint.args, option) and blueprint.owner_dataset is None:
                raise ValueError(
                    f"{option}={getattr(blueprint.args, option)} needs rows of the owner's own; pass `owner_dataset`."
                )
        if blueprint.args.control_variate and not blueprint.base_dir:
            raise ValueError(
                f"control_variate={blueprint.args.control_variate}: the owner trains on the base, too, and needs it as a "
                "directory that `fedlpp-hf quantize` or the federation wrote; give `model` as a path, base_bits below 32."
            )
        self.has_rows = blueprint.owner_dataset is not None
        self._service = Service("owner", _Desk, blueprint)

    def export_base(self, output_dir: str | os.PathLike) -> dict[str, Any]:
        """Write the quantized base to `output_dir`; returns the totals of its manifest."""
        return self._ask("export_base", output_dir=str(output_dir))[0]

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        """The adapter as it starts on the full model: LoRA at its init, `modules_to_save` as the full model has them."""
        return self._ask("initial_adapter")[1]

    def evaluate(
        self, adapter: Mapping[str, torch.Tensor], residual: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, float]:
        """Metrics of W + θ on the evaluation dataset; `residual` is what θ's rank could not hold."""
        return self._ask("evaluate", _pack_adapter(adapter, residual))[0]

    def measure_rows(
        self, adapter: Mapping[str, torch.Tensor], residual: Mapping[str, torch.Tensor] | None = None
    ) -> RowMeasures:
        """W + θ on each of the evaluation rows that the audit compares models on."""
        answer, tensors = self._ask("measure_rows", _pack_adapter(adapter, residual))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return RowMeasures(arrays["loss"], arrays.get("accuracy"), answer["num_outputs"])

    def fit_step(self, adapter: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor]) -> float:
        """The η of [`STEP_GRID`] for which W + θ + η·Δ has the least loss on the owner's own data."""
        tensors = {f"adapter:{key}": value for key, value in adapter.items()}
        tensors |= {f"delta:{key}": value for key, value in delta.items()}
        return self._ask("fit_step", tensors)[0]["step"]

    def estimate_repair(
        self, start: Mapping[str, torch.Tensor], round_number: int, seeds: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """What the quantizer makes of a local run's update from `start`, which is what the round's clients start from.

        The owner runs a client's task on its own rows twice, with the same batches and the same dropout: on the base, as
        a client does, and on W. What both updates have in common is the task; the difference, Δ(Q(W)) − Δ(W), is what
        repairs the base, and common random numbers leave little else in it. Each of `seeds` makes such a pair with other
        batches; [`average_repairs`] of them, and the share that is no chance, are returned.
        """
        answer, repair = self._ask("estimate_repair", start, round_number=round_number, seeds=list(seeds))
        return repair, answer["share"]

    def merge(self, adapter_dir: str | os.PathLike, output_dir: str | os.PathLike) -> None:
        """Write the full model with the adapter merged into it."""
        self._ask("merge", adapter_dir=str(adapter_dir), output_dir=str(output_dir))

    def push_merged(self, directory: str | os.PathLike, repo_id: str, **options: Any) -> str:
        """Push a merged model by [`push_merged`]; returns the commit's address."""
        return self._ask("push_merged", directory=str(directory), repo_id=repo_id, options=options)[0]["commit_url"]

    def run_reference(self, own_rows: bool = False) -> dict[str, float]:
        """Metrics of the same federation without any quantization, after its last round.

        With `own_rows` the owner is its only client: what it could have had without all others.
        """
        return self._ask("run_reference", own_rows=own_rows)[0]

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._service.close()

    def _ask(
        self, command: str, tensors: Mapping[str, torch.Tensor] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        answer, payload = self._service.ask(command, tensors, **arguments)
        return answer, restore_tensors(payload)


def _pack_adapter(
    adapter: Mapping[str, torch.Tensor], residual: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    tensors = {f"adapter:{key}": value for key, value in adapter.items()}
    return tensors | {f"residual:{key}": value for key, value in (residual or {}).items()}


class _Desk:
    """The owner's side of [`Owner`]: one method per request, each returning (JSON values, tensors)."""

    def __init__(self, blueprint: TrainerBlueprint, scratch: Path):
        self.blueprint, self.scratch = blueprint, scratch
        self._trainer: Any = None
        self._base_trainer: Any = None

    def export_base(self, tensors, output_dir: str):
        args = self.blueprint.args
        manifest = export_base(
            self.blueprint.full_model,
            output_dir,
            bits=args.base_bits,
            block_size=args.base_block_size,
            double_quant=args.double_quant,
            embedding_bits=args.embedding_bits,
            model_class=self.blueprint.model_class,
            overwrite=True,
        )
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
        joined, _ = join_residual(adapter, residual, self.trainer.model.peft_config["default"])
        small = {key: parameter.data for key, parameter in parameters.items()}
        try:
            for key, parameter in parameters.items():
                parameter.data = joined[key].to(parameter)  # LoRA's layers multiply factors of any rank
            yield
        finally:
            for key, parameter in parameters.items():
                parameter.data = small[key]

    def fit_step(self, tensors):
        adapter, delta = split_tensors(tensors, "adapter:"), split_tensors(tensors, "delta:")
        losses = {}
        for step in STEP_GRID:
            moved = {key: value + step * delta[key] if key in delta else value for key, value in adapter.items()}
            load_adapter_(self.trainer.guard.parameters, moved)
            losses[step] = self.trainer.evaluate_metrics(self.trainer.client_datasets["owner"])["eval_loss"]
        return {"step": min(losses, key=losses.__getitem__)}, {}

    def estimate_repair(self, tensors, round_number: int, seeds: list[int]):
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

        repairs = []
        for seed in seeds:
            on_base, on_full = train(self._base_trainer, seed), train(self.trainer, seed)
            repairs.append({key: on_base[key] - on_full[key] for key in on_base})
        repair, share = average_repairs(repairs)
        return {"share": share}, repair

    def merge(self, tensors, adapter_dir: str, output_dir: str):
        # The model of an earlier run stays until there is another to take its place.
        fresh = Path(f"{output_dir}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        merge_adapter(self.blueprint.full_model, adapter_dir, fresh, model_class=self.blueprint.model_class)
        shutil.rmtree(output_dir, ignore_errors=True)
        os.replace(fresh, output_dir)
        return {}, {}

    def push_merged(self, tensors, directory: str, repo_id: str, options: dict[str, Any]):
        options = {"source": self.blueprint.full_model, "token": self.blueprint.args.hub_token, **options}
        return {"commit_url": push_merged(directory, repo_id, **options).commit_url}, {}

    def run_reference(self, tensors, own_rows: bool):
        datasets = {"owner": self.blueprint.owner_dataset} if own_rows else self.blueprint.client_datasets
        trainer = self._make_trainer(datasets)
        trainer.train()
        load_adapter_(trainer.guard.parameters, trainer.server.adapter)
        return trainer.evaluate_metrics(), {}

    @property
    def trainer(self):
        if self._trainer is None:
            rows = self.blueprint.owner_dataset
            if rows is None:  # some trainers insist on training rows even to evaluate; these are never trained on
                rows = self.blueprint.trainer_arguments.get("eval_dataset")
                rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
            self._trainer = self._make_trainer({} if rows is None else {"owner": rows})
        return self._trainer

    def _make_trainer(self, datasets: Mapping[str, Any], base_dir: str = ""):
        return self.blueprint.build(datasets, self.scratch / "trainer", base_dir, adapter_bits=FULL_PRECISION)
