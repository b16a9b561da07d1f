# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Codes packed into bytes, and tables looked up by codes, in slices that stay in a core's cache."""

from collections.abc import Callable

import torch

from .codebooks import TRITS_PER_BYTE, packed_size


# Values whose temporaries stay in a core's cache and in memory that is there already (new memory costs as much as the
# arithmetic), and fewer than the 32768 from which torch spreads an operation over threads.
CACHED = 30 << 10  # a multiple of 5 and 8, the codes that are packed together


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes` `(n,)` uint8 into bytes, the first code in the lowest bits.

    8 bits: one code per byte; 4: two; 2: four; 3: eight codes in three bytes; 1 (ternary): five codes per byte in base
    three. The last group is padded with zeros.
    """
    return codes.contiguous() if bits == 8 else _map_slices(lambda part: _pack_slice(part, bits), codes)


def _pack_slice(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 1:
        groups = _pad(codes, TRITS_PER_BYTE)
        packed = groups[:, -1].clone()
        for place in range(TRITS_PER_BYTE - 2, -1, -1):
            packed.mul_(3).add_(groups[:, place])
        return packed
    if bits == 3:
        c = _pad(codes, 8)
        first = c[:, 0] | c[:, 1] << 3 | c[:, 2] << 6
        second = c[:, 2] >> 2 | c[:, 3] << 1 | c[:, 4] << 4 | c[:, 5] << 7
        third = c[:, 5] >> 1 | c[:, 6] << 2 | c[:, 7] << 5
        return torch.stack([first, second, third], dim=1).reshape(-1)
    groups = _pad(codes, 8 // bits)
    packed = groups[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= groups[:, place] << bits * place
    return packed


def _pad(codes: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -codes.numel() % multiple
    return (torch.cat([codes, codes.new_zeros(missing)]) if missing else codes).view(-1, multiple)


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of [`pack_codes`]: `count` codes, uint8.

    Raises:
        ValueError: if `packed` has another size than `count` codes need.
    """
    if packed.numel() != packed_size(bits, count):
        raise ValueError(
            f"{packed.numel()} bytes of {bits}-bit codes for {count} values; expected {packed_size(bits, count)}. "
            "The data are truncated or belong to another tensor."
        )
    if bits == 8:
        return packed.clone()
    return _map_slices(lambda part: _unpack_slice(part, bits), packed, packed_size(bits, CACHED))[:count]


def _unpack_slice(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 1:
        byte = torch.arange(256, device=packed.device)
        trits = torch.stack([byte // 3**place % 3 for place in range(TRITS_PER_BYTE)], dim=1).to(torch.uint8)
        codes = trits.index_select(0, packed.int())
    elif bits == 3:
        a, b, c = packed.view(-1, 3).unbind(1)
        codes = torch.stack(
            [
                a & 7,
                a >> 3 & 7,
                a >> 6 | (b & 1) << 2,
                b >> 1 & 7,
                b >> 4 & 7,
                b >> 7 | (c & 3) << 1,
                c >> 2 & 7,
                c >> 5,
            ],
            dim=1,
        )
    else:
        codes = torch.stack([packed >> bits * place & 2**bits - 1 for place in range(8 // bits)], dim=1)
    return codes.view(-1)


def look_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`table[indices]` for indices `(n,)` uint8, several times as fast."""
    return _map_slices(lambda part: table.index_select(0, part.int()), indices)


def _map_slices(
    function: Callable[[torch.Tensor], torch.Tensor], flat: torch.Tensor, size: int = CACHED
) -> torch.Tensor:
    return torch.cat([function(part) for part in flat.split(size)])
