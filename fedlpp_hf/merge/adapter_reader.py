# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters on disk or on the Hub, read one tensor at a time."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..tensors.lora import check_config_size
from ..tensors.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..wire.text import make_printable


class AdapterReader:
    """A PEFT adapter on disk, read tensor by tensor in float32.

    `is_zero`: it has LoRA's B, which starts as zeros, and every B still is.

    Raises:
        ValueError: if a file is missing or damaged, or a value is not finite.
    """

    def __init__(self, directory: Path):
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (directory / name).is_file():
                raise ValueError(f"`{directory}` has no `{name}`; expected a PEFT adapter saved as safetensors.")
        check_config_size(directory)
        self.directory, file = directory, directory / ADAPTER_WEIGHTS
        try:
            self.config = PeftConfig.from_pretrained(str(directory))
        except Exception as error:  # PEFT's classes judge their fields each in their own way
            raise ValueError(
                f"`{directory / ADAPTER_CONFIG}` can't be read ({type(error).__name__}: {make_printable(str(error))})."
            ) from error
        if self.config.is_prompt_learning:
            raise ValueError(
                f"`{directory}` is a {self.config.peft_type.value} adapter: it adds inputs and changes no weight, so it can't "
                "be merged. Load it beside the full model with PEFT."
            )
        try:
            self._open = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"`{file}` can't be read ({error}); is it truncated?") from error
        self._converted: dict[str, torch.Tensor] = {}
        self._stored = self.keys = self._list_keys()
        seconds = []  # whether each B has a value that is not zero
        for key in self.keys:
            # Adapters other than LoRA have indices, too.
            tensor = self.read_stored(key) if isinstance(self.config, LoraConfig) else self._open.get_tensor(key)
            if not is_finite(tensor):
                raise ValueError(f"`{key}` in `{file}` has values that are NaN or infinite; did its training diverge?")
            if ".lora_B." in key or key.endswith(".lora_embedding_B"):
                seconds.append(bool(tensor.any()))
        self.is_zero = bool(seconds) and not any(seconds)

    def _list_keys(self) -> list[str]:
        """The keys, without quantized weights of the base, which PEFT saves along with a LoRA on a head or embedding."""
        keys = sorted(self._open.keys())
        codes = [
            key.removesuffix("weight")
            for key in keys
            if key.endswith((".base_layer.weight", ".original_module.weight"))
            and self._open.get_slice(key).get_dtype() in ("U8", "I8")
        ]
        return [key for key in keys if not key.startswith(tuple(codes)) or key.endswith(".base_layer.bias")]

    def use_keys_of(self, model: PreTrainedModel) -> None:
        """Convert keys of an older transformers, and tensors that it kept apart, to those of `model`.

        PEFT's own conversion does it, as when it loads the adapter. What it changes is then held in memory.

        Raises:
            ValueError: if the adapter can't be converted.
        """
        self.keys, self._converted = self._stored, {}
        names = {key: torch.empty(self.shape(key), device="meta") for key in self.keys}
        if self._convert(model, names).keys() == names.keys():
            return
        stored = {key: self.read(key) for key in self.keys}
        made = self._convert(model, dict(stored))
        self._converted = {key: t.contiguous() for key, t in made.items() if stored.get(key) is not t}
        self.keys = sorted(made)

    def _convert(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return convert_peft_adapter_state_dict_for_transformers(model, self.config, tensors)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"`{self.directory}` has the keys of an older transformers, which PEFT can't convert for "
                f"{type(model).__name__} ({error}). Load and save it with the versions it was trained with."
            ) from error

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        if key in self._converted:
            return tuple(self._converted[key].shape)
        return tuple(self._open.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor as float32; a merge never computes in less.

        Raises:
            ValueError: if it does not hold floating point values.
        """
        return self.read_stored(key).float()

    def read_stored(self, key: str) -> torch.Tensor:
        """Read one tensor in the dtype it is stored in; errors are those of [`read`]."""
        tensor = self._converted[key] if key in self._converted else self._open.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(
                f"`{key}` in `{self.directory}` has the dtype {tensor.dtype}; expected floating point values."
            )
        return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    exact = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no sum
    # A sum is the cheapest pass in which a bad value shows, and without a copy to another dtype. It may overflow by
    # itself; only then each value is looked at.
    return math.isfinite(exact.sum()) or bool(torch.isfinite(exact).all())


def open_adapters(
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    weights: Sequence[float] | None = None,
    token: str | None = None,
) -> tuple[list[AdapterReader], list[float]]:
    """Open one adapter or several, from directories or the Hub. Returns them with weights that add up to one.

    Raises:
        ValueError: if an adapter can't be read, or the weights don't fit.
    """
    names = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not names:
        raise ValueError("`adapter` is an empty list; give at least one PEFT directory.")
    readers = [AdapterReader(_find_directory(name, token)) for name in names]
    given = [1.0] * len(readers) if weights is None else list(weights)
    if len(given) != len(readers):
        raise ValueError(f"{len(given)} weights for {len(readers)} adapters; give one for each.")
    if not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given) > 0:
        raise ValueError(f"weights={given}; expected finite numbers that are not negative and not all zero.")
    return readers, [w / math.fsum(given) for w in given]


def _find_directory(name: str | os.PathLike, token: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), token=token, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(f"`{name}` is neither a directory nor the name of an adapter on the Hub.") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub can't be reached"
        raise ValueError(
            f"The adapter `{name}` is neither a directory nor in the Hub's cache, and {reason}. Give a directory."
        ) from error
