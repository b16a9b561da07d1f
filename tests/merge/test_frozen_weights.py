# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Frozen weights that PEFT saves along with a LoRA on embeddings or heads: `save_pretrained` with its defaults."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import ADAPTER_WEIGHTS
from tests.helpers import assert_equal_states, change_tensors, load_whole, merge_with_peft, save_adapter


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_FROZEN = "base_model.model.lm_head.base_layer.weight"


def _make(directory, dtype=torch.float32, tied=False, build=None, **lora):
    """A full model and an adapter, saved with PEFT's defaults."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **_SIZES)
    model = build() if build else transformers.LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(directory / "full")
    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"]} | lora
    save_adapter(model, LoraConfig(**lora), directory / "adapter")
    assert any("base_layer" in key for key in load_file(directory / "adapter" / ADAPTER_WEIGHTS))
    return directory / "full", directory / "adapter"


def _opt():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ".*(q_proj|lm_head)"},
        {"use_rslora": True, "rank_pattern": {"lm_head": 2}},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_peft(tmp_path, dtype, lora):
    full, adapter = _make(tmp_path, dtype, **lora)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    # In float32, and rounded once: PEFT itself rounds an embedding's update before it is added.
    exact = merge_with_peft(full, adapter, transformers.LlamaForCausalLM, torch.float32)
    expected = {name: tensor.to(dtype) for name, tensor in exact.items()}
    assert_equal_states(merged.state_dict(), expected, ulps=int(dtype != torch.float32))
    assert report.through_peft is None and report.verified


@pytest.mark.parametrize("build", [None, _opt])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_models(tmp_path, build, target):
    if (build, target) == (_opt, "lm_head"):
        pytest.skip("PEFT saves nothing along")
    full, adapter = _make(tmp_path, tied=True, build=build, target_modules=["q_proj", target])
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = load_whole(transformers.AutoModelForCausalLM, tmp_path / "out")
    adapted = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(full), adapter).eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_bias_is_saved_along(tmp_path):
    def build():
        config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, bos_token_id=1)
        return transformers.GPTJForCausalLM(config)

    full, adapter = _make(tmp_path, build=build)
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = load_whole(transformers.GPTJForCausalLM, tmp_path / "out")
    assert_equal_states(merged.state_dict(), merge_with_peft(full, adapter, transformers.GPTJForCausalLM))


def test_codes_of_a_quantized_base_are_left_out(tmp_path):
    full, adapter = _make(tmp_path)
    merge_adapter(full, adapter, tmp_path / "plain", verify=True)
    codes = {_FROZEN: torch.zeros(96 * 16, 1, dtype=torch.uint8), f"{_FROZEN}.absmax": torch.ones(48)}
    codes |= {f"{_FROZEN}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8)}
    change_tensors(adapter / ADAPTER_WEIGHTS, codes)
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_floats_of_a_quantized_base_are_not_taken_for_the_full_models(tmp_path):
    full, _ = _make(tmp_path)
    export_base(full, tmp_path / "base", embedding_bits=3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    trained = save_adapter(load_base(tmp_path / "base"), lora, tmp_path / "theirs")
    with pytest.raises(ValueError, match="rows are not those of the full model's `lm_head.weight`.*base_dir"):
        merge_adapter(full, tmp_path / "theirs", tmp_path / "out")
    merge_adapter(full, tmp_path / "theirs", tmp_path / "out", base_dir=tmp_path / "base", verify=True)
    trained.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    expected = merge_with_peft(full, tmp_path / "bare", transformers.LlamaForCausalLM)
    assert_equal_states(load_whole(transformers.LlamaForCausalLM, tmp_path / "out").state_dict(), expected)
    merge_adapter(full, tmp_path / "theirs", tmp_path / "seen", base_dir=tmp_path / "base", base_weight=1.0)
    ids = torch.arange(20)[None]
    seen = load_whole(transformers.LlamaForCausalLM, tmp_path / "seen")
    torch.testing.assert_close(seen(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-3)


def test_rows_that_were_set_before_the_training(tmp_path):
    """As for tokens that the vocabulary has room for."""
    full, adapter = _make(tmp_path)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    weights[_FROZEN][90:] = 0.5
    change_tensors(adapter / ADAPTER_WEIGHTS, weights)
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = load_whole(transformers.LlamaForCausalLM, tmp_path / "out")
    assert_equal_states(merged.state_dict(), merge_with_peft(full, adapter, transformers.LlamaForCausalLM))


def test_several_adapters(tmp_path):
    full, _ = _make(tmp_path)
    places = []
    for seed in range(2):
        model = transformers.LlamaForCausalLM.from_pretrained(full)
        places.append(tmp_path / f"adapter-{seed}")
        save_adapter(model, LoraConfig(r=2 + seed, target_modules=["q_proj", "lm_head"]), places[-1])
    merge_adapter(full, places, tmp_path / "out", weights=[3, 1], verify=True)
    merged = load_whole(transformers.LlamaForCausalLM, tmp_path / "out").state_dict()
    one, other = (merge_with_peft(full, place, transformers.LlamaForCausalLM) for place in places)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name], rtol=1e-5, atol=1e-6)
