# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Held weights change the speed of a client's steps and nothing else."""

from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from fedlpp_hf.base.dequantized import hold_dequantized_
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.kernels import keep_layout_
from fedlpp_hf.base.load import load_base


def build_layer(rows, length, bias=True, double_quant=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    layer = bnb.nn.Linear4bit(
        length, rows, bias=bias, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.float32
    )
    layer.weight.data = torch.randn(rows, length, generator=generator).to(dtype)
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator)
    layer = layer.to("cpu")
    keep_layout_(layer)
    return layer


def run_layer(layer, x):
    """The product, the one without gradients, and the gradients of the input and the bias."""
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * output.detach().cos()).sum().backward()
    with torch.no_grad():
        results = [output.detach(), layer(x), x.grad]
    if layer.bias is not None:
        results.append(layer.bias.grad)
        layer.bias.grad = None
    return results


@pytest.mark.parametrize(("rows", "length"), [(8, 16), (3, 48), (32, 64), (5, 80), (64, 172), (128, 352), (2, 1376)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_the_same_to_the_bit(rows, length, bias, double_quant, dtype):
    layer = build_layer(rows, length, bias, double_quant, dtype)
    for shape in ((4, length), (2, 3, length)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = run_layer(layer, x)
        with hold_dequantized_(layer):
            held = run_layer(layer, x)
        assert all(map(torch.equal, held, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_base_ends_in_the_same_bits(tmp_path, dtype):
    """GPT-2's layers are `Conv1D` with biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).to(dtype).save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base", bits=3)
    tokens = torch.randint(50, (2, 12))

    def train(hold):
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1, bias="lora_only")
        model = get_peft_model(load_base(tmp_path / "base"), lora).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        for _ in range(3):
            with hold(model):
                model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return trained

    assert all(map(torch.equal, train(hold_dequantized_), train(lambda model: nullcontext())))


def test_codes_are_not_read_inside_and_are_again_outside():
    layer, x = build_layer(8, 64), torch.ones(1, 64)
    before = layer(x)
    with hold_dequantized_(layer):
        layer.weight.data.zero_()  # as nobody may
        assert torch.equal(layer(x), before)
        with hold_dequantized_(layer):
            assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)
    assert not torch.equal(layer(x), before)


def test_everything_is_restored_after_an_error():
    model = torch.nn.Sequential(build_layer(8, 64), build_layer(8, 8))
    with pytest.raises(KeyError), hold_dequantized_(model):
        raise KeyError
    model[1].compute_dtype = None
    with pytest.raises(ValueError, match="`1` has no compute dtype"), hold_dequantized_(model):
        pass
    assert not any("forward" in vars(layer) for layer in model)


def test_weights_stored_the_other_way_round_are_refused():
    layer = build_layer(8, 64)
    layer.in_features, layer.out_features = 8, 64
    with pytest.raises(ValueError, match="expected 64 outputs by 8 inputs"), hold_dequantized_(layer):
        pass
