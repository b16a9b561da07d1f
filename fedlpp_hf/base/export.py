# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Exporting the quantized base that clients hold from the full model."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..privacy.marks import Mark
from ..tensors.codebooks import FULL_PRECISION, check_bits
from ..tensors.threads import map_in_order, tensor_threads
from .calibration import Calibration
from .contents import COMPANIONS, PATTERN_SIGNS
from .directory import ShardWriter, new_base_directory, write_companions
from .full_model import FullModel
from .manifest import FORMAT_VERSION, write_manifest
from .modules import (
    build_meta_model,
    check_missing,
    check_skip_list,
    count_weights,
    default_skip_modules,
    find_bulk,
    find_quantized,
    list_linears,
    make_quantization_config,
)
from .quantize import BaseSettings, quantize_base_tensor
from .tensor_plan import plan_tensors


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
    mark: Mark | None = None,
    calibration: Calibration | None = None,
    max_shard_size: int = 2 * 10**9,
) -> dict[str, Any]:
    """Quantize the full model into a directory that `from_pretrained` loads. Returns the manifest.

    Every `nn.Linear` and `Conv1D` outside `skip_modules` becomes a bitsandbytes weight. Other tensors keep their dtype;
    those with two or more dimensions keep only a few different values. In memory are a few tensors of the full model
    (torch's threads work on one each) and two shards of the base: one is written while the next one is made.

    Args:
        full_model: a directory, or a name on the Hub.
        output_dir: the new directory. It appears when it is complete, or not at all.
        bits: per weight of the bitsandbytes weights, and of experts: 1 (or "ternary") to 4 for NF4 codes or a subset of
            them, 8 for int8 rows.
        block_size: weights that share a scale, at `bits` of 1 to 4: 32 to 4096.
        double_quant: quantize the scales, too (QLoRA, arXiv 2305.14314, §3).
        embedding_bits: embeddings, heads and other tensors of two or more dimensions keep at most `2**embedding_bits`
            values per block; 32 ships them as they are.
        skip_modules: names, or ends of names, of modules that stay floats; by default the output embeddings and the task heads.
        model_class: a class of transformers; by default the one that the configuration names.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; by default that of `hf auth login`.
        overwrite: replace a base in `output_dir`.
        mark: whose copy this is (see [`prepare_mark`]); it decides how weights halfway between two levels are rounded.
        calibration: what the model's Linears are given on rows of the owner (see [`measure_moments`]). The codes are then
            chosen for the layers' outputs, and depend on these rows.
        max_shard_size: of one file, in bytes.

    Raises:
        ValueError: for arguments, checkpoints or values that can't be quantized; `output_dir` stays as it was.
    """
    bits = check_bits(bits)
    embedding_bits = FULL_PRECISION if str(embedding_bits) == str(FULL_PRECISION) else check_bits(embedding_bits)
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"block_size={block_size}; bitsandbytes' 4-bit kernels know {_BLOCK_SIZES}.")
    if double_quant and bits == 8:
        raise ValueError("double_quant=True compresses 4-bit scales; with bits=8 there are none. Leave it out.")
    if mark is not None and bits == 8:
        raise ValueError("A mark with bits=8: int8 rows have none of the levels that it needs. Use 1 to 4 bits.")
    if calibration is not None and (bits == 8 or mark is not None):
        given = "bits=8" if bits == 8 else "a mark"
        raise ValueError(
            f"A calibration with {given}: it chooses each 4-bit code (or those of a subset), int8 rows have none, and a mark "
            "needs weights halfway between two of them. Leave one out."
        )

    if found := next(filter(PATTERN_SIGNS.search, skip_modules or ()), None):
        raise ValueError(
            f"skip_modules has {found!r}, a regular expression; clients would refuse the base. Give names."
        )

    source = FullModel(full_model, revision, token)
    config = source.read_config()
    model = build_meta_model(config, model_class)
    plan = plan_tensors(model, source.shapes)
    source.check_scales(plan.left_out)
    skip = default_skip_modules(model) if skip_modules is None else sorted(skip_modules)
    check_missing(model, plan.missing, skip)
    config.architectures = [type(model).__name__]
    config.dtype = config.dtype or source.dtype
    config.quantization_config = make_quantization_config(bits, double_quant, skip, config.dtype)
    quantized = find_quantized(model, config)
    if skip_modules is None:
        check_skip_list(model, quantized, skip)
    bulk = find_bulk(model, quantized, skip)
    weights = count_weights(model, quantized)
    settings = BaseSettings(
        bits, block_size, double_quant, embedding_bits, quantized, bulk, mark, calibration, weights
    )

    with new_base_directory(Path(output_dir), overwrite) as directory:
        entries = []
        with tensor_threads() as pool, ShardWriter(directory, max_shard_size) as writer:
            tensors = plan.read(source, model)
            for entry, made in map_in_order(pool, lambda item: quantize_base_tensor(*item, settings), tensors):
                writer.write(made)
                entries.append(entry)
        writer.finish()
        write_companions(source.list_companions(COMPANIONS), config.to_dict(), directory, source.owners_strings)
        manifest = {
            "format_version": FORMAT_VERSION,
            "bits": bits,
            "block_size": block_size,
            "double_quant": double_quant,
            "embedding_bits": embedding_bits,
            "skip_modules": skip,
            "architecture": type(model).__name__,
            "full_precision_linears": _list_full_precision_linears(model, entries),
            "initialized_by_clients": plan.missing,
            "left_out": plan.left_out,
            "tensors": entries,
            "totals": _sum_entries(entries),
        }
        if calibration is not None:
            reached = {f"{name}.weight" for name in calibration.files}
            missed = [e["name"] for e in entries if e["kind"] == "linear4bit" and e["name"] not in reached]
            manifest["calibration"] = {"rows": calibration.rows, "not_reached": missed}
        write_manifest(directory, manifest, writer.digests)
    return manifest


def _list_full_precision_linears(model: PreTrainedModel, entries: list[dict[str, Any]]) -> list[str]:
    weights = {f"{name}.weight" for name in list_linears(model)}
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
