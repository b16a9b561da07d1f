# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What an adapter on disk says of itself, without its values: its configuration, its tensors' shapes, its LoRA targets.

It needs no torch, and PEFT only for an adapter with patterns: a command answers at once.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .headers import TensorRange, parse_header, read_header
from .names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


if TYPE_CHECKING:
    from peft import PeftConfig

PREFIX = "base_model.model."
_MOST_CONFIG_BYTES = 16 << 20  # 100,000 names of modules take half of it


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One target of an adapter: the keys of its factors and the scale s in ΔW = s·B·A."""

    module: str
    key_a: str
    key_b: str
    scale: float


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a PEFT repository on disk, which has weights, too.

    Raises:
        ValueError: if a file is missing, or the configuration is none.
    """
    directory = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"`{directory}` has no `{name}`; expected a PEFT adapter saved as safetensors.")
    check_config_size(directory)
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"its configuration is a {type(config).__name__}, expected an object")
        return config
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The adapter in `{directory}` can't be read ({error}); is it truncated?") from error


def check_config_size(directory: Path) -> None:
    """Refuse a configuration that would take all memory to read.

    Raises:
        ValueError: with its size.
    """
    if (size := (directory / ADAPTER_CONFIG).stat().st_size) > _MOST_CONFIG_BYTES:
        raise ValueError(
            f"`{directory / ADAPTER_CONFIG}` has {size} bytes; expected at most {_MOST_CONFIG_BYTES}, which name more modules "
            "than a model has."
        )


def read_shapes(directory: str | os.PathLike) -> dict[str, TensorRange]:
    """The tensors of a PEFT repository on disk, in the order of their bytes, without their values.

    Raises:
        ValueError: if the file is missing, damaged or truncated.
    """
    path = Path(directory) / ADAPTER_WEIGHTS
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = read_header(size, lambda start, length: os.pread(file.fileno(), length, start))
        return parse_header(header, size)
    except (OSError, ValueError) as error:
        raise ValueError(f"The adapter in `{directory}` can't be read (`{path.name}` {error}).") from error


def lora_factors(keys: Iterable[str], peft_config: "PeftConfig | Mapping[str, Any]") -> dict[str, LoraFactors]:
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


def lora_scale(peft_config: "PeftConfig | Mapping[str, Any]", module: str) -> float:
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
    rank, alpha = _look_up(ranks, module, config.get("r")), _look_up(alphas, module, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(
            f"adapter_config.json is not a configuration of LoRA: it has r={rank!r:.80} and lora_alpha={alpha!r:.80} for "
            f"`{module}`; expected two numbers."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _look_up(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    if not patterns:
        return otherwise
    from peft.utils.other import get_pattern_key  # the rule is PEFT's; few adapters have patterns

    return patterns.get(get_pattern_key(list(patterns), module), otherwise)
