# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a merge reads besides the full model, one tensor at a time: adapters, clients' updates, the quantized base."""

import json
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
from ..tensors.quantization import QuantizedTensor, dequantize, restore_from_levels
from ..wire.messages import ClientTask, ClientUpdate


class AdapterReader:
    """A PEFT repository on disk, or one client's adapter θ = start + Δ, read tensor by tensor in float32.

    Raises:
        ValueError: if a file is missing, truncated, no safetensors, or has values that are not finite.
    """

    def __init__(self, file: Path, config: PeftConfig, start: "AdapterReader | ClientTask | None" = None):
        self.file, self.config = file, config
        self._start = start.proxy_tensors() if isinstance(start, ClientTask) else start
        try:
            self._open = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"`{file}` can't be read ({error}); is it truncated?") from error
        stored = set(self._open.keys())
        metadata = (self._open.metadata() or {}).get("fedlpp_hf")
        self._quantized: dict[str, Any] = json.loads(metadata)["quantized"] if metadata else {}
        codes = {key + suffix for key in self._quantized for suffix in ("#codes", "#scales")}
        self.keys = sorted((stored - codes) | set(self._quantized))
        for key in self.keys:
            if not is_finite(self.read(key)):
                raise ValueError(f"`{key}` in `{file}` has values that are NaN or infinite; did its training diverge?")

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._quantized:
            return tuple(self._quantized[key][0])
        return tuple(self._open.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """One tensor as float32; a merge never computes in less."""
        if key in self._quantized:
            shape, bits, block_size = self._quantized[key]
            codes, scales = self._open.get_tensor(f"{key}#codes"), self._open.get_tensor(f"{key}#scales")
            tensor = dequantize(QuantizedTensor(codes, scales, tuple(shape), bits, block_size))
        else:
            tensor = self._open.get_tensor(key)
            if not tensor.is_floating_point():
                raise ValueError(f"`{key}` in `{self.file}` is of {tensor.dtype}; expected floating point values.")
            tensor = tensor.float()
        if self._start is None:
            return tensor
        known = self._start.keys if isinstance(self._start, AdapterReader) else self._start
        start = (
            None
            if key not in known
            else self._start.read(key)
            if isinstance(self._start, AdapterReader)
            else self._start[key]
        )
        if start is None or start.shape != tensor.shape:
            raise ValueError(
                f"`{key}` in `{self.file}` does not fit what the clients started from; are the updates of one round, and "
                "of full rank?"
            )
        return tensor + start


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
    """Readers of one adapter, of several, or of a directory of clients' updates, with weights that add up to one.

    Weights default to equal ones, and for clients' updates to their numbers of examples. A directory of updates has the
    updates (`*.safetensors`, at any depth), an `adapter_config.json`, and what the clients started from: the task with
    the proxy, or an `adapter_model.safetensors`.

    Raises:
        ValueError: if an adapter can't be read, or the weights don't fit.
    """
    several = not isinstance(adapter, str | os.PathLike)
    paths = [Path(path) for path in adapter] if several else [Path(adapter)]  # type: ignore[union-attr, arg-type]
    if not paths:
        raise ValueError("`adapter` is an empty list; give at least one PEFT directory.")
    readers, counts = [], []
    for path in paths:
        if not path.is_dir():
            path = _download_adapter(str(path), token)
        for reader, examples in _open_directory(path):
            readers.append(reader)
            counts.append(float(examples))
    given = list(weights) if weights is not None else counts
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


def _open_directory(directory: Path) -> list[tuple[AdapterReader, int]]:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(f"`{directory}` has no `{ADAPTER_CONFIG}`; expected a PEFT adapter, or clients' updates.")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{directory / ADAPTER_CONFIG}` can't be read ({error}).") from error
    start: AdapterReader | ClientTask | None = None
    if (directory / ADAPTER_WEIGHTS).is_file():
        start = AdapterReader(directory / ADAPTER_WEIGHTS, config)
    updates: list[tuple[Path, int]] = []
    if not (directory / "_federation").is_dir():  # in the server's repository, its adapter is what is meant
        for file in sorted(directory.rglob("*.safetensors")):
            kind = _message_kind(file)
            if kind == "task":
                task = ClientTask.from_bytes(file.read_bytes())
                start = task if task.proxy is not None else start
            elif kind == "update":
                update = ClientUpdate.from_bytes(file.read_bytes())  # checks its digest
                updates.append((file, update.num_examples))
    if start is None:
        raise ValueError(
            f"`{directory}` has no `{ADAPTER_WEIGHTS}`"
            + (" nor a task with the proxy that its updates started from." if updates else "; expected safetensors.")
        )
    if updates:
        return [(AdapterReader(file, config, start), examples) for file, examples in updates]
    if not isinstance(start, AdapterReader):
        raise ValueError(f"`{directory}` has a task, but no client's update; nothing to merge.")
    return [(start, 1)]


def _message_kind(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as reader:
            metadata = (reader.metadata() or {}).get("fedlpp_hf")
    except SafetensorError as error:
        raise ValueError(f"`{file}` can't be read ({error}); is it truncated?") from error
    return json.loads(metadata).get("kind") if metadata else None


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
