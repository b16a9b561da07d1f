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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One target of an adapter: the keys of its factors and the scale s in ΔW = s·B·A."""

    module: str
    key_a: str
    key_b: str
    scale: float


def adapter_parameters(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.nn.Parameter]:
    """The live parameters of an adapter (LoRA factors and `modules_to_save`) by their key in a PEFT repository."""
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


def lora_factors(keys: Iterable[str], peft_config: PeftConfig | Mapping[str, Any]) -> dict[str, LoraFactors]:
    """The LoRA targets among an adapter's `keys`, by module path (without PEFT's prefix).

    `lora_A` `(r, in)`, `lora_B` `(out, r)` (for embeddings `lora_embedding_A` `(r, vocabulary)`, `lora_embedding_B`
    `(dim, r)`); ΔW = s·B·A, s = α/r (LoRA, arXiv 2106.09685, §4.1) or α/√r (rsLoRA, arXiv 2312.03732), with PEFT's
    `rank_pattern` and `alpha_pattern`.

    Raises:
        ValueError: if a factor has no partner.
    """
    keys = set(keys)
    targets = {}
    for key in sorted(keys):
        for name_a, name_b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if f".{name_b}" in key and key.replace(f".{name_b}", f".{name_a}") not in keys:
                raise ValueError(f"The adapter has `{key}` but not its partner `{name_a}`. Save it again.")
            if f".{name_a}" not in key:
                continue
            key_b = key.replace(f".{name_a}", f".{name_b}")
            if key_b not in keys:
                raise ValueError(f"The adapter has `{key}` but not its partner `{name_b}`. Save it again.")
            module = key.split(f".{name_a}")[0].removeprefix(PREFIX)
            targets[module] = LoraFactors(module, key, key_b, lora_scale(peft_config, module))
    return targets


def lora_scale(peft_config: PeftConfig | Mapping[str, Any], module: str) -> float:
    """The scale s of a target's ΔW = s·B·A; sources at [`lora_factors`].

    Raises:
        ValueError: if the configuration has no numbers for it.
    """
    config: Mapping[str, Any] = peft_config if isinstance(peft_config, Mapping) else peft_config.to_dict()
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not (isinstance(ranks, Mapping) and isinstance(alphas, Mapping)):
        raise ValueError(
            f"adapter_config.json is not a configuration of LoRA: it has rank_pattern={ranks!r:.80} and "
            f"alpha_pattern={alphas!r:.80}; expected names with numbers."
        )
    rank = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(
            f"adapter_config.json is not a configuration of LoRA: it has r={rank!r:.80} and lora_alpha={alpha!r:.80} for "
            f"`{module}`; expected two numbers."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration of a PEFT repository on disk. Only safetensors are read.

    Raises:
        ValueError: if a file is missing, truncated or not what its name says.
    """
    directory = Path(directory)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (directory / name).is_file():
            raise ValueError(f"`{directory}` has no `{name}`; expected a PEFT adapter saved as safetensors.")
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"its configuration is a {type(config).__name__}, expected an object")
        return load_file(directory / ADAPTER_WEIGHTS), config
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"The adapter in `{directory}` can't be read ({error}); is it truncated?") from error


def write_adapter(directory: str | os.PathLike, tensors: Mapping[str, torch.Tensor], peft_config: PeftConfig) -> None:
    """Write a plain PEFT repository, without the path or name of the base that PEFT would put into it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(scrub_config(peft_config), indent=2, sort_keys=True) + "\n")


def scrub_config(peft_config: PeftConfig) -> dict[str, Any]:
    """`peft_config` as JSON values, without what would tell the owner's paths."""
    config = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in peft_config.to_dict().items()
    }
    return config | {"base_model_name_or_path": None, "revision": None, "inference_mode": True}
