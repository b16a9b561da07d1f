# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Reading a base as Q(W): the values that clients compute with, one parameter at a time."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise

from ..tensors.files import read_tensor
from ..tensors.quantization import restore_from_levels
from .manifest import read_manifest
from .quantize import unpack_nibbles
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
            value = self._read_nf4(stored)
        elif kind == "linear8bit":
            scales = self._read_stored(f"{stored.removesuffix('weight')}SCB").float()
            value = self._read_stored(stored).float() * (scales[:, None] / 127)
        else:
            value = self._read_stored(stored).float()
        if name in self._transposed and kind.startswith("linear"):
            value = value.T.contiguous()
        if tuple(value.shape) != self._shapes[name]:
            raise ValueError(f"The base's `{name}` has shape {tuple(value.shape)}; its manifest is of another model.")
        return value

    def _read_nf4(self, name: str) -> torch.Tensor:
        prefix = f"{name}."
        state = {key.removeprefix(prefix): self._read_stored(key) for key in self._tensors if key.startswith(prefix)}
        quantized = QuantState.from_dict(state, device=torch.device("cpu"))
        scales = quantized.absmax
        if quantized.nested:
            scales = dequantize_blockwise(scales, quantized.state2) + quantized.offset
        # Not dequantize_4bit: its AVX-512 kernel misreads rows that are not a whole number of blocks.
        codes = unpack_nibbles(self._read_stored(name), list(quantized.shape))
        return restore_from_levels(codes, scales, quantized.code, quantized.blocksize).view(quantized.shape)

    def _read_stored(self, name: str) -> torch.Tensor:
        return read_tensor(*self._tensors[name])
