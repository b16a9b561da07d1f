# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Codes as a Huffman code: as small as their entropy, the same when they come back, and never more than was promised."""

import zlib

import pytest
import torch

from fedlpp_hf.base.huffman import restore_codes, shrink_codes
from fedlpp_hf.tensors.codebooks import codebook, packed_size
from fedlpp_hf.tensors.packing import pack_codes
from fedlpp_hf.tensors.quantization import round_to_levels


def gaussian_codes(bits, count=2**16):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return round_to_levels(values, codebook(bits), 4096 if bits == 8 else 64)[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_normal_weights_take_little_more_than_their_entropy(bits):
    codes = gaussian_codes(bits)
    shares = codes.unique(return_counts=True)[1] / len(codes)
    entropy = float(-(shares * shares.log2()).sum())
    size = len(shrink_codes(codes, bits)) * 8 / len(codes)
    assert entropy <= size < 1.025 * entropy
    assert size < 0.95 * packed_size(bits, len(codes)) * 8 / len(codes)


def test_what_saves_too_little_stays_packed():
    codes = gaussian_codes(4)
    assert shrink_codes(codes, 4) == pack_codes(codes, 4).numpy().tobytes()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
@pytest.mark.parametrize("kind", ["equal", "uneven", "uniform"])
def test_codes_come_back(bits, count, kind):
    levels = len(codebook(bits))
    codes = {
        "equal": torch.zeros(count, dtype=torch.uint8),
        "uneven": (torch.arange(count) % 13 == 0).to(torch.uint8) * (levels - 1),
        "uniform": torch.randint(levels, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8),
    }[kind]
    data = shrink_codes(codes, bits)
    assert len(data) <= packed_size(bits, count)
    assert torch.equal(restore_codes(data, bits, count), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_damage_is_noticed(bits):
    codes = gaussian_codes(bits, 4096)
    data = shrink_codes(codes, bits)
    for place in range(0, len(data), 37):
        changed = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises(ValueError, match="the data are damaged"):
            restore_codes(changed, bits, 4096)
    for cut in (data[:-1], data[: len(data) // 2], data[:1], b"", data + b"\x00"):
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            restore_codes(cut, bits, 4096)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_more_than_was_promised_is_never_made(bits, monkeypatch):
    bomb = zlib.compress(bytes(10**7), 9)  # 10 kB
    asked = []
    decompressobj = zlib.decompressobj

    class Decoder:
        def __init__(self):
            self.decoder = decompressobj()

        def decompress(self, data, max_length):
            asked.append(max_length)
            return self.decoder.decompress(data, max_length)

        def __getattr__(self, name):
            return getattr(self.decoder, name)

    monkeypatch.setattr(zlib, "decompressobj", Decoder)
    in_a_byte = {1: 5, 2: 4, 3: 2, 8: 1}[bits]
    size = 7 * len(bomb)  # less than is in it
    for count in (size * in_a_byte, 2 * size * in_a_byte, 10**15):  # and more than any code has in so few bytes
        with pytest.raises(ValueError, match="the data are damaged"):
            restore_codes(bomb, bits, count)
    assert asked == [size + 1]


def test_a_pair_above_63_is_refused():
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(bytes([64, 1]) * 250) + coder.flush()
    with pytest.raises(ValueError, match="above 63"):
        restore_codes(data, 3, 1000)
