# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What inspection shows, as JSON values for scripts."""

import math
import os
from pathlib import Path
from typing import Any

from ..config.precision import PrecisionOptions
from ..server.store import RoundStore
from ..tensors.codebooks import BITS, packed_size
from ..tensors.names import ADAPTER_CONFIG
from .base_inspection import summarize_base
from .inspection import SCALE_BYTES, find_kind, read_lora


def summarize_directory(directory: str | os.PathLike, tensors: bool = False, verify: bool = False) -> dict[str, Any]:
    """Describe a base, a federation or an adapter, whichever the directory is; `kind` says which.

    Args:
        directory: the base, the adapter, or the federation's `output_dir`.
        tensors: list every tensor.
        verify: compare every file of a base with its manifest.

    Raises:
        ValueError: if the directory is something else, or damaged.
    """
    kind, path = find_kind(directory, verify)
    if kind == "base":
        return summarize_base(path, tensors, verify)
    if kind == "federation":
        return _summarize_federation(path, tensors)
    return {"kind": "adapter", **_summarize_adapter(path, tensors)}


def _summarize_adapter(directory: Path, tensors: bool) -> dict[str, Any]:
    adapter, config, factors = read_lora(directory)
    counts = [math.prod(tensor.shape) for tensor in adapter.values()]
    block_size = PrecisionOptions.adapter_block_size
    broadcast = {
        str(bits): sum(packed_size(bits, count) + SCALE_BYTES * math.ceil(count / block_size) for count in counts)
        for bits in BITS
    }
    values = {
        "peft_type": str(config.get("peft_type")),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": {path: factor.scale for path, factor in factors.items()},
        "parameters": sum(counts),
        "bytes": sum(tensor.stop - tensor.start for tensor in adapter.values()),
        "broadcast_bytes": broadcast | {"32": 4 * sum(counts)},
        "broadcast_block_size": block_size,
    }
    if tensors:
        values["tensors"] = [
            {"name": key, "shape": list(tensor.shape), "dtype": tensor.dtype_name} for key, tensor in adapter.items()
        ]
    return values


def _summarize_federation(output_dir: Path, tensors: bool) -> dict[str, Any]:
    store = RoundStore(output_dir)
    federation, records = store.read(), store.records()
    published = (output_dir / ADAPTER_CONFIG).is_file()
    return {
        "kind": "federation",
        **federation,
        "rounds": records,
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "adapter": _summarize_adapter(output_dir, tensors) if published else None,
    }
