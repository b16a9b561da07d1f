# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rounding for a layer's output: exact in bitsandbytes' kernels, and better at what it is for."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from fedlpp_hf.base.compensation import round_with_compensation
from fedlpp_hf.tensors.codebooks import nf4_subset
from fedlpp_hf.tensors.quantization import restore_from_levels, round_to_levels


SHAPES = [(48, 128, 64), (33, 96, 64), (16, 172, 64), (8, 64, 128)]  # rows of whole blocks, and blocks across rows


def make_levels(bits):
    return get_4bit_type("nf4", device="cpu")[list(nf4_subset(bits))]


def make_layer(rows, columns, dtype=torch.float32):
    """A weight, and inputs whose features are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.logspace(-1, 1, columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    return weight, inputs


def restore(indices, scales, bits, block_size, shape):
    return restore_from_levels(indices, scales, make_levels(bits), block_size).view(shape)


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_bitsandbytes_gives_the_same_codes_and_scales(rows, columns, block_size, bits):
    weight, inputs = make_layer(rows, columns)
    weight[0, :block_size] = 0  # a block without a scale, if it is in one row
    indices, scales = round_with_compensation(weight, inputs.T @ inputs, make_levels(bits), block_size)
    made = restore(indices, scales, bits, block_size, weight.shape)
    packed, state = quantize_4bit(made, blocksize=block_size, quant_type="nf4")
    expected = torch.tensor(nf4_subset(bits), dtype=torch.uint8)[indices.long()]
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: weight.numel()]
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax[scales > 0], scales[scales > 0])
    again, same = round_to_levels(made, make_levels(bits), block_size)
    assert torch.equal(again, indices) and torch.equal(same, scales)
    if columns % block_size == 0:  # dequantize_4bit reads wrong scales elsewhere, see keep_layout_
        assert torch.equal(dequantize_4bit(packed, state), made)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("rows, columns, block_size", SHAPES)
def test_outputs_are_nearer(rows, columns, block_size, bits):
    weight, inputs = make_layer(rows, columns)
    plain = restore(*round_to_levels(weight, make_levels(bits), block_size), bits, block_size, weight.shape)
    found = round_with_compensation(weight, inputs.T @ inputs, make_levels(bits), block_size)
    made = restore(*found, bits, block_size, weight.shape)
    assert (inputs @ (made - weight).T).norm() < 0.8 * (inputs @ (plain - weight).T).norm()


def test_inputs_that_are_independent_leave_the_nearest_levels():
    weight, _ = make_layer(32, 128, torch.bfloat16)
    levels = make_levels(3)
    indices, scales = round_with_compensation(weight, torch.eye(128), levels, 64)
    assert torch.equal(scales, scales.bfloat16().float())  # packed in the weight's dtype
    blocks, made = weight.float().view(-1, 64), levels[indices.long()].view(-1, 64) * scales[:, None]
    largest = blocks.abs() == blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] - levels * scales[:, None, None]).abs().amin(2)
    torch.testing.assert_close((made - blocks).abs()[~largest], nearest[~largest])
    assert torch.equal(made[largest].abs(), scales[:, None].expand_as(made)[largest])
    plain = restore(*round_to_levels(weight, levels, 64), 3, 64, weight.shape)
    assert (made.view_as(weight) - weight).norm() < (plain - weight).norm()


def test_inputs_that_are_all_zero_leave_the_nearest_levels():
    weight, _ = make_layer(32, 128)
    indices, _ = round_with_compensation(weight, torch.zeros(128, 128), make_levels(3), 64)
    assert torch.equal(indices, round_to_levels(weight, make_levels(3), 64)[0])


def test_features_that_never_occur_are_no_obstacle():
    weight, inputs = make_layer(32, 128)
    inputs[:, 5:40] = 0
    indices, scales = round_with_compensation(weight, inputs.T @ inputs, make_levels(3), 64)
    made = restore(indices, scales, 3, 64, weight.shape)
    plain = restore(*round_to_levels(weight, make_levels(3), 64), 3, 64, weight.shape)
    assert (inputs @ (made - weight).T).norm() < 0.8 * (inputs @ (plain - weight).T).norm()


@pytest.mark.parametrize("moments", [torch.eye(64), torch.eye(128) * float("nan")])
def test_moments_of_another_layer_are_refused(moments):
    weight, _ = make_layer(8, 128)
    with pytest.raises(ValueError, match="`q_proj` has 128 inputs; expected finite moments"):
        round_with_compensation(weight, moments, make_levels(3), 64, "q_proj")
