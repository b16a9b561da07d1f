# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Reading a model that somebody else made: floats of any dtype, or bitsandbytes' codes, one weight at a time."""

import os

import torch

from .full_model import FullModel
from .quantize import restore_int8, restore_nf4


# What fine-tuning scripts put before a parameter's name, or leave out.
_PREFIXES = ("", "model.", "base_model.model.", "_orig_mod.", "module.")


class SuspectReader:
    """A model of safetensors, on disk or on the Hub, whose weights are read as float32 under the full model's names.

    Args:
        model: A directory, or a name on the Hub.
        token: For the Hub.

    Raises:
        ValueError: if there are no safetensors.
    """

    def __init__(self, model: str | os.PathLike, token: str | None = None):
        self._model = FullModel(model, token=token)
        self._shapes = self._model.shapes

    def has(self, name: str, shape: torch.Size) -> bool:
        """Whether the suspect has a weight of this name and, as far as its format tells, of this shape."""
        found = self._find(name)
        if found is None:
            return False
        stored = self._shapes[found]
        return stored in (tuple(shape), tuple(reversed(shape))) or self._is_nf4(found)

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The weight as float32 in the full model's `shape`, `(out, in)`."""
        found = self._find(name)
        assert found is not None
        if self._is_nf4(found):
            keys = [key for key in self._shapes if key == found or key.startswith(f"{found}.")]
            value = restore_nf4(found, {key: self._model.read(key) for key in keys})
        elif (scales := f"{found.removesuffix('weight')}SCB") in self._shapes:
            value = restore_int8(self._model.read(found), self._model.read(scales))
        else:
            value = self._model.read(found).float()
        return value if value.shape == shape else value.T

    def _find(self, name: str) -> str | None:
        candidates = [prefix + name for prefix in _PREFIXES]
        candidates += [name.removeprefix(prefix) for prefix in _PREFIXES[1:] if name.startswith(prefix)]
        return next((candidate for candidate in candidates if candidate in self._shapes), None)

    def _is_nf4(self, name: str) -> bool:
        return f"{name}.absmax" in self._shapes
