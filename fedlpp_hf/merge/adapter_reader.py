# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters on disk or on the Hub, read one tensor at a time."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS


class AdapterReader:
    """A PEFT adapter on disk, read tensor by tensor in float32.

    Raises:
        ValueError: if a file is missing or damaged, or a value is not finite.
    """

    def __init__(self, directory: Path):
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (directory / name).is_file():
                raise ValueError(f"`{directory}` has no `{name}`; expected a PEFT adapter saved as safetensors.")
        self.directory, file = directory, directory / ADAPTER_WEIGHTS
        try:
            self.config = PeftConfig.from_pretrained(str(directory))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"`{directory / ADAPTER_CONFIG}` can't be read ({error}).") from error
        try:
            self._open = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"`{file}` can't be read ({error}); is it truncated?") from error
        self.keys = sorted(self._open.keys())
        for key in self.keys:
            if not is_finite(self.read(key)):
                raise ValueError(f"`{key}` in `{file}` has values that are NaN or infinite; did its training diverge?")

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._open.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor as float32; a merge never computes in less.

        Raises:
            ValueError: if it does not hold floating point values.
        """
        tensor = self._open.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(
                f"`{key}` in `{self.directory}` has the dtype {tensor.dtype}; expected floating point values."
            )
        return tensor.float()


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
    except HFValidationError as error:
        raise ValueError(f"`{name}` is neither a directory nor the name of an adapter on the Hub.") from error
