# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quantized base that clients hold: export it from the full model, load it, say what is in it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from ..tensors.quantization import FULL_PRECISION, check_bits
from ..tensors.threads import map_in_order, tensor_threads
from .checkpoint import Checkpoint, plan_tensors
from .kernels import keep_layout_
from .manifest import (
    BASE_MANIFEST,
    FORMAT_VERSION,
    ShardWriter,
    check_base,
    new_base_directory,
    read_manifest,
    seal_base,
    write_companions,
)
from .packing import pack_base, unpack_base
from .tensors import BaseSettings, quantize_base_tensor


__all__ = [
    "BASE_MANIFEST",
    "base_fingerprint",
    "build_meta_model",
    "check_base",
    "default_skip_modules",
    "describe_base",
    "export_base",
    "keep_layout_",
    "load_base",
    "pack_base",
    "read_manifest",
    "unpack_base",
]

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes' 4-bit kernels


def export_base(
    full_model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    bits: int | str = 4,
    block_size: int = 64,
    double_quant: bool = False,
    embedding_bits: int | str = 4,
    skip_modules: Sequence[str] | None = None,
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    max_shard_size: int = 2 * 10**9,
) -> dict[str, Any]:
    """Quantize the full model (a directory or a Hub id) into a directory that `from_pretrained` loads.

    A few tensors of the full model are in memory at a time (torch's threads work on one each), and a shard or two of the
    base, of at most `max_shard_size` bytes: the last one is written while the next one is made. Every
    `nn.Linear` and `Conv1D` outside `skip_modules` becomes a bitsandbytes weight of `bits` bits (1 to 4: NF4 codes or a
    subset of them, in blocks of `block_size`; 8: int8 rows). Every other tensor of two or more dimensions keeps its
    dtype but only `2**embedding_bits` values per block (experts: `2**bits`); `embedding_bits=32` ships them as they are.
    `skip_modules` defaults to the output embeddings and the task heads, `model_class` to the one that the configuration
    names. Returns the manifest, which is also written as `base_manifest.json`.

    Raises:
        ValueError: for arguments, checkpoints or values that can't be quantized; `output_dir` is left as it was.
    """
    bits = check_bits(bits)
    embedding_bits = FULL_PRECISION if str(embedding_bits) == str(FULL_PRECISION) else check_bits(embedding_bits)
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"block_size={block_size}; bitsandbytes' 4-bit kernels know {_BLOCK_SIZES}.")
    if double_quant and bits == 8:
        raise ValueError("double_quant=True compresses 4-bit scales; it has no meaning with bits=8. Leave it out.")

    with Checkpoint(full_model, revision=revision, token=token) as checkpoint:
        config = AutoConfig.from_pretrained(checkpoint.directory)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"`{full_model}` is quantized already; a base is exported from full precision.")
        model = build_meta_model(config, model_class)
        plan = plan_tensors(model, checkpoint.names)
        skip = default_skip_modules(model) if skip_modules is None else sorted(skip_modules)
        _check_missing(model, plan.missing, skip)
        config.architectures = [type(model).__name__]
        config.dtype = config.dtype or checkpoint.dtype
        config.quantization_config = _quantization_config(bits, double_quant, skip, config.dtype)
        converted = _find_converted(model, config)
        if skip_modules is None:
            _check_converted(model, converted, skip)
        bulk = _find_bulk(model, converted, skip)
        settings = BaseSettings(bits, block_size, double_quant, embedding_bits, converted, bulk)

        with new_base_directory(Path(output_dir), overwrite) as directory:
            entries = []
            with tensor_threads() as pool, ShardWriter(directory, max_shard_size) as writer:
                read = plan.read(checkpoint, model)
                for entry, tensors in map_in_order(pool, lambda item: quantize_base_tensor(*item, settings), read):
                    writer.write(tensors)
                    entries.append(entry)
            writer.finish()
            write_companions(checkpoint.directory, config.to_dict(), directory, checkpoint.secrets)
            manifest = {
                "format_version": FORMAT_VERSION,
                "bits": bits,
                "block_size": block_size,
                "double_quant": double_quant,
                "embedding_bits": embedding_bits,
                "skip_modules": skip,
                "architecture": type(model).__name__,
                "full_precision_linears": _full_precision_linears(model, entries),
                "initialized_by_clients": plan.missing,
                "left_out": plan.left_out,
                "tensors": entries,
                "totals": _sum_entries(entries),
            }
            seal_base(directory, manifest, writer.digests)
    return manifest


def build_meta_model(config: Any, model_class: Any = None) -> PreTrainedModel:
    """The model's modules without memory for their weights.

    Raises:
        ValueError: if transformers has no class of the name that the configuration gives.
    """
    if model_class is None:
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(
                f"The configuration names {names or 'no architecture'}, which transformers "
                f"{transformers.__version__} does not have; pass `model_class` (code from the Hub is not run)."
            )
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        return build(config)


def default_skip_modules(model: PreTrainedModel) -> list[str]:
    """Modules that stay floats and can be trained: the output embeddings and the task heads, which are the children of
    the model outside its backbone (`classifier`, `score`, `qa_outputs`, …)."""
    output = model.get_output_embeddings()
    skip = {name for name, module in model.named_modules() if module is output}
    if model.base_model is not model:
        skip |= {name for name, child in model.named_children() if child is not model.base_model and _linears(child)}
    return sorted(skip)


