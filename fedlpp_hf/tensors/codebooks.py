# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Codebooks: the levels that quantized values can take, and the bytes of their codes. It loads torch when levels are made."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


BITS = (1, 2, 3, 4, 8)
FULL_PRECISION = 32
TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256: 1.6 bits per ternary code

# QLoRA (arXiv 2305.14314, appendix E): the offset that makes NormalFloat's tails finite, as in bitsandbytes.
_TAIL_QUANTILE = 0.9677083
# The eight NF4 codes with the least mean squared error on Gaussian blocks of 64 among the subsets with -1, 0 and 1.
_NF4_SUBSETS = {1: (0, 7, 15), 2: (0, 7, 11, 15), 3: (0, 1, 3, 5, 7, 10, 13, 15), 4: tuple(range(16))}
# bitsandbytes' table to the last bit; the formula below gives it within 2e-7.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@lru_cache
def _levels(bits: int) -> tuple[float, ...]:
    if bits in (1, 2, 4):  # NF2 is a subset of NF4, and so is {-1, 0, 1}
        return tuple(_NF4[code] for code in _NF4_SUBSETS[bits])
    if bits == 8:
        return tuple(code / 127 for code in range(-127, 128))

    return normal_float_levels(bits)


def normal_float_levels(bits: int) -> tuple[float, ...]:
    """NormalFloat's `2**bits` levels by formula: quantiles of the normal distribution, 2**(bits-1) above 0 and one less
    below, scaled to end at 1 (QLoRA, arXiv 2305.14314, appendix E)."""
    import torch

    def quantiles(count: int) -> "torch.Tensor":
        return torch.special.ndtri(torch.linspace(_TAIL_QUANTILE, 0.5, count, dtype=torch.float64))[:-1]

    half = 2 ** (bits - 1)
    levels = torch.cat([-quantiles(half), torch.zeros(1, dtype=torch.float64), quantiles(half + 1).flip(0)])
    return tuple((levels / levels.max()).tolist())


def codebook(bits: int | str) -> "torch.Tensor":
    """The sorted levels in [-1, 1] of a `bits`-bit code, float32.

    1 (or `"ternary"`) is {-1, 0, 1}; 2, 3 and 4 are NormalFloat, the asymmetric quantile code of QLoRA (arXiv
    2305.14314, appendix E), `(2**bits,)`; 8 is absmax int8, `(255,)`.

    Raises:
        ValueError: for any other `bits`.
    """
    import torch

    return torch.tensor(_levels(check_bits(bits)), dtype=torch.float32)


def nf4_subset(bits: int | str) -> tuple[int, ...]:
    """The NF4 codes that a base of `bits` (1 to 4) bits is restricted to, to run on 4-bit kernels."""
    bits = check_bits(bits)
    if bits not in _NF4_SUBSETS:
        raise ValueError(f"A {bits}-bit code is no subset of NF4; expected 1, 2, 3 or 4 bits.")
    return _NF4_SUBSETS[bits]


def check_bits(bits: int | str) -> int:
    """`bits` as one of 1, 2, 3, 4, 8; `"ternary"` is 1.

    Raises:
        ValueError: if it is none of these.
    """
    number = {"ternary": 1}.get(bits, bits) if isinstance(bits, str) else bits
    if isinstance(number, str) and number.isdigit():
        number = int(number)
    if number not in BITS:
        raise ValueError(f"bits={bits!r} has no codebook; expected one of {', '.join(map(str, BITS))} or 'ternary'.")
    return int(number)


def information_bits(bits: int, block_size: int, scale_bits: int = 32) -> float:
    """Information per value in bits: the code's, plus its share of the block's scale."""
    return (math.log2(3) if bits == 1 else bits) + scale_bits / block_size


def packed_size(bits: int, count: int) -> int:
    """Bytes of `count` packed codes."""
    if bits == 1:
        return -(-count // TRITS_PER_BYTE)
    return -(-count // 8) * 3 if bits == 3 else -(-count * bits // 8)
