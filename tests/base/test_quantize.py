# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a base computes with is the full model's values, each rounded to the nearest level."""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D

from fedlpp_hf.base.kernels import keep_layout_
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import describe_base, read_manifest
from fedlpp_hf.base.quantize import BaseSettings, pack_nibbles, quantize_nf4, unpack_nibbles
from fedlpp_hf.tensors.codebooks import codebook, nf4_subset
from tests.helpers import SMALL_MODELS, compute_logits


def round_by_search(tensor, levels):
    """The nearest of `levels` for every element relative to its block of 64, by trying all."""
    rounded = [
        levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max()
        for block in tensor.float().flatten().split(64)
    ]
    return torch.cat(rounded).view(tensor.shape).to(tensor.dtype)


@torch.no_grad()
def quantized_reference(directory, name, manifest, bits):
    """The full model with every matrix replaced by its nearest representable values, found by search."""
    model = SMALL_MODELS[name][0].from_pretrained(directory).eval()
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    nf4 = bnb.functional.get_4bit_type("nf4", device="cpu")[list(nf4_subset(bits))]  # at 3 bits this is not NF3
    for key, parameter in model.named_parameters():
        module = model.get_submodule(key.rpartition(".")[0])
        if entries[key]["kind"] == "codebook":
            parameter.copy_(round_by_search(parameter, codebook(entries[key]["bits"])))
        elif entries[key]["kind"] == "linear4bit" and isinstance(module, Conv1D):
            parameter.copy_(round_by_search(parameter.T.contiguous(), nf4).T)
        elif entries[key]["kind"] == "linear4bit":
            parameter.copy_(round_by_search(parameter, nf4))
    return model


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 4), ("llama", 3), ("llama", 1)] + [(name, 2) for name in SMALL_MODELS]
)
def test_base_computes_what_the_dequantized_full_model_computes(name, bits, full_model, base):
    directory = base(name, bits=bits)
    reference = compute_logits(quantized_reference(full_model(name), name, read_manifest(directory), bits), name)
    exact = compute_logits(SMALL_MODELS[name][0].from_pretrained(full_model(name)), name)
    loaded = compute_logits(load_base(directory), name)
    torch.testing.assert_close(loaded, reference, atol=2e-4, rtol=2e-4)
    assert (loaded - exact).abs().max() > 10 * (loaded - reference).abs().max()
    plain = SMALL_MODELS[name][0].from_pretrained(directory)
    keep_layout_(plain)
    assert torch.equal(compute_logits(plain, name), loaded)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_four_bits_are_those_of_transformers(name, double_quant, full_model, base):
    directory = base(name, double_quant=double_quant)
    theirs = (
        SMALL_MODELS[name][0]
        .from_pretrained(
            full_model(name),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double_quant,
                llm_int8_skip_modules=read_manifest(directory)["skip_modules"],
            ),
        )
        .state_dict()
    )
    ours = load_base(directory).state_dict()
    assert ours.keys() == theirs.keys()
    quantized = [key for key in ours if ".weight" in key and key.rpartition(".weight")[0] + ".weight.absmax" in ours]
    assert len(quantized) >= 8 * 4
    for key in quantized:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eight_bits_are_those_of_transformers(name, full_model, base):
    directory = base(name, bits=8, embedding_bits=32)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(full_model(name), quantization_config=config)
    loaded = load_base(directory)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(compute_logits(loaded, name), compute_logits(theirs, name))
    assert torch.equal(compute_logits(plain, name), compute_logits(theirs, name))
    assert sum(isinstance(module, bnb.nn.Linear8bitLt) for module in loaded.modules()) > 7


SETTINGS = BaseSettings(4, 32, False, 4, {}, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 32), (5, 7), (1, 1), (64, 1)])
def test_codes_are_bitsandbytes_own(dtype, shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.view(-1)[:32] = 0  # in one shape a whole block, in others part of one
    entries = quantize_nf4("w", weight, SETTINGS)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert torch.equal(entries["w"], packed)
    for key, tensor in state.as_dict(packed=True).items():
        assert torch.equal(entries[f"w.{key}"], tensor), key


def test_ties_and_extremes_round_as_bitsandbytes_does():
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    middles = (code[1:] + code[:-1]) / 2
    for scale in (1.0, 0.1, 3.0, 1e-30, 1e30):
        weight = (torch.cat([middles, code, torch.tensor([1.0])]) * scale).view(4, 8)
        entries = quantize_nf4("w", weight, SETTINGS)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
        assert torch.equal(entries["w"], packed)
        assert torch.equal(entries["w.absmax"], state.absmax)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_below_four_bits_are_a_subset_of_nf4(bits, base):
    directory = base("llama", bits=bits)
    tensors = load_file(directory / "model.safetensors")
    entries = [entry for entry in read_manifest(directory)["tensors"] if entry["kind"] == "linear4bit"]
    assert len(entries) == 14
    seen: set[int] = set()
    for entry in entries:
        seen |= set(unpack_nibbles(tensors[entry["name"]], entry["shape"]).tolist())
    assert seen == set(nf4_subset(bits))
    assert nf4_subset(2) == (0, 7, 11, 15)


def test_nibbles_survive_packing():
    codes = torch.arange(16, dtype=torch.uint8)[:15]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), [3, 5]), codes)
    assert pack_nibbles(codes)[0].item() == 0x01
    assert pack_nibbles(codes)[-1].item() == 0xE7  # padded with the code of zero


@pytest.mark.parametrize("name", list(SMALL_MODELS))
def test_no_matrix_leaves_in_full_precision(name, full_model, base):
    directory = base(name, bits=2, embedding_bits=3)
    exact = dict(SMALL_MODELS[name][0].from_pretrained(full_model(name)).named_parameters(remove_duplicate=False))
    loaded = load_base(directory)
    described = describe_base(directory)
    checked = 0
    for key, parameter in loaded.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            continue
        if parameter.dim() < 2:
            assert key in {entry["name"] for entry in described["full_precision"]}
            continue
        checked += 1
        assert (parameter - exact[key]).abs().max() > 0, key
        entry = next(entry for entry in described["tensors"] if entry["name"] == key)
        assert entry["bits"] in (2, 3)
        for block in parameter.flatten().split(64):
            assert len(block.unique()) <= 2 ** entry["bits"], key
    assert checked
    assert all(len(entry["shape"]) < 2 for entry in described["full_precision"])
    assert described["full_precision_linears"] == []


def test_bulk_that_is_no_linear_gets_the_bits_of_the_linears(base):
    kinds = {entry["name"]: entry for entry in read_manifest(base("mixtral", bits=2))["tensors"]}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"]["bits"] == 2
    assert kinds["model.layers.0.mlp.gate.weight"]["bits"] == 4
    kinds = {entry["name"]: entry for entry in read_manifest(base("t5", bits=2))["tensors"]}
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo.weight"]["bits"] == 2
    assert kinds["shared.weight"]["bits"] == 4
