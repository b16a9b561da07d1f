# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a model's Linears are given on the owner's rows: their inputs' second moments, for [`round_with_compensation`]."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from .modules import list_linears


_PASS_BYTES = 4 * 10**9  # of moments in memory
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The moments Σ x xᵀ `(in, in)` float32 of the inputs x of a model's Linears over `rows` rows.

    `files` names the file of each module that was given any input.
    """

    files: Mapping[str, Path]
    rows: int

    def read(self, module: str) -> torch.Tensor | None:
        """The moments of a module's inputs, or None if the rows did not reach it."""
        path = self.files.get(module)
        return None if path is None else load_file(path)["moments"]


def measure_moments(
    model: nn.Module, run: Callable[[], object], rows: int, directory: str | os.PathLike, pass_bytes: int = _PASS_BYTES
) -> Calibration:
    """Measure the moments of the inputs of a model's Linears, in as many passes over the rows as memory asks for.

    Args:
        model: The full model; an adapter on it is left out of the names. Padding, by the model's attention mask, does not
            count.
        run: Passes all rows through the model; the same ones at each call.
        rows: Their number.
        directory: Where the moments are kept, `in²` float32 for each Linear.
        pass_bytes: Bytes of moments in memory.

    Raises:
        ValueError: if no row reaches any Linear.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    linears = {name: inner.get_submodule(name) for name in sorted(list_linears(inner)) if ".lora_" not in name}
    modules = {name.removesuffix(".base_layer"): module for name, module in linears.items()}
    files: dict[str, Path] = {}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for group in _group(modules, pass_bytes):
        with _recording(model, group) as found:
            run()
        for name, moments in found.items():
            files[name] = Path(directory) / f"{len(files)}.safetensors"
            save_file({"moments": moments.cpu()}, files[name])
    if not files:
        raise ValueError(
            f"None of {rows} calibration rows reached a Linear of the model, so the base can't be calibrated on them. Pass "
            "rows that the trainer can evaluate, or set calibration_rows=0."
        )
    return Calibration(files, rows)


def _group(modules: Mapping[str, nn.Module], pass_bytes: int) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    size = 0
    for name, module in modules.items():
        own = 4 * _count_inputs(module) ** 2
        if group and size + own > pass_bytes:
            yield group
            group, size = {}, 0
        group[name] = module
        size += own
    if group:
        yield group


def _count_inputs(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]  # a Conv1D's is (in, out)


@contextmanager
def _recording(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum the moments of the inputs of `modules`, by name, while the block runs."""
    found: dict[str, torch.Tensor] = {}
    masks: dict[tuple[int, ...], torch.Tensor] = {}

    def note_masks(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.clear()
        for mask in (kwargs.get(name) for name in reversed(_MASKS)):
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                masks[tuple(mask.shape)] = mask.bool()

    def record(name: str) -> Callable[[nn.Module, tuple], None]:
        def add(module: nn.Module, args: tuple) -> None:
            inputs = args[0].detach()
            mask = masks.get(tuple(inputs.shape[:-1]))
            inputs = inputs.flatten(0, -2) if mask is None else inputs[mask]
            # Under autocast the product of float32 values would be rounded to 16 bits, and not positive definite.
            with torch.autocast(inputs.device.type, enabled=False):
                moments = inputs.float().T @ inputs.float()
            found[name] = found[name] + moments if name in found else moments

        return add

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    hooks.append(model.register_forward_pre_hook(note_masks, with_kwargs=True))
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
