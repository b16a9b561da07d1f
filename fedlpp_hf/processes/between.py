# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Holding W − λE, E = W − Q(W), in the place of W: a model between the owner's and what clients compute with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from ..base.reader import BaseReader


# Layers that PEFT keeps beside those that it trains in their place.
_REPLACED = (".original_module.", ".modules_to_save.")


def open_base(model: PeftModel, base_dir: str) -> BaseReader:
    """The base, by the names that the full model's parameters have below their adapters.

    Raises:
        ValueError: if it is a base of another model.
    """
    inner = model.get_base_model()
    shapes = {_plain_name(name): tuple(tensor.shape) for name, tensor in inner.state_dict().items() if _is_own(name)}
    transposed = {
        f"{_plain_name(name)}.weight" for name, module in inner.named_modules() if type(module).__name__ == "Conv1D"
    }
    return BaseReader(base_dir, shapes, transposed, inner.base_model_prefix)


@contextmanager
def moved_towards_base(model: PeftModel, base: BaseReader, weight: float) -> Iterator[None]:
    """Hold W − `weight`·E in the place of W, for every weight that the base has quantized; then W again, bit-identical.

    Args:
        model: The full model with its adapter.
        base: Of it.
        weight: λ, from 0 to 1.
    """
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        for name, parameter in model.get_base_model().named_parameters() if weight else ():
            plain = _plain_name(name)
            if not _is_own(name) or not base.is_quantized(plain):
                continue
            own = parameter.data
            moved = own.float().lerp(base.read(plain).to(own.device), weight)  # as the merge computes it
            kept.append((parameter, own))
            parameter.data = moved.to(own.dtype)
        yield
    finally:
        for parameter, own in kept:
            parameter.data = own


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


def _is_own(name: str) -> bool:
    return ".lora_" not in name and not any(part in f".{name}" for part in _REPLACED)
