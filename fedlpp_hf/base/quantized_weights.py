# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are quantized already, whichever way they say it: in a configuration, a file, or scales beside codes."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..tensors.headers import STORED, TensorRange
from .contents import check_link, read_json
from .shards import read_shards


# As transformers, compressed-tensors, MLX and AutoAWQ call it.
_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config", "quantize_config")
# As ModelOpt, AutoGPTQ and AutoAWQ call it.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_WORDS = ("scale", "scb", "absmax", "amax", "zero_point", "zeros", "quant_state", "quant_map", "g_idx")


def check_checkpoint(directory: str | os.PathLike) -> None:
    """Refuse a directory that holds no full-precision model, as far as its headers and its configuration tell.

    Raises:
        ValueError: saying why.
    """
    root = Path(directory)
    read_shards(root, str(directory))
    if (config := check_link(root, root / "config.json")).is_file():  # without one, whoever opens the model says so
        check_configuration(config, os.listdir(root), str(directory))


def check_configuration(config: Path, files: Iterable[str], model: str) -> None:
    """Refuse a model whose configuration, or a file beside it, says that it is quantized.

    Args:
        config: the path of `config.json`.
        files: names of the model's files.
        model: what errors call it.

    Raises:
        ValueError: naming the key or the file.
    """
    files = set(files)
    found = next((name for name in _FILES if name in files), None)
    found = found or _find_key(read_json(config))
    if found:
        raise ValueError(f"`{model}` is quantized already (it has `{found}`); give the full-precision model.")


def _find_key(config: Any) -> str | None:
    if not isinstance(config, Mapping):
        return None
    return next((key for key in _KEYS if isinstance(config.get(key), Mapping)), None) or next(
        (found for value in config.values() if (found := _find_key(value))), None
    )


def check_scales(tensors: Iterable[TensorRange], left_out: Iterable[str]) -> None:
    """Refuse codes of 8 bits or fewer with scales beside them: alone they are not the model's weights.

    Args:
        tensors: all tensors of the checkpoint.
        left_out: names of those that no parameter of the model is made of, as scales are.

    Raises:
        ValueError: naming a weight and its scale.
    """
    left_out = sorted(left_out)
    for tensor in tensors:
        if len(tensor.shape) < 2 or not _is_narrow(tensor.dtype):
            continue
        module = tensor.name.rpartition(".")[0]
        near = [
            n for n in left_out if n != tensor.name and (n.rpartition(".")[0] == module or n.startswith(tensor.name))
        ]
        near += [name for name in left_out if any(word in name.lower() for word in _WORDS)]
        if near:
            raise ValueError(
                f"`{tensor.name}` is stored as {tensor.dtype} with `{near[0]}` beside it: the model is quantized, and these "
                "are codes without their scale. Give the full-precision model, or dequantize this one first."
            )


def _is_narrow(dtype: str) -> bool:
    return dtype != "BOOL" and (dtype not in STORED or STORED[dtype].itemsize == 1)
