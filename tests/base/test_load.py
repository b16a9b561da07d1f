# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A loaded base is what was exported, with heads to train and weights that stay where they are."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import base_fingerprint
from tests.helpers import compute_logits, model_inputs


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_task_head_can_be_trained(name, base):
    model = load_base(base(name))
    model(**model_inputs(name), labels=torch.tensor([1])).loss.backward()
    heads = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)] or [model.classifier]
    assert all(type(head) is nn.Linear and head.weight.grad.abs().max() > 0 for head in heads)


def test_tied_embeddings_stay_tied(base):
    model = load_base(base("llama_tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(base("llama_tied") / "model.safetensors")


def test_base_of_another_class_gets_a_trainable_head(base):
    model = load_base(base("llama"), AutoModelForSequenceClassification, num_labels=5)
    assert type(model.score) is nn.Linear
    assert model.score.out_features == 5
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_half_precision_source_keeps_its_container(full_model, tmp_path):
    model = LlamaForCausalLM.from_pretrained(full_model("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert plain.dtype == torch.bfloat16
    assert plain.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    ours = load_base(tmp_path / "base", device_map="cpu")
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert ours.dtype == torch.float32
    assert torch.equal(ours.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].float())
    chosen = load_base(tmp_path / "base", device_map="cpu", compute_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert chosen.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert chosen.dtype == torch.bfloat16


def test_evaluation_leaves_the_base_where_it_is(base):
    """bitsandbytes repacks weights in eval mode on CPUs with AVX512-bf16, and cuts the gradients of later training."""
    model = load_base(base("llama"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    compute_logits(model, "llama")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    layer = model.train().model.layers[0].mlp.down_proj
    x = torch.ones(1, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_full_model_is_no_base(full_model):
    with pytest.raises(ValueError, match="clients may load"):
        load_base(full_model("llama"))
    with pytest.raises(ValueError, match="base_manifest"):
        base_fingerprint(AutoModelForCausalLM.from_pretrained(full_model("llama")))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_mapped_from_the_file(base):
    """Processes that hold the same base share its memory, as long as nobody copies a weight."""
    directory = base("llama", bits=4)
    model = load_base(directory)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(directory / "model.safetensors"))]
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            place = parameter.data_ptr()
            assert any(int(start, 16) <= place < int(end, 16) for start, end in ranges), name
