# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Reading a base as Q(W): the values that clients compute with, one parameter at a time."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..tensors.files import read_tensor
from .manifest import read_manifest
from .quantize import restore_int8, restore_nf4
from .shards import read_shards


class BaseReader:
    """A base on disk, dequantized one parameter at a time.

    Args:
        base_dir: the base.
        shapes: the shapes of the full model's parameters.
        transposed: the parameters that the full model stores `(in, out)`, as `Conv1D` does; bitsandbytes stores them
            `(out, in)`.

    Raises:
        ValueError: if the directory is not a base, or belongs to another model.
    """

    def __init__(self, base_dir: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], transposed: set[str]):
        self.entries = {entry["name"]: entry for entry in read_manifest(base_dir)["tensors"]}
        unknown = sorted(set(self.entries) - set(shapes))
        if unknown:
            raise ValueError(f"The base has `{unknown[0]}`, but the full model does not; it is of another model.")
        self._shapes, self._transposed = shapes, transposed
        self._tensors = {
            name: (Path(base_dir) / shard.file, tensor)
            for shard in read_shards(Path(base_dir)).values()
            for name, tensor in shard.tensors.items()
        }

    def is_quantized(self, name: str) -> bool:
        """Whether the base has a parameter, and not in full precision."""
        return name in self.entries and self.entries[name]["kind"] != "full_precision"

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter as clients compute with it: float32, in the full model's shape.

        Raises:
            ValueError: if it has another shape.
        """
        kind = self.entries[name]["kind"]
        if kind == "linear4bit":
            keys = [key for key in self._tensors if key == name or key.startswith(f"{name}.")]
            value = restore_nf4(name, {key: self._read_stored(key) for key in keys})
        elif kind == "linear8bit":
            value = restore_int8(self._read_stored(name), self._read_stored(f"{name.removesuffix('weight')}SCB"))
        else:
            value = self._read_stored(name).float()
        if name in self._transposed and kind.startswith("linear"):
            value = value.T.contiguous()
        if tuple(value.shape) != self._shapes[name]:
            raise ValueError(f"The base's `{name}` has shape {tuple(value.shape)}; it is of another model.")
        return value

    def _read_stored(self, name: str) -> torch.Tensor:
        return read_tensor(*self._tensors[name])
