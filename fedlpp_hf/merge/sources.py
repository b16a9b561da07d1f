# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a merge reads besides the full model, one tensor at a time: adapters, and the quantized base."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..base.checkpoint import Checkpoint
from ..base.manifest import read_manifest
from ..base.tensors import unpack_nibbles
from ..tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..tensors.quantization import restore_from_levels


class AdapterReader:
    """A PEFT adapter on disk, read tensor by tensor in float32.

    Raises:
        ValueError: if the file is truncated, is not safetensors, or has values that are not finite.
    """

    def __init__(self, file: Path, config: PeftConfig):
        self.file, self.config = file, config
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
        """One tensor as float32; a merge never computes in less."""
        tensor = self._open.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(f"`{key}` in `{self.file}` is of {tensor.dtype}; expected floating point values.")
        return tensor.float()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    exact = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no sum
    # The cheapest pass that any of them shows in; only where it overflows by itself must all values be looked at. Not in
    # another dtype: that would be a copy first.
    return math.isfinite(exact.sum()) or bool(torch.isfinite(exact).all())


def open_adapters(
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    weights: Sequence[float] | None = None,
    token: str | None = None,
) -> tuple[list[AdapterReader], list[float]]:
    """Open one adapter or several. Returns their readers, and weights that add up to one (equal by default).

    Raises:
        ValueError: if an adapter can't be read, or the weights don't fit.
    """
    paths = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not paths:
        raise ValueError("`adapter` is an empty list; give at least one PEFT directory.")
    readers = [
        _open_adapter(Path(path) if Path(path).is_dir() else _download_adapter(str(path), token)) for path in paths
    ]
    given = [1.0] * len(readers) if weights is None else list(weights)
    if len(given) != len(readers):
        raise ValueError(f"{len(given)} weights for {len(readers)} adapters; give one for each.")
    if not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given) > 0:
        raise ValueError(f"weights={given}; expected finite numbers that are not negative and not all zero.")
    return readers, [w / math.fsum(given) for w in given]


def _download_adapter(repo_id: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo_id, token=token, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except HFValidationError as error:
        raise ValueError(f"`{repo_id}` is neither a directory nor the name of an adapter on the Hub.") from error


def _open_adapter(directory: Path) -> AdapterReader:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"`{directory}` has no `{name}`; expected a PEFT adapter saved as safetensors.")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{directory / ADAPTER_CONFIG}` can't be read ({error}).") from error
    return AdapterReader(directory / ADAPTER_WEIGHTS, config)


class BaseReader:
    """A quantized base on disk, dequantized one parameter at a time: Q(W).

    Raises:
        ValueError: if the directory is no base.
    """

    def __init__(self, base_dir: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], transposed: set[str]):
        self.entries = {entry["name"]: entry for entry in read_manifest(base_dir)["tensors"]}
        unknown = sorted(set(self.entries) - set(shapes))
        if unknown:
            raise ValueError(f"The base has `{unknown[0]}`, which the full model has not; it is of another model.")
        self._shapes, self._transposed = shapes, transposed  # bitsandbytes keeps a Conv1D as a Linear
        self._checkpoint = Checkpoint(base_dir)

    def __enter__(self) -> "BaseReader":
        self._checkpoint.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoint.__exit__()

    def is_quantized(self, name: str) -> bool:
        return name in self.entries and self.entries[name]["kind"] != "full_precision"

    def read(self, name: str) -> torch.Tensor:
        """The parameter as clients compute with it, float32, in the full model's shape."""
        entry = self.entries[name]
        value = dequantize_base_tensor(self._checkpoint, entry)
        if name in self._transposed and entry["kind"].startswith("linear"):
            value = value.T.contiguous()
        if tuple(value.shape) != self._shapes[name]:
            raise ValueError(f"The base's `{name}` has shape {tuple(value.shape)}; it is of another model.")
        return value


def dequantize_base_tensor(checkpoint: Checkpoint, entry: dict[str, Any]) -> torch.Tensor:
    """One parameter of a base as float32, from bitsandbytes' NF4 codes or int8 rows, or as it is."""
    name, module = entry["name"], entry["name"].removesuffix("weight")
    if entry["kind"] == "linear4bit":
        prefix = f"{name}."
        state = {n.removeprefix(prefix): checkpoint.read(n) for n in checkpoint.names if n.startswith(prefix)}
        quantized = QuantState.from_dict(state, device=torch.device("cpu"))
        scales = quantized.absmax
        if quantized.nested:
            scales = dequantize_blockwise(scales, quantized.state2) + quantized.offset
        # Not dequantize_4bit, whose AVX-512 kernel misreads rows that are no whole number of blocks.
        codes = unpack_nibbles(checkpoint.read(name), list(quantized.shape))
        return restore_from_levels(codes, scales, quantized.code, quantized.blocksize).view(quantized.shape)
    if entry["kind"] == "linear8bit":
        return checkpoint.read(name).float() * (checkpoint.read(f"{module}SCB").float()[:, None] / 127)
    return checkpoint.read(name).float()
