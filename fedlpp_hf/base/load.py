# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Loading a base as a model to train adapters on."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from .contents import check_configurations
from .heads import DEFAULT_SEED, initialize_new_parameters_
from .kernels import keep_layout_
from .manifest import check_base, read_manifest
from .modules import build_meta_model, check_missing, default_skip_modules
from .shards import read_shards
from .tensor_plan import plan_tensors


# What transformers raises on a value of a configuration that it did not expect.
_UNEXPECTED = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
_MOST_BUFFERS = 1 << 28  # GPT-J's masks are half of it
_SPARE_VALUES = 1 << 24  # that a tensor may have beyond the base's, as a new head does


def load_base(
    base_dir: str | os.PathLike,
    model_class: Any = None,
    *,
    verify: bool = True,
    compute_dtype: torch.dtype | None = None,
    device_map: Any = None,
    new_modules: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base with plain `from_pretrained`, after checking its files against the manifest.

    Heads that the base does not have become floats, a function of `seed`: the same for everyone who loads it.

    Args:
        base_dir: the directory that [`export_base`] wrote.
        model_class: a model or an Auto class; by default the class that was exported.
        verify: compare the sha256 of every file with the manifest first.
        compute_dtype: of 4-bit products; by default the full model's dtype, and float32 on a CPU, where other dtypes are
            slow or inexact. There the floats are loaded as float32, too, unless `dtype` is given.
        device_map: as in `from_pretrained`.
        new_modules: modules inside the backbone that the base may lack, such as a pooler, by the end of their names.
            Clients train them (`modules_to_save`).
        seed: of what the base does not have.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: if the directory is not a base, differs from its manifest, or does not fit `model_class`.
    """
    manifest = check_base(base_dir) if verify else read_manifest(base_dir)
    options = (model_class, compute_dtype, device_map, new_modules, seed)
    try:
        return _load(base_dir, manifest, *options, **kwargs)
    except _UNEXPECTED as error:
        raise ValueError(
            f"The base in `{base_dir}` can't be loaded ({type(error).__name__}: {error}). Is its configuration another model's?"
        ) from error


def _load(
    base_dir: str | os.PathLike,
    manifest: dict[str, Any],
    model_class: Any,
    compute_dtype: torch.dtype | None,
    device_map: Any,
    new_modules: Sequence[str],
    seed: int,
    **kwargs: Any,
) -> PreTrainedModel:
    check_configurations(Path(base_dir), manifest)
    _check_shards(Path(base_dir), manifest)
    dtype = kwargs.pop("dtype", None)
    try:
        config, kwargs = AutoConfig.from_pretrained(base_dir, return_unused_kwargs=True, **kwargs)
    except Exception as error:  # every architecture checks its configuration in its own way
        raise ValueError(
            f"The configuration in `{base_dir}` can't be used ({type(error).__name__}: {error})."
        ) from error
    if _is_cpu(device_map):
        compute_dtype, dtype = compute_dtype or torch.float32, dtype or torch.float32
    if compute_dtype is not None:
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    model_class = model_class or _find_class(manifest["architecture"])
    meta = build_meta_model(config, model_class)
    _check_sizes(meta, manifest)
    new = _find_new_modules(meta, manifest, new_modules)
    if type(meta).__name__ != manifest["architecture"]:  # its heads are not on the skip list of the export
        skip = config.quantization_config["llm_int8_skip_modules"]
        skip += [name for name in [*default_skip_modules(meta), *new] if name not in skip]
        # Before loading, which can't initialize a quantized layer.
        absent = plan_tensors(meta, [entry["name"] for entry in manifest["tensors"]]).missing
        check_missing(meta, sorted(set(absent) - set(manifest["initialized_by_clients"])), new)
    model, info = model_class.from_pretrained(
        base_dir, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **kwargs
    )
    check_missing(meta, sorted(set(info["missing_keys"]) - set(manifest["initialized_by_clients"])), new)
    if dtype is not None:
        _cast_floats_(model, dtype)
    initialize_new_parameters_(model, seed)
    keep_layout_(model)
    model.base_fingerprint = manifest["fingerprint"]
    return model


def _find_class(name: str) -> Any:
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The base is of the class {name!r:.80}, which is no model of transformers {transformers.__version__}. Pass "
            "`model_class`, or install the version that the owner has."
        )
    return found


def _check_shards(base_dir: Path, manifest: dict[str, Any]) -> None:
    """Refuse weights that the manifest does not cover, such as those of an index that leads elsewhere."""
    stray = sorted(read_shards(base_dir).keys() - manifest["files"].keys())
    if stray:
        raise ValueError(f"`{base_dir}` has weights in `{stray[0]}`, which its manifest does not list. Copy it again.")


def _check_sizes(meta: PreTrainedModel, manifest: dict[str, Any]) -> None:
    """Refuse a configuration that asks for far more than the base has, before it is allocated.

    Other differences, such as a head of another size, are `from_pretrained`'s to judge.
    """
    shapes = {entry["name"]: entry["shape"] for entry in manifest["tensors"]}
    for name, parameter in meta.named_parameters():
        shape = shapes.get(name)
        if shape is not None and parameter.numel() > 2 * math.prod(shape) + _SPARE_VALUES:
            raise ValueError(
                f"By the base's configuration `{name}` has the shape {list(parameter.shape)}, by its manifest {shape}. Copy "
                "the base again."
            )
    buffers = sum(buffer.numel() for buffer in meta.buffers())  # masks and frequencies, which are in no manifest
    if buffers > _MOST_BUFFERS:
        raise ValueError(
            f"By the base's configuration the model has buffers of {buffers} values; expected at most {_MOST_BUFFERS}. Copy the "
            "base again."
        )


def _find_new_modules(meta: PreTrainedModel, manifest: dict[str, Any], endings: Sequence[str]) -> list[str]:
    """The modules that end like one of `endings` and have no tensor in the base."""
    prefix = f"{meta.base_model_prefix}."
    stored = {entry["name"].removeprefix(prefix) for entry in manifest["tensors"]}
    return [
        place
        for place, module in meta.named_modules()
        if place.endswith(tuple(endings))
        and stored.isdisjoint(name.removeprefix(prefix) for name, _ in module.named_parameters(prefix=place))
    ]


def _cast_floats_(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Cast all floats: with bitsandbytes weights, `from_pretrained` (transformers 5.23) casts only the biases."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    in_fp32 = set(model._get_dtype_plan(dtype))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and in_fp32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _is_cpu(device_map: Any) -> bool:
    if device_map is None:  # where transformers then puts a bitsandbytes model
        return not torch.accelerator.is_available()
    return str(device_map.get("") if isinstance(device_map, dict) else device_map) == "cpu"
