# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters as dictionaries of tensors: strict reading, writing, checking, and loading into a live model in place.

The keys are those of a PEFT repository (`base_model.model.<module>.lora_A.weight`, no adapter name): every adapter
this library writes is a plain PEFT repository.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .lora import read_config
from .names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def adapter_parameters(model: "PeftModel", adapter_name: str = "default") -> dict[str, torch.nn.Parameter]:
    """The live parameters of an adapter (LoRA factors and `modules_to_save`) by their key in a PEFT repository."""
    from peft.utils import get_peft_model_state_dict

    named = dict(model.named_parameters(remove_duplicate=False))
    # `save_embedding_layers="auto"` would ask the Hub, and could add full-precision embeddings of the base.
    return get_peft_model_state_dict(model, named, adapter_name, save_embedding_layers=False)


def copy_adapter(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of live parameters as float32 tensors on the CPU."""
    return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in parameters.items()}


def global_norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def split_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those of `tensors` whose key begins with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def load_adapter_(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into live parameters, all or none.

    In place, because an optimizer that is already built would go on training the replaced parameters.

    Raises:
        ValueError: for missing or unknown keys, other shapes, or values that are not finite.
    """
    check_tensors(tensors, parameters)
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def check_tensors(
    tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], what: str = "adapter"
) -> None:
    """Refuse `tensors` that differ from `reference` in keys or shapes, or are not finite floating point.

    Raises:
        ValueError: naming the first offending key.
    """
    check_keys(tensors, reference, what)
    for key, tensor in tensors.items():
        if tensor.shape != reference[key].shape:
            raise ValueError(
                f"The {what}'s `{key}` has shape {tuple(tensor.shape)}; expected {tuple(reference[key].shape)}. "
                "Was it made with another rank, or for another model?"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"The {what}'s `{key}` is of {tensor.dtype}; expected a floating point tensor.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"The {what}'s `{key}` has values that are NaN or infinite; did its training diverge?")


def check_keys(given: Iterable[str], expected: Iterable[str], what: str = "adapter") -> None:
    """Refuse names that are missing or unknown.

    Raises:
        ValueError: naming them, with the nearest expected name of the first unknown one.
    """
    given, expected = set(given), set(expected)
    if given == expected:
        return
    unknown, missing = sorted(given - expected), sorted(expected - given)
    problems = []
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], expected, 1)
        problems.append(f"unknown: {_shorten(unknown)}" + (f" (nearest: {nearest[0]})" if nearest else ""))
    if missing:
        problems.append(f"missing: {_shorten(missing)}")
    raise ValueError(
        f"The {what}'s tensors are not those expected: {'; '.join(problems)}. Check that `target_modules` and "
        "`modules_to_save` are the same on both sides."
    )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration of a PEFT repository on disk. Only safetensors are read.

    Raises:
        ValueError: if a file is missing, truncated or not what its name says.
    """
    config = read_config(directory)
    try:
        return load_file(Path(directory) / ADAPTER_WEIGHTS), config
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"The adapter in `{directory}` can't be read ({error}); is it truncated?") from error


def write_adapter(
    directory: str | os.PathLike, tensors: Mapping[str, torch.Tensor], peft_config: "PeftConfig"
) -> None:
    """Write a plain PEFT repository, without the path or name of the base that PEFT would put into it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(scrub_config(peft_config), indent=2, sort_keys=True) + "\n")


def scrub_config(peft_config: "PeftConfig") -> dict[str, Any]:
    """`peft_config` as JSON values, without what would tell the owner's paths."""
    config = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in peft_config.to_dict().items()
    }
    return config | {"base_model_name_or_path": None, "revision": None, "inference_mode": True}
