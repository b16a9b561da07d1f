# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters with the keys of older transformers, which PEFT converts: merged as PEFT loads them."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.helpers import assert_equal_states, load_whole, merge_with_peft, save_adapter


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_MOE = _SIZES | {"vocab_size": 64, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_PROJECTIONS = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
_MIXTRAL = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
# Class and configuration, where experts were, their modules (out, in), and modules beside them.
EXPERTS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, "block_sparse_moe", _MIXTRAL, {}),
    "mixtral, attention": (
        "Mixtral", {"num_local_experts": 4}, "block_sparse_moe", _MIXTRAL, {"self_attn.o_proj": (32, 32)}
    ),
    "mixtral, router": ("Mixtral", {"num_local_experts": 4}, "block_sparse_moe", _MIXTRAL, {"block_sparse_moe.gate": (4, 32)}),
    "mixtral, one matrix": ("Mixtral", {"num_local_experts": 4}, "block_sparse_moe", {"w2": (32, 48)}, {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 16}, "mlp", _PROJECTIONS, {"self_attn.q_proj": (32, 32)}),
    "olmoe": ("Olmoe", {"num_experts": 4}, "mlp", _PROJECTIONS, {}),
}  # fmt: skip


def _write_adapter(directory, place: str, experts, others, seed: int = 0, **config) -> None:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    modules = {f"{place}.experts.{expert}.{name}": shape for expert in range(4) for name, shape in experts.items()}
    for layer in range(2):
        for name, (rows, columns) in (modules | others).items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{key}_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    targets = sorted({name.rpartition(".")[2] for name in [*experts, *others]})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets}
    directory.mkdir()
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(values | config))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_one_by_one(tmp_path, name, config):
    model_name, values, place, experts, others = EXPERTS[name]
    model_class = getattr(transformers, f"{model_name}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_MOE | values))
    model.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    _write_adapter(tmp_path / "adapter", place, experts, others, **config)
    report = merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out", verify=True)
    merged = load_whole(model_class, tmp_path / "out").state_dict()
    expected = merge_with_peft(tmp_path / "full", tmp_path / "adapter", model_class)
    assert_equal_states(merged, expected)
    assert report.through_peft is None and any("experts" in layer.parameter for layer in report.layers)
    assert any((tensor != model.state_dict()[key]).any() for key, tensor in merged.items() if "experts" in key)


def test_several_with_experts_one_by_one(tmp_path):
    _, values, place, experts, others = EXPERTS["mixtral"]
    model_class = transformers.MixtralForCausalLM
    model_class(transformers.MixtralConfig(**_MOE | values)).save_pretrained(tmp_path / "full")
    places = [tmp_path / "one", tmp_path / "other"]
    for seed, directory in enumerate(places):
        _write_adapter(directory, place, experts, others, seed)
    merge_adapter(tmp_path / "full", places, tmp_path / "out", verify=True)
    merged = load_whole(model_class, tmp_path / "out").state_dict()
    one, other = (merge_with_peft(tmp_path / "full", directory, model_class) for directory in places)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, rtol=1e-5, atol=1e-6)


def _llava():
    vision = transformers.CLIPVisionConfig(**_SIZES | {"num_hidden_layers": 1}, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(vocab_size=64, **_SIZES)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    )


def _gemma3():
    vision = transformers.SiglipVisionConfig(**_SIZES | {"num_hidden_layers": 1}, image_size=8, patch_size=4)
    text = transformers.Gemma3TextConfig(vocab_size=64, head_dim=16, num_key_value_heads=2, **_SIZES)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    )


@pytest.mark.parametrize("build", [_llava, _gemma3])
@pytest.mark.parametrize("kind", ["plain", "PiSSA"])
def test_vision_and_language_before_the_layers_moved(tmp_path, build, kind):
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "full")
    lora = {"init_lora_weights": "pissa"} if kind == "PiSSA" else {}
    config = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision.*", **lora)
    save_adapter(model, config, tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    tensors = {
        key.replace("model.model.language_model", "model.language_model.model"): value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file)
    report = merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out", verify=True)
    merged = load_whole(type(model), tmp_path / "out").state_dict()
    expected = merge_with_peft(tmp_path / "full", tmp_path / "adapter", type(model))
    assert_equal_states(merged, expected)
    assert bool(report.through_peft) == (kind == "PiSSA")


def test_keys_that_peft_does_not_convert_are_refused(tmp_path):
    _, values, place, _, _ = EXPERTS["mixtral"]
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**_MOE | values)).save_pretrained(tmp_path / "full")
    _write_adapter(tmp_path / "adapter", place, {"w1": (48, 32)}, {})  # without w3, with which it is fused
    with pytest.raises(ValueError, match="older transformers, which PEFT can't convert for MixtralForCausalLM"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    _write_adapter(tmp_path / "other", "ffn", {"w2": (32, 48)}, {})
    with pytest.raises(ValueError, match=r"ffn\.experts.*no place in MixtralForCausalLM.*older transformers"):
        merge_adapter(tmp_path / "full", tmp_path / "other", tmp_path / "out")
