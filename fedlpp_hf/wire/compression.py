# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Compressed updates: w-bit blocks, top-k, or both, with feedback of the error. Pure functions of tensors.

On the wire a dense tensor is one entry, as in a task: a tensor, or a [`QuantizedTensor`]. A sparse one is two: `<key>@gaps`
uint8, the distances between kept positions, and `<key>@values`, what is there. A byte below 255 skips that many positions and
keeps the next one; 255 skips 255 and keeps none. A kept value's place then costs 8 bits where one in ten is kept, 8.7 where
one in 100 is (the entropies are 4.7 and 8.1), instead of an index's 32.
"""

import math
from collections.abc import Mapping

import torch

from ..tensors.adapters import check_tensors
from ..tensors.codebooks import FULL_PRECISION
from ..tensors.quantization import QuantizedTensor, dequantize, quantize


Tensors = Mapping[str, torch.Tensor]
Payload = Mapping[str, torch.Tensor | QuantizedTensor]

GAPS, VALUES = "@gaps", "@values"
_ESCAPE = 255


def compress_update(
    update: Tensors,
    bits: int = FULL_PRECISION,
    block_size: int = 256,
    density: float = 1.0,
    error: Tensors | None = None,
) -> tuple[dict[str, torch.Tensor | QuantizedTensor], dict[str, torch.Tensor]]:
    """An update as it is sent, and the error to add to the next one.

    Args:
        update: By key.
        bits: As in [`quantize`]; 32 leaves float32.
        block_size: As in [`quantize`].
        density: Share of values that is kept of each tensor, those of largest magnitude; at least one is.
        error: What earlier updates of this client left behind (error feedback, arXiv 1901.09847). The client keeps it from
            round to round; None where there is no earlier one.

    Raises:
        ValueError: for a density outside (0, 1], bits without a codebook, or values that are not finite.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}; expected a share in (0, 1] of values to keep.")
    payload: dict[str, torch.Tensor | QuantizedTensor] = {}
    new_error = dict(error or {})  # what this round does not send keeps its error
    for key, tensor in update.items():
        wanted = tensor.detach().to("cpu", torch.float32)
        if key in new_error:
            wanted = wanted + new_error[key]
        if density == 1:
            payload[key] = _pack(wanted, bits, block_size, key)
        else:
            flat = wanted.reshape(-1)
            count = max(math.ceil(density * flat.numel()), 1)
            places = flat.abs().topk(min(count, flat.numel())).indices.sort().values
            payload[key + GAPS] = encode_gaps(places)
            payload[key + VALUES] = _pack(flat[places], bits, block_size, key)
        sent = {name: payload[name] for name in (key, key + GAPS, key + VALUES) if name in payload}
        new_error[key] = wanted - decompress_update(sent, {key: wanted})[key]
    return payload, new_error


def decompress_update(payload: Payload, reference: Tensors) -> dict[str, torch.Tensor]:
    """The update that a payload stands for, float32, in the shapes of `reference`.

    Raises:
        ValueError: for missing or unknown keys, other shapes, positions out of range, or values that are not finite.
    """
    update: dict[str, torch.Tensor] = {}
    for name, value in payload.items():
        if name.endswith(GAPS):
            continue
        key = name.removesuffix(VALUES)
        if key in update:
            raise ValueError(f"The update has `{key}` twice, dense and sparse.")
        if key not in reference:
            update[key] = torch.empty(0)  # `check_tensors` names it
            continue
        shape = reference[key].shape
        # A forged shape must fail before its tensor is allocated.
        if isinstance(value, QuantizedTensor) and math.prod(value.shape) > shape.numel():
            raise ValueError(f"`{name}` has {math.prod(value.shape)} values; `{key}` has {shape.numel()}.")
        values = dequantize(value) if isinstance(value, QuantizedTensor) else value
        update[key] = _scatter(key, values, payload, shape) if name.endswith(VALUES) else values
    for name in payload:
        if name.endswith(GAPS) and name.removesuffix(GAPS) + VALUES not in payload:
            raise ValueError(f"The update has `{name}` but not its values.")
    # What is checked is what is kept: a float64 can be finite and infinite as a float32.
    update = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in update.items()}
    check_tensors(update, reference, "update")
    return update


def _pack(tensor: torch.Tensor, bits: int, block_size: int, key: str) -> torch.Tensor | QuantizedTensor:
    return tensor if bits == FULL_PRECISION else quantize(tensor, bits, block_size, name=key)


def _scatter(key: str, values: torch.Tensor, payload: Payload, shape: torch.Size) -> torch.Tensor:
    gaps = payload.get(key + GAPS)
    if not isinstance(gaps, torch.Tensor) or gaps.dtype != torch.uint8 or gaps.dim() != 1:
        raise ValueError(f"The update's `{key}` is sparse but its positions are missing or malformed.")
    # Each byte moves on by one position at least. Decoding takes some twenty times the bytes: forged ones fail before.
    if gaps.numel() > shape.numel():
        raise ValueError(
            f"The update's `{key}` has {gaps.numel()} bytes of positions; expected at most {shape.numel()}, one for each value."
        )
    places = decode_gaps(gaps)
    if values.shape != places.shape or (len(places) and int(places[-1]) >= shape.numel()):
        raise ValueError(
            f"The update's `{key}` has {values.numel()} values for {len(places)} positions up to "
            f"{int(places[-1]) if len(places) else 0}; expected as many, below {shape.numel()}."
        )
    dense = torch.zeros(shape.numel())
    dense[places] = values.float()
    return dense.view(shape)


def encode_gaps(places: torch.Tensor) -> torch.Tensor:
    """Rising positions `(k,)` as bytes; the format is the module's."""
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    escapes = gaps // _ESCAPE
    ends = (escapes + 1).cumsum(0) - 1
    encoded = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _ESCAPE, dtype=torch.uint8)
    encoded[ends] = (gaps % _ESCAPE).to(torch.uint8)
    return encoded


def decode_gaps(encoded: torch.Tensor) -> torch.Tensor:
    """The inverse of [`encode_gaps`]: positions `(k,)` int64."""
    kept = encoded != _ESCAPE
    return (encoded.long() + kept).cumsum(0)[kept] - 1
