# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Quantizing one tensor of the full model: to bitsandbytes codes, or to floats with few different values."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_blockwise,
)

from ..privacy.marks import Mark, draw_choices
from ..tensors.codebooks import FULL_PRECISION, codebook, nf4_subset, packed_size
from ..tensors.packing import look_up
from ..tensors.quantization import restore_from_levels, round_to_levels
from .calibration import Calibration
from .compensation import round_with_compensation
from .mark_places import find_mark_places


_NESTED_BLOCK_SIZE = 256
_PAD_CODE = 7  # NF4's zero, which bitsandbytes pads with


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """How the tensors of a base are quantized.

    `quantized`: the modules that become bitsandbytes weights, and whether each was a `Conv1D`. `bulk`: parameters that
    stay floats but get `bits`, not `embedding_bits`, because they are most of the model. `mark`: whose copy this is.
    `calibration`: what the modules are given as inputs. `model_weights`: how many weights the modules have together, which
    a mark needs. The rest are arguments of [`export_base`].
    """

    bits: int
    block_size: int
    double_quant: bool
    embedding_bits: int
    quantized: dict[str, bool]
    bulk: set[str]
    mark: Mark | None = None
    calibration: Calibration | None = None
    model_weights: int = 0


def quantize_base_tensor(
    name: str, tensor: torch.Tensor, settings: BaseSettings
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Quantize a parameter. Returns its entry in the manifest, and its tensors in the base.

    The entry's `kind` is `linear4bit` or `linear8bit` for bitsandbytes weights, `codebook` for floats with at most
    `2**bits` values per block, or `full_precision`. `information_bytes` counts packed codes, and scales in the dtype of
    the source; [`pack_base`] writes at most that.

    Raises:
        ValueError: if a value is not finite, or bitsandbytes does not quantize the dtype.
    """
    module, _, leaf = name.rpartition(".")
    bits, block_size, source = settings.bits, settings.block_size, tensor.dtype
    if leaf == "weight" and module in settings.quantized:
        if source not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"`{name}` has the dtype {source}; expected float32, float16 or bfloat16.")
        weight = tensor.T.contiguous() if settings.quantized[module] else tensor
        kind = "linear8bit" if bits == 8 else "linear4bit"
        if bits == 8:
            tensors = quantize_int8(name, weight)
            information = tensors[name].nbytes + tensors[f"{module}.SCB"].nbytes
        else:
            tensors = quantize_nf4(name, weight, settings)
            kept = [tensors[key] for key in (f"{name}.absmax", f"{name}.nested_absmax") if key in tensors]
            scale_bytes = sum(t.nbytes for t in kept) if settings.double_quant else len(kept[0]) * source.itemsize
            information = packed_size(bits, weight.numel()) + scale_bytes
    elif tensor.is_floating_point() and tensor.dim() > 1 and settings.embedding_bits != FULL_PRECISION:
        bits = bits if name in settings.bulk else settings.embedding_bits
        levels = codebook(bits)
        codes, block_scales = round_to_levels(tensor, levels, block_size, name=name)
        values = restore_from_levels(codes, block_scales, levels, block_size, source).view(tensor.shape)
        kind, tensors = "codebook", {name: values}
        information = packed_size(bits, len(codes)) + len(block_scales) * source.itemsize
    else:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` has values that are NaN or infinite. Is the checkpoint damaged?")
        bits, block_size = source.itemsize * 8, 1
        kind, information, tensors = "full_precision", tensor.nbytes, {name: tensor}
    entry = {
        "name": name,
        "kind": kind,
        "shape": list(tensor.shape),
        "source_dtype": str(source).removeprefix("torch."),
        "dtype": str(tensors[name].dtype).removeprefix("torch."),
        "bits": bits,
        "block_size": block_size,
        "information_bytes": information,
        "information_bits": information * 8 / max(tensor.numel(), 1),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "digest": _compute_digest(name, kind, tensors, settings.calibration is not None),
    }
    return entry, tensors


def _compute_digest(name: str, kind: str, tensors: Mapping[str, torch.Tensor], calibrated: bool) -> str:
    """The sha256 of what a parameter's tensors are in every copy of a base: a mark changes 4-bit codes, but no scale.

    A calibrated base has no marks, and differs from others in its codes alone.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if calibrated or kind != "linear4bit" or key != name:
            digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def quantize_nf4(name: str, weight: torch.Tensor, settings: BaseSettings) -> dict[str, torch.Tensor]:
    """Quantize a weight to the tensors of a bitsandbytes `Linear4bit`.

    At 4 bits these are bit-identical to those of `bitsandbytes.functional.quantize_4bit`.

    Args:
        name: of the weight; the other tensors' names begin with it.
        weight: `(out, in)`.
        settings: of the base: bits of 1 to 4, block size, whether the scales are quantized too, mark and calibration.

    Raises:
        ValueError: if a value is not finite.
    """
    block_size = settings.block_size
    code = get_4bit_type("nf4", device="cpu")
    subset = torch.tensor(nf4_subset(settings.bits), dtype=torch.uint8)
    levels = code[subset.int()]
    calibration = settings.calibration
    moments = None if calibration is None else calibration.read(name.removesuffix(".weight"))
    if moments is None:
        indices, absmax = round_to_levels(weight, levels, block_size, name=name)
    else:
        indices, absmax = round_with_compensation(weight, moments, levels, block_size, name)
    if settings.mark is not None:
        places, lower, marked = find_mark_places(weight, levels, absmax, block_size, settings.model_weights)
        chosen = lower + torch.from_numpy(draw_choices(settings.mark, name, len(places)))
        indices[places[marked]] = chosen[marked]
    if weight.numel() % block_size:
        absmax[-1].clamp_(min=1e-38)  # bitsandbytes clamps the scale of a short last block only
    state = QuantState(absmax, weight.shape, code, block_size, "nf4", weight.dtype)
    if settings.double_quant:
        state.offset = absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(absmax - state.offset, blocksize=_NESTED_BLOCK_SIZE)
        state.nested = True
    entries = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    codes = indices if settings.bits == 4 else look_up(subset, indices)
    return {name: pack_nibbles(codes)} | entries


def quantize_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a weight `(out, in)` to the tensors of a bitsandbytes `Linear8bitLt`: int8 with one scale per row.

    Raises:
        ValueError: if a value is not finite in float16.
    """
    half = weight.half()  # bitsandbytes' int8 starts from float16
    if not torch.isfinite(half).all():
        raise ValueError(f"`{name}` has values that are NaN, infinite or beyond float16, from which int8 starts.")
    codes, scales, _ = int8_vectorwise_quant(half)
    module = name.removesuffix("weight")
    return {name: codes, f"{module}SCB": scales, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}


def restore_nf4(name: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that the tensors of a `Linear4bit` stand for, `(out, in)` float32; the inverse of [`quantize_nf4`].

    Args:
        name: of the weight.
        stored: its codes under `name`, and what bitsandbytes stores beside them under `name.…`.
    """
    prefix = f"{name}."
    state = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    quantized = QuantState.from_dict(state, device=torch.device("cpu"))
    scales = quantized.absmax
    if quantized.nested:
        scales = dequantize_blockwise(scales, quantized.state2) + quantized.offset
    # Not dequantize_4bit: its AVX-512 kernel misreads rows that are not a whole number of blocks.
    codes = unpack_nibbles(stored[name], list(quantized.shape))
    return restore_from_levels(codes, scales, quantized.code, quantized.blocksize).view(quantized.shape)


def restore_int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight that int8 `codes` `(out, in)` and the `scales` `(out,)` of their rows stand for, float32."""
    return codes.float() * (scales.float()[:, None] / 127)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes as bitsandbytes does: two per byte, the first in the high nibble, `(bytes, 1)` uint8."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([_PAD_CODE])])
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1)


def unpack_nibbles(packed: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Invert [`pack_nibbles`]: one code per byte, as many as a tensor of `shape` has."""
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: math.prod(shape)]
