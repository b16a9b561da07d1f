# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Huffman coding of quantization codes: some levels are far more frequent than others, and take fewer bits."""

import zlib

import torch

from ..tensors.codebooks import packed_size
from ..tensors.packing import pack_codes, unpack_codes


_WORTH = 0.95  # of the packed size; what saves less stays as it is
_LARGEST_RATIO = 8  # a Huffman code has at least one bit for each byte


def shrink_codes(codes: torch.Tensor, bits: int) -> bytes:
    """Encode codes `(n,)` uint8 of `bits` bits in few bytes: Huffman-coded, or packed by [`pack_codes`].

    Weights are normally distributed and levels are not equally far apart: a code of 2 bits carries 1.46 bits, one of 3
    bits 2.64. zlib's Huffman code is within a percent of that, at several hundred million codes a second. Its search for
    repetitions finds none: it takes ten times as long and makes the result larger.
    """
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(_group(codes, bits).numpy().data) + coder.flush()
    packed = packed_size(bits, codes.numel())
    return data if len(data) < _WORTH * packed else pack_codes(codes, bits).numpy().tobytes()


def restore_codes(data: bytes, bits: int, count: int) -> torch.Tensor:
    """Invert [`shrink_codes`]: `count` codes, uint8. The size of `data` tells whether they are Huffman-coded.

    Raises:
        ValueError: if the data are damaged, or hold more than `count` codes.
    """
    packed = packed_size(bits, count)
    if len(data) >= _WORTH * packed:
        return unpack_codes(_as_tensor(data), bits, count)
    size = -(-count // 2) if bits == 3 else packed
    if size > _LARGEST_RATIO * len(data):
        raise ValueError(f"{len(data)} bytes can't hold {count} codes of {bits} bits; the data are damaged.")
    decoder = zlib.decompressobj()
    try:
        plain = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"Codes of {bits} bits can't be read ({error}); the data are damaged.") from error
    if len(plain) != size or not decoder.eof or decoder.unused_data:
        raise ValueError(f"{len(data)} bytes are not {count} codes of {bits} bits; the data are damaged.")
    grouped = _as_tensor(plain)
    if bits != 3:
        return unpack_codes(grouped, bits, count)
    if count and int(grouped.max()) > 63:
        raise ValueError("A pair of 3-bit codes is above 63; the data are damaged.")
    return torch.stack([grouped & 7, grouped >> 3], dim=1).view(-1)[:count]


def _group(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put whole codes into each byte, so that bytes are as uneven as codes; packed codes of 3 bits span two bytes."""
    if bits != 3:
        return pack_codes(codes, bits)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[::2] | codes[1::2] << 3


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
