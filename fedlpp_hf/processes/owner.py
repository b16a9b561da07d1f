# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The handle on the owner's process, the only one that opens the full model.

In simulation that process is spawned beside the clients' one, exports the base, evaluates the server's model W + θ in
each round, and merges at the end. It is asked over a pipe and answers in adapters, metrics and paths: requests and answers
are messages of safetensors and JSON, so that no full-precision weight and no pickle comes back.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..tensors.adapters import scrub_config
from ..wire.encoding import restore_tensors
from .blueprint import TrainerBlueprint
from .measurement import RowMeasures
from .service import Answer, Service


class OwnerProcess:
    """The [`Owner`] that the server asks, in a process. Every method is one request to it.

    Raises:
        RuntimeError: from any method, if the process died or failed unexpectedly.
        ValueError: from any method, if the owner refused its input.
    """

    def __init__(self, blueprint: TrainerBlueprint):
        args = blueprint.args
        variate = args.control_variate
        if variate and blueprint.owner_dataset is None:
            raise ValueError(f"control_variate={variate} needs rows of the owner; pass `owner_dataset`.")
        if args.calibration_rows and not hasattr(blueprint.owner_dataset, "__len__"):
            given = "none" if blueprint.owner_dataset is None else f"a {type(blueprint.owner_dataset).__name__}"
            raise ValueError(
                f"calibration_rows={args.calibration_rows} needs rows of the owner; `owner_dataset` is {given}, expected a Dataset."
            )
        needs_base = {
            "control_variate": variate,
            "base_weights": args.base_weights if any(args.base_weights) else None,
        }
        for name, value in needs_base.items():
            if value and not blueprint.base_dir:
                raise ValueError(
                    f"{name}={value}: the owner needs the base, too, as a directory. Pass `model` as the path of the "
                    "full model or of a base written by `fedlpp-hf quantize`, and set base_bits below 32."
                )
        self.has_rows = blueprint.owner_dataset is not None
        self.selects = blueprint.selection_dataset is not None
        self.works_ahead = True  # False where clients on this machine leave no core free: both would take longer
        # Round and seeds of an estimate that nobody has asked for yet, and its answer, once other questions had to wait for it.
        self._begun: tuple[int, list[int]] | None = None
        self._early: Answer | None = None
        self._service = Service("owner", _make_handler, blueprint)

    def export_base(self, output_dir: str | os.PathLike, mark: tuple[str, str] | None = None) -> dict[str, Any]:
        """Write the quantized base to `output_dir`; returns the totals of its manifest.

        Args:
            output_dir: A directory.
            mark: The owner's key file, and whose copy this is.
        """
        return self._ask("export_base", output_dir=str(output_dir), mark=mark)[0]

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        """The adapter as it starts on the full model: LoRA at its init, `modules_to_save` as the full model has them."""
        return self._ask("initial_adapter")[1]

    def evaluate(
        self,
        adapter: Mapping[str, torch.Tensor],
        residual: Mapping[str, torch.Tensor] | None = None,
        base_weight: float = 0.0,
    ) -> dict[str, float]:
        """Metrics of W − λE + θ on the evaluation dataset.

        Args:
            adapter: θ.
            residual: What θ's rank could not hold.
            base_weight: λ; E = W − Q(W).
        """
        return self._ask("evaluate", _pack_adapter(adapter, residual), base_weight=base_weight)[0]

    def measure_selection(
        self,
        adapter: Mapping[str, torch.Tensor],
        residual: Mapping[str, torch.Tensor],
        base_weights: Sequence[float],
    ) -> list[float]:
        """The loss of W − λE + θ on the selection rows, for each λ; infinite where it is no number.

        Raises:
            ValueError: if these rows have no loss.
        """
        packed = _pack_adapter(adapter, residual)
        return self._ask("measure_selection", packed, base_weights=list(base_weights))[0]["losses"]

    def measure_rows(
        self,
        adapter: Mapping[str, torch.Tensor],
        residual: Mapping[str, torch.Tensor] | None = None,
        base_weight: float = 0.0,
    ) -> RowMeasures:
        """W − λE + θ, as in [`evaluate`], on each of the evaluation rows that the audit compares models on."""
        answer, tensors = self._ask("measure_rows", _pack_adapter(adapter, residual), base_weight=base_weight)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return RowMeasures(arrays["loss"], arrays.get("accuracy"), answer["num_outputs"])

    def begin_variate(self, start: Mapping[str, torch.Tensor], round_number: int, seeds: Sequence[int]) -> None:
        """Begin [`estimate_variate`] of the same arguments, where `works_ahead`, and do not wait for it."""
        if self.works_ahead:
            self._receive_begun()  # of a round that failed
            self._service.send("estimate_variate", start, round_number=round_number, seeds=list(seeds))
            self._begun, self._early = (round_number, list(seeds)), None

    def estimate_variate(
        self, start: Mapping[str, torch.Tensor], round_number: int, seeds: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """What the quantizer adds to the update of a local run from `start`, where the round's clients start, too.

        The owner runs a client's task on its own rows twice, with the same batches and the same dropout: on the base, as
        a client does, and on W. What both updates have in common is the task; the difference, Δ(Q(W)) − Δ(W), is what
        compensates the quantizer, and common random numbers leave little else in it. Each of `seeds` makes such a pair
        with other batches; [`average_variates`] of them, and the share that is not chance, are returned.
        """
        if self._begun == (round_number, list(seeds)):
            answer, payload = self._receive_begun()
            self._begun = self._early = None
            return restore_tensors(payload), answer["share"]
        answer, variate = self._ask("estimate_variate", start, round_number=round_number, seeds=list(seeds))
        return variate, answer["share"]

    def check_merge(self, adapter: Mapping[str, torch.Tensor], peft_config: PeftConfig) -> None:
        """Refuse an adapter that [`merge`] could not merge in the end."""
        self._ask("check_merge", adapter, peft_config=scrub_config(peft_config))

    def merge(self, adapter_dir: str | os.PathLike, output_dir: str | os.PathLike, base_weight: float = 0.0) -> None:
        """Write the full model W − λE with the adapter merged into it, λ being `base_weight`."""
        self._ask("merge", adapter_dir=str(adapter_dir), output_dir=str(output_dir), base_weight=base_weight)

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
        self._receive_begun()
        answer, payload = self._service.ask(command, tensors, **arguments)
        return answer, restore_tensors(payload)

    def _receive_begun(self) -> Answer:
        """The answer to what was begun, if anything was: the process answers in turn."""
        begun, self._begun = self._begun, None  # nothing is left to wait for where this raises
        if begun is not None and self._early is None:
            self._early = self._service.receive()
        self._begun = begun
        return self._early or ({}, {})


def _pack_adapter(
    adapter: Mapping[str, torch.Tensor], residual: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    tensors = {f"adapter:{key}": value for key, value in adapter.items()}
    return tensors | {f"residual:{key}": value for key, value in (residual or {}).items()}


def _make_handler(blueprint: TrainerBlueprint, scratch: Path) -> Any:
    from .owner_handler import OwnerHandler  # in the owner's process: no other one loads what exports and merges

    return OwnerHandler(blueprint, scratch)