def _linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _quantization_config(bits: int, double_quant: bool, skip: list[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _find_converted(model: PreTrainedModel, config: Any) -> dict[str, bool]:
    """The modules that transformers will load as bitsandbytes weights, and whether each was a `Conv1D`.

    Asked of transformers itself, because its skip list matches suffixes and regular expressions too.
    """
    quantized = build_meta_model(config, type(model))
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(quantized, device_map=None)
    rebuilt = sorted(quantized.state_dict().keys() ^ model.state_dict().keys())
    if rebuilt:
        raise ValueError(
            f"transformers rebuilds {type(model).__name__} for bitsandbytes (`{rebuilt[0]}`, {len(rebuilt)} such names); "
            "a base of it can't be exported."
        )
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in quantized.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def _find_skipped(model: PreTrainedModel, skip: list[str]) -> set[str]:
    return {name for name in _linears(model) for module in skip if f"{name}.".startswith(f"{module}.")}


def _find_bulk(model: PreTrainedModel, converted: dict[str, bool], skip: list[str]) -> set[str]:
    """Parameters like those of the converted modules that transformers keeps as floats: fused experts, and Linears that
    it wants in float32 (T5's `wo`)."""
    kept = _linears(model) - set(converted) - _find_skipped(model, skip)
    return {f"{name}.weight" for name in kept} | {name for name in model.state_dict() if ".experts." in name}


def _check_converted(model: PreTrainedModel, converted: dict[str, bool], skip: list[str]) -> None:
    in_fp32 = set(model._keep_in_fp32_modules or ())  # transformers adds these to every skip list
    kept = _linears(model) - set(converted) - _find_skipped(model, skip)
    stray = sorted(name for name in kept if in_fp32.isdisjoint(name.split(".")))
    if stray:
        raise ValueError(
            f"transformers would not quantize `{stray[0]}` ({len(stray)} such), as its name ends like one of {skip}. "
            "Pass `skip_modules` with names that nothing else ends with."
        )


def _check_missing(model: PreTrainedModel, missing: list[str], skip: list[str]) -> None:
    backbone = next((f"{name}." for name, child in model.named_children() if child is model.base_model), "")
    allowed = tuple(f"{name}." for name in skip)
    lost = [name for name in missing if name.startswith(backbone) and not name.startswith(allowed)]
    if lost:
        raise ValueError(
            f"`{lost[0]}` ({len(lost)} such) of {type(model).__name__} is missing. Are the weights complete, and of this "
            "`model_class`? At export, name the module in `skip_modules` if clients are to initialize it."
        )


def _full_precision_linears(model: PreTrainedModel, entries: list[dict[str, Any]]) -> list[str]:
    weights = {f"{name}.weight" for name in _linears(model)}
    return [e["name"] for e in entries if e["kind"] == "full_precision" and e["name"] in weights]


def _sum_entries(entries: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = sum(math.prod(entry["shape"]) for entry in entries)
    information = sum(entry["information_bytes"] for entry in entries)
    return {
        "parameters": parameters,
        "information_bytes": information,
        "information_bits_per_parameter": information * 8 / max(parameters, 1),
        "bytes": sum(entry["bytes"] for entry in entries),
        "full_precision_bytes": sum(e["bytes"] for e in entries if e["kind"] == "full_precision"),
    }


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

    `model_class` (a model or an Auto class) defaults to the one it was exported as; heads that the base does not have are
    initialized as floats. `compute_dtype` is what 4-bit products are computed in: by default the full model's dtype, and
    float32 on a CPU, where the others are slow or inexact; there the floats are loaded as float32 too, unless `dtype`
    says otherwise. `kwargs` go to `from_pretrained`.

    Raises:
        ValueError: if the directory is no base, is not what its manifest says, or does not fit `model_class`.
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
    model, info = model_class.from_pretrained(
        base_dir, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **kwargs
    )
    _check_missing(meta, sorted(set(info["missing_keys"]) - set(manifest["initialized_by_clients"])), [])
    if dtype is not None:
        _cast_floats_(model, dtype)
    keep_layout_(model)
    model.base_fingerprint = manifest["fingerprint"]
    return model


def _cast_floats_(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Give all floats the dtype that `from_pretrained` (transformers 5.23) gives to biases only when it loads
    bitsandbytes weights."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    in_fp32 = set(model._get_dtype_plan(dtype))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and in_fp32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _is_cpu(device_map: Any) -> bool:
    if device_map is None:  # where transformers then puts a bitsandbytes model
        return not torch.accelerator.is_available()
    return str(device_map.get("") if isinstance(device_map, dict) else device_map) == "cpu"


def base_fingerprint(base: str | os.PathLike | nn.Module) -> str:
    """The fingerprint that identifies a base, of its directory or of a model that was loaded from there.

    It is read from the manifest; [`check_base`] proves that the files are those.

    Raises:
        ValueError: if the model was not loaded from a base.
    """
    if not isinstance(base, nn.Module):
        return read_manifest(base)["fingerprint"]
    fingerprint = getattr(base, "base_fingerprint", None)
    directory = getattr(getattr(base, "config", None), "_name_or_path", "")
    return str(fingerprint or read_manifest(directory)["fingerprint"])


def describe_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest, with the entries of what is in full precision (`full_precision`, largest first) and the bytes of all
    files (`file_bytes`)."""
    manifest = read_manifest(base_dir)
    exact = [entry for entry in manifest["tensors"] if entry["kind"] == "full_precision"]
    return manifest | {
        "full_precision": sorted(exact, key=lambda entry: -entry["bytes"]),
        "file_bytes": sum(file["bytes"] for file in manifest["files"].values()),
    }
