# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Keyed rounding: a client's proxy is rounded by chances of its own, which nobody else knows and no round changes."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch

from .quantization import QuantizedTensor, check_bits, codebook, pack_codes, round_to_levels


_STEPS = 1 << 16  # chances are multiples of this, two bytes each


def keyed_chances(key: bytes, client: str, name: str, count: int) -> torch.Tensor:
    """`count` numbers in (0, 1), float32: a function of the owner's secret `key`, the client and the tensor's name.

    They are the output of SHAKE-256 (FIPS 202), in which the key comes first: without it they can't be told from chance,
    and one client's say nothing of another's.
    """
    digest = hashlib.shake_256(key + json.dumps([client, name]).encode()).digest(2 * count)
    return torch.from_numpy((np.frombuffer(digest, "<u2").astype(np.float32) + 0.5) / _STEPS)


def round_by_chance(
    tensor: torch.Tensor, bits: int | str, block_size: int, chances: torch.Tensor, name: str = "tensor"
) -> QuantizedTensor:
    """[`~quantization.quantize`] in which a value goes to one of the two levels around it, more likely to the nearer one.

    `chances` `(numel,)` in (0, 1). Over chances, the mean of what comes back is the value itself (stochastic rounding,
    QSGD, arXiv 1610.02132, §3.1), which rounding to the nearest level does not promise; its error is larger.

    Raises:
        ValueError: for bits without a codebook, a block size below 1, or values that are not finite.
    """
    bits = check_bits(bits)
    levels, flat = codebook(bits), tensor.detach().reshape(-1).float()
    nearest, scales = round_to_levels(flat, levels, block_size, name=name)
    scaled = flat / scales.clamp(min=1e-38).repeat_interleave(block_size)[: flat.numel()]
    above = (nearest.long() + (scaled > levels[nearest.long()])).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    codes = (above - (chances >= (scaled - low) / (high - low)).long()).to(torch.uint8)
    return QuantizedTensor(pack_codes(codes, bits), scales, tuple(tensor.shape), bits, block_size)


def round_tensors(
    tensors: Mapping[str, torch.Tensor], bits: int, block_size: int, key: bytes, client: str
) -> dict[str, QuantizedTensor]:
    """[`round_by_chance`] every tensor of an adapter, by the chances of `client`."""
    return {
        name: round_by_chance(
            tensor, bits, block_size, keyed_chances(key, client, name, tensor.numel()).to(tensor.device), name
        )
        for name, tensor in tensors.items()
    }
