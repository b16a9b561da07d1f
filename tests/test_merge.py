# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedlpp_hf.merge import merge_adapter


TEXT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = TEXT | {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# class, configuration, query and value modules, task
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen2": ("Qwen2ForCausalLM", TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen3": (
        "Qwen3ForCausalLM",
        TEXT | {"num_key_value_heads": 2, "head_dim": 12},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "mistral": ("MistralForCausalLM", TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "gemma": (
        "GemmaForCausalLM",
        TEXT | {"num_key_value_heads": 1, "head_dim": 12},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}, ["c_attn"], "CAUSAL_LM"),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT, ["query_key_value"], "CAUSAL_LM"),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 96, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 48},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "bert": ("BertForSequenceClassification", TEXT | {"num_labels": 3}, ["query", "value"], "SEQ_CLS"),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        ["q", "v"],
        "SEQ_2_SEQ_LM",
    ),
    "mixtral": ("MixtralForCausalLM", MOE | {"num_local_experts": 4}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        MOE | {"num_experts": 4, "head_dim": 12, "decoder_sparse_step": 1},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 16, "patch_size": 8, "num_labels": 3},
        ["q_proj", "v_proj"],
        None,
    ),
}


def build_model(architecture: str, dtype: torch.dtype = torch.float32):
    name, values, _, _ = ARCHITECTURES[architecture]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**values)).to(dtype)


def randomize_(model: torch.nn.Module, words=("lora_", "modules_to_save")) -> None:
    """LoRA starts with B = 0, with which no merge could go wrong."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.data = torch.empty_like(parameter).normal_(0, 0.2, generator=generator).abs_() + 0.01


def make_pair(directory: Path, architecture: str = "llama", dtype=torch.float32, shard_size="20KB", **lora):
    """A full model and an adapter for it on disk."""
    _, _, targets, task = ARCHITECTURES[architecture]
    model = build_model(architecture, dtype)
    model.save_pretrained(directory / "full", max_shard_size=shard_size)
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": task} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**lora))
    randomize_(peft_model)
    peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory / "full", directory / "adapter", type(model)


def merge_with_peft(full: Path, adapter: Path, model_class) -> dict[str, torch.Tensor]:
    model = model_class.from_pretrained(full, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_equal_states(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], ulps: int = 0) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype, name
        if not ulps:
            assert torch.equal(result[name], tensor), name
        else:
            a, b = result[name].float(), tensor.float()
            ulp = torch.finfo(tensor.dtype).eps * torch.maximum(a.abs(), b.abs()).clamp(min=2**-14)
            assert ((a - b).abs() <= ulps * ulp).all(), name


@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_peft_to_the_bit(tmp_path, architecture, targets):
    lora = {} if targets == "qv" else {"target_modules": "all-linear"}
    full, adapter, model_class = make_pair(tmp_path, architecture, **lora)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True, threads=2)
    result, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_states(result.state_dict(), merge_with_peft(full, adapter, model_class))
    assert report.layers and report.verified and report.through_peft is None


def test_loads_as_the_full_model_does(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in full.iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
