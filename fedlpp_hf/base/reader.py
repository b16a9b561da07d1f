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
        prefix: the full model's name for its backbone. A base may be of the backbone alone, or with another head: what
            only the base has is not read.

    Raises:
        ValueError: if the directory is not a base, or belongs to another model.
    """

    def __init__(
        self,
        base_dir: str | os.PathLike,
        shapes: Mapping[str, tuple[int, ...]],
        transposed: set[str],
        prefix: str = "",
    ):
        manifest = read_manifest(base_dir)
        start, self.entries, others = f"{prefix}.", {}, []
        for entry in manifest["tensors"]:
            name = entry["name"]
            found = next((n for n in (name, start + name, name.removeprefix(start)) if n in shapes), None)
            if found is None:
                others.append(name.removeprefix(start))
                continue
            self.entries[found] = entry
            if tuple(entry["shape"]) != shapes[found]:
                raise ValueError(
                    f"The base's `{name}` has shape {tuple(entry['shape'])}, the full model's {shapes[found]}; it is of another "
                    "model."
                )
        parts = {name.removeprefix(start).split(".")[0] for name in shapes}
        unknown = [name for name in others if name.split(".")[0] in parts or not self.entries]
        if unknown:
            raise ValueError(
                f"The base has `{unknown[0]}`, but the full model does not; it is of another model. Export a base of this one."
            )
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
        kind, stored = self.entries[name]["kind"], self.entries[name]["name"]
        if kind == "linear4bit":
            keys = [key for key in self._tensors if key == stored or key.startswith(f"{stored}.")]
            value = restore_nf4(stored, {key: self._read_stored(key) for key in keys})
        elif kind == "linear8bit":
            value = restore_int8(self._read_stored(stored), self._read_stored(f"{stored.removesuffix('weight')}SCB"))
        else:
            value = self._read_stored(stored).float()
        if name in self._transposed and kind.startswith("linear"):
            value = value.T.contiguous()
        if tuple(value.shape) != self._shapes[name]:
            raise ValueError(f"The base's `{name}` has shape {tuple(value.shape)}; its manifest is of another model.")
        return value

    def _read_stored(self, name: str) -> torch.Tensor:
        return read_tensor(*self._tensors[name])
