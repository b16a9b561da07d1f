# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""bitsandbytes on a CPU computes what the codes say, whatever the shape."""

import bitsandbytes as bnb
import pytest
import torch

from fedlpp_hf.base.kernels import keep_layout_
from fedlpp_hf.base.quantize import unpack_nibbles


def build_layer(rows, length, double_quant=False):
    layer = bnb.nn.Linear4bit(length, rows, bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight.data = torch.randn(rows, length, generator=torch.Generator().manual_seed(length))
    layer = layer.to("cpu")
    keep_layout_(layer)
    return layer


def read_weight(layer):
    """The weight from its codes, by the formula."""
    state = layer.weight.quant_state
    codes = unpack_nibbles(layer.weight.data, list(state.shape)).int()
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return (state.code[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]).view(state.shape)


# 172, 352: the widths of two small Llamas; 16 and 48 have rows of a part of a block, and 3 x 48 a short last block.
@pytest.mark.parametrize(("rows", "length"), [(8, 16), (3, 48), (32, 64), (5, 80), (64, 172), (128, 352), (2, 1376)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_products_and_gradients_are_those_of_the_codes(rows, length, double_quant):
    layer = build_layer(rows, length, double_quant)
    weight = read_weight(layer)
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(1))
    expected = x @ weight.T
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(mode)(x), expected, atol=1e-4, rtol=1e-4)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_dequantized_values_are_those_of_the_codes(dtype, block_size):
    for length in (16, 32, 40, 48, 64, 96, 160, 320):
        weight = torch.randn(7, length, generator=torch.Generator().manual_seed(length)).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        scales = state.absmax.repeat_interleave(block_size)[: weight.numel()]
        expected = (state.code[unpack_nibbles(packed, [7, length]).int()] * scales).view(7, length).to(dtype)
        keep_layout_(build_layer(1, 2))
        torch.testing.assert_close(bnb.functional.dequantize_4bit(packed, state), expected)


def test_evaluation_moves_nothing():
    """Without `keep_layout_`, a CPU with AVX512-bf16 repacks the weight, rounds its scales and cuts later gradients."""
    layer = build_layer(32, 64)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_models_without_such_layers_are_left_alone():
    model = torch.nn.Linear(4, 4)
    keep_layout_(model)
    assert not hasattr(model, "support_avx512bf16_for_cpu")
