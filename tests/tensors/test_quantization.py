# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Block quantization: the codebooks of the papers, the nearest level, and packing that loses nothing."""

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.tensors.codebooks import (
    BITS,
    check_bits,
    codebook,
    information_bits,
    nf4_subset,
    normal_float_levels,
    packed_size,
)
from fedlpp_hf.tensors.packing import look_up, pack_codes, unpack_codes
from fedlpp_hf.tensors.quantization import (
    QuantizedTensor,
    dequantize,
    quantize,
    quantize_tensors,
    restore_from_levels,
    round_to_levels,
)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (1, [-1, 0, 1]),
        (2, [-1, 0, 0.3379, 1]),
        (3, [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1]),
    ],
)
def test_codebooks_are_those_of_the_paper(bits, levels):
    torch.testing.assert_close(codebook(bits), torch.tensor(levels).float(), atol=5e-5, rtol=0)


def test_four_bits_are_bitsandbytes_nf4_to_the_bit():
    assert torch.equal(codebook(4), bnb.functional.get_4bit_type("nf4", device="cpu"))
    torch.testing.assert_close(torch.tensor(normal_float_levels(4)), codebook(4), atol=2e-7, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_sorted_and_have_both_ends_and_zero(bits):
    levels = codebook(bits)
    assert len(levels) == {1: 3, 8: 255}.get(bits, 2**bits)
    assert torch.equal(levels, levels.sort().values)
    assert {-1.0, 0.0, 1.0} <= set(levels.tolist())


def test_coarse_codes_are_nf4_codes():
    nf4 = codebook(4)
    assert nf4_subset(2) == (0, 7, 11, 15)
    for bits in (1, 2, 4):
        assert torch.equal(nf4[list(nf4_subset(bits))], codebook(bits))
    assert len(nf4_subset(3)) == 8
    assert nf4_subset("ternary") == nf4_subset(1)
    with pytest.raises(ValueError, match="8-bit code is no subset"):
        nf4_subset(8)


@pytest.mark.parametrize("bits", [0, 5, 16, 32, "two", "", None, 2.5])
def test_bits_without_a_codebook_are_refused(bits):
    with pytest.raises(ValueError, match=r"expected one of 1, 2, 3, 4, 8 or 'ternary'"):
        check_bits(bits)


def test_names_of_bits():
    assert check_bits("ternary") == 1
    assert check_bits("4") == 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_every_value_gets_its_nearest_level(bits, count):
    tensor = gaussian(count, seed=count)
    restored = dequantize(quantize(tensor, bits, 64))
    levels = codebook(bits)
    for block, values in zip(tensor.split(64), restored.split(64), strict=True):
        candidates = levels * block.abs().max()
        nearest = (block[:, None] - candidates).abs().min(1).values
        torch.testing.assert_close((block - values).abs(), nearest, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [64, 100, 50_000, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_rounded_by_the_formula(bits, block_size, dtype):
    """They are worked on in slices; here, whole."""
    tensor = gaussian(100_001, seed=bits).to(dtype)
    tensor[70_000:70_300] = 0
    tensor[:1000] = (
        codebook(bits)[:-1].repeat(1000)[:1000] + codebook(bits)[1:].repeat(1000)[:1000]
    )  # borders, doubled
    tensor[:1000:50] = 2
    levels = codebook(bits)
    indices, scales = round_to_levels(tensor, levels, block_size)
    blocks = torch.nn.functional.pad(tensor.float(), (0, -len(tensor) % block_size)).view(-1, block_size)
    assert torch.equal(scales, blocks.abs().amax(1))
    divisors = scales.clamp(min=1e-38)[:, None].expand_as(blocks).reshape(-1)[: len(tensor)]
    scaled, whole = tensor.float() * divisors.reciprocal(), len(tensor) - len(tensor) % block_size
    scaled[whole:] = tensor[whole:].float() / divisors[whole:]
    assert torch.equal(indices.long(), torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2))
    expected = levels[indices.long()] * scales.repeat_interleave(block_size)[: len(tensor)]
    assert torch.equal(restore_from_levels(indices, scales, levels, block_size, dtype), expected.to(dtype))


@pytest.mark.parametrize("count", [0, 1, 40_000])
def test_looking_up_is_indexing(count):
    table = torch.arange(256) * 3
    indices = torch.arange(count).to(torch.uint8)
    assert torch.equal(look_up(table, indices), table[indices.long()])


@pytest.mark.parametrize(("bits", "error"), [(2, 0.57), (3, 0.20), (4, 0.09)])
def test_gaussian_errors_are_those_of_the_design(bits, error):
    tensor = gaussian(64 * 4000)
    restored = dequantize(quantize(tensor, bits, 64))
    assert (tensor - restored).norm() / tensor.norm() == pytest.approx(error, abs=0.01)


def test_three_bits_in_nf4_are_as_good_as_nf3():
    tensor = gaussian(64 * 4000)
    levels = codebook(4)[list(nf4_subset(3))]
    restored = restore_from_levels(*round_to_levels(tensor, levels, 64), levels, 64)
    assert (tensor - restored).norm() <= (tensor - dequantize(quantize(tensor, 3, 64))).norm()


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_again_changes_nothing(bits):
    once = dequantize(quantize(gaussian(10, 33), bits, 64))
    assert torch.equal(dequantize(quantize(once, bits, 64)), once)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_zeros_come_back_as_zeros(bits, scale_dtype):
    """LoRA's B at the start."""
    tensor = torch.zeros(3, 50)
    quantized = quantize(tensor, bits, 64, scale_dtype)
    assert torch.equal(dequantize(quantized), tensor)
    tensor[0, 0] = 2.0  # one block with a value, two without
    assert torch.equal(dequantize(quantize(tensor, bits, 64, scale_dtype)), tensor)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_dtypes_and_sizes(bits):
    for shape in [(), (1,), (7, 13), (2, 3, 4), (0,)]:
        tensor = gaussian(*shape).to(torch.bfloat16)
        quantized = quantize(tensor, bits, 8, torch.float16)
        restored = dequantize(quantized, torch.bfloat16)
        assert restored.shape == tensor.shape
        assert restored.dtype == torch.bfloat16
        assert quantized.nbytes == packed_size(bits, tensor.numel()) + 2 * -(-tensor.numel() // 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 64, 70])
def test_values_that_are_not_finite_are_refused_by_name(value, place):
    tensor = gaussian(71)
    tensor[place] = value
    with pytest.raises(ValueError, match=r"`layer\.7\.lora_A`"):
        quantize(tensor, 4, 64, name="layer.7.lora_A")


def test_scales_beyond_float16_are_refused():
    tensor = gaussian(64) * 1e6
    with pytest.raises(ValueError, match="float16"):
        quantize(tensor, 4, 64, torch.float16)
    assert torch.isfinite(dequantize(quantize(tensor, 4, 64))).all()


def test_half_precision_scales_cost_little():
    tensor = gaussian(64 * 100)
    exact, rounded = (dequantize(quantize(tensor, 4, 64, dtype)) for dtype in (torch.float32, torch.float16))
    same_level = (rounded - exact).abs() <= exact.abs() * 2**-10  # all but those at the border of two levels
    assert same_level.float().mean() > 0.999
    assert (rounded - tensor).norm() < 1.001 * (exact - tensor).norm()


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_must_be_positive(block_size):
    with pytest.raises(ValueError, match="block_size"):
        quantize(gaussian(8), 4, block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [64, 96, 4096])
def test_four_bits_are_bitsandbytes_codes(dtype, count):
    tensor = gaussian(count).to(dtype)
    packed, state = bnb.functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    indices, scales = round_to_levels(tensor, codebook(4), 64)
    assert torch.equal(indices[::2] << 4 | indices[1::2], packed.view(-1))
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize(
    ("bits", "count", "size"), [(1, 5, 1), (1, 6, 2), (2, 5, 2), (3, 8, 3), (3, 9, 6), (4, 3, 2), (8, 3, 3)]
)
def test_packed_sizes(bits, count, size):
    assert packed_size(bits, count) == size
    assert len(pack_codes(torch.zeros(count, dtype=torch.uint8), bits)) == size


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 200), st.integers(0, 2**31))
def test_packing_loses_nothing(bits, count, seed):
    highest = 3 if bits == 1 else 2**bits
    codes = torch.randint(highest, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(bits, count)
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.integers(1, 20),
)
def test_errors_are_bounded_by_the_widest_gap(bits, values, block_size):
    tensor = torch.tensor(values)
    restored = dequantize(quantize(tensor, bits, block_size))
    half_gap = codebook(bits).diff().max() / 2
    for block, rounded in zip(tensor.split(block_size), restored.split(block_size), strict=True):
        assert ((block - rounded).abs() <= block.abs().max() * half_gap * (1 + 1e-4) + 1e-37).all()


@pytest.mark.parametrize("bits", BITS)
def test_truncated_data_are_refused(bits):
    quantized = quantize(gaussian(100), bits, 64)

    def changed(**fields):
        values = {name: getattr(quantized, name) for name in ("codes", "scales", "shape", "bits", "block_size")}
        return QuantizedTensor(**(values | fields))

    with pytest.raises(ValueError, match="truncated"):
        dequantize(changed(codes=quantized.codes[:-1]))
    with pytest.raises(ValueError, match="truncated"):
        dequantize(changed(scales=quantized.scales[:-1]))
    with pytest.raises(ValueError, match="truncated"):
        dequantize(changed(shape=(1000,)))


def test_codes_that_no_encoder_writes_are_refused():
    for bits, byte in ((8, 255), (1, 255)):
        quantized = quantize(gaussian(4), bits, 4)
        quantized.codes.fill_(byte)
        if bits == 1:  # 255 is over 242, the largest that five ternary digits make; its digits are still 0, 1 and 2
            assert set(unpack_codes(quantized.codes, 1, 4).tolist()) <= {0, 1, 2}
            continue
        with pytest.raises(ValueError, match="damaged"):
            dequantize(quantized)


def test_information():
    assert information_bits(4, 64) == 4.5
    assert information_bits(2, 256, 16) == 2.0625
    assert information_bits(1, 32) == pytest.approx(2.585, abs=1e-3)


def test_quantize_tensors_takes_those_named():
    tensors = {"a": gaussian(8), "b": gaussian(9)}
    assert quantize_tensors(tensors, 4).keys() == {"a", "b"}
    assert quantize_tensors(tensors, 4, names=["b"]).keys() == {"b"}
    tensors["b"][0] = float("nan")
    with pytest.raises(ValueError, match="`b`"):
        quantize_tensors(tensors, 4)
