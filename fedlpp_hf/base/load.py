# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Loading a base as a model to train adapters on."""

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from .kernels import keep_layout_
from .manifest import check_base, read_manifest
from .modules import build_meta_model, check_missing, default_skip_modules
from .tensor_plan import plan_tensors


def load_base(
    base_dir: str | os.PathLike,
    model_class: Any = None,
    *,
    verify: bool = True,
    compute_dtype: torch.dtype | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base with plain `from_pretrained`, after checking its files against the manifest.

    Heads that the base does not have are initialized as floats.

    Args:
        base_dir: the directory that [`export_base`] wrote.
        model_class: a model or an Auto class; by default the class that was exported.
        verify: compare the sha256 of every file with the manifest first.
        compute_dtype: of 4-bit products; by default the full model's dtype, and float32 on a CPU, where other dtypes are
            slow or inexact. There the floats are loaded as float32, too, unless `dtype` is given.
        device_map: as in `from_pretrained`.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: if the directory is not a base, differs from its manifest, or does not fit `model_class`.
    """
    manifest = check_base(base_dir) if verify else read_manifest(base_dir)
    dtype = kwargs.pop("dtype", None)
    config, kwargs = AutoConfig.from_pretrained(base_dir, return_unused_kwargs=True, **kwargs)
    if _is_cpu(device_map):
        compute_dtype, dtype = compute_dtype or torch.float32, dtype or torch.float32
    if compute_dtype is not None:
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    model_class = model_class or getattr(transformers, manifest["architecture"])
    meta = build_meta_model(config, model_class)
    if type(meta).__name__ != manifest["architecture"]:  # its heads are not on the skip list of the export
        skip = config.quantization_config["llm_int8_skip_modules"]
        skip += [name for name in default_skip_modules(meta) if name not in skip]
        # Before loading, which can't initialize a quantized layer.
        absent = plan_tensors(meta, [entry["name"] for entry in manifest["tensors"]]).missing
        check_missing(meta, sorted(set(absent) - set(manifest["initialized_by_clients"])), [])
    model, info = model_class.from_pretrained(
        base_dir, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **kwargs
    )
    check_missing(meta, sorted(set(info["missing_keys"]) - set(manifest["initialized_by_clients"])), [])
    if dtype is not None:
        _cast_floats_(model, dtype)
    keep_layout_(model)
    model.base_fingerprint = manifest["fingerprint"]
    return model


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
