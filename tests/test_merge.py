# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.export import export_base, load_base
from fedlpp_hf.merge import streaming as merge
from fedlpp_hf.merge.in_place import undo_merge_
from fedlpp_hf.merge.streaming import merge_adapter
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.tensors.quantization import quantize
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate


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


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is most of a small merge, and no test pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


OTHERS = {
    "gpt_oss": (
        "GptOssForCausalLM",
        # As many experts as rows of one, so that taking one for the other would show.
        MOE | {"num_local_experts": 48, "head_dim": 12, "layer_types": ["full_attention"] * 2},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "dinov2": (
        "Dinov2Model",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
        | {"use_swiglu_ffn": True, "image_size": 16, "patch_size": 8},
        ["q_proj"],
        None,
    ),
}


def build_model(architecture: str, dtype: torch.dtype = torch.float32):
    name, values, _, _ = (ARCHITECTURES | OTHERS)[architecture]
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
    _, _, targets, task = (ARCHITECTURES | OTHERS)[architecture]
    model = build_model(architecture, dtype)
    model.save_pretrained(directory / "full", max_shard_size=shard_size)
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": task} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**lora))
    randomize_(peft_model)
    peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory / "full", directory / "adapter", type(model)


def merge_with_peft(full: Path, adapter: Path, model_class, dtype="auto") -> dict[str, torch.Tensor]:
    model = model_class.from_pretrained(full, dtype=dtype)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [8, 6])  # scales of 2 and 1.5, which take different ways
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_narrow_dtypes_are_rounded_once(tmp_path, architecture, targets, alpha, dtype):
    lora = {} if targets == "qv" else {"target_modules": "all-linear"}
    full, adapter, model_class = make_pair(tmp_path, architecture, dtype, lora_alpha=alpha, **lora)
    merge_adapter(full, adapter, tmp_path / "out", verify=True)

    def narrow(state):  # some of T5 is float32 in the model, whatever it is in the file
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    result = narrow(model_class.from_pretrained(tmp_path / "out", dtype=dtype).state_dict())
    exact = narrow(merge_with_peft(full, adapter, model_class, torch.float32))
    assert_equal_states(result, exact, ulps=1)
    if targets == "qv" or architecture not in (
        "mixtral",
        "qwen3_moe",
    ):  # of experts, PEFT rounds the factors themselves
        assert_equal_states(result, narrow(merge_with_peft(full, adapter, model_class, dtype)), ulps=1)


VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "several modules_to_save": {"modules_to_save": ["embed_tokens", "norm", "v_proj"], "target_modules": ["q_proj"]},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["qwen2", "opt", "gpt2"])
def test_variants_equal_peft(tmp_path, architecture, variant):
    names = {"opt": {"norm": "final_layer_norm", "lm_head": "project_out"}}
    names["gpt2"] = {"q_proj": "c_attn", "v_proj": "c_proj", "embed_tokens": "wpe", "norm": "ln_f"}
    names["gpt2"] |= {"layers.1.self_attn.q_proj": "h.1.attn.c_attn"}
    lora = {}
    for key, value in VARIANTS[variant].items():
        rename = names.get(architecture, {})
        if isinstance(value, dict):
            value = {rename.get(k, k): v for k, v in value.items()}
        elif isinstance(value, list) and key != "layers_to_transform":
            value = [rename.get(name, name) for name in value]
        lora[key] = value
    if architecture != "qwen2" and any("lm_head" in str(v) or "project_out" in str(v) for v in lora.values()):
        pytest.skip("its head is tied, which is another test's")
    if architecture == "opt" and "embed_tokens" in str(lora.values()):
        pytest.skip("its embedding is the head, too")
    full, adapter, model_class = make_pair(tmp_path, architecture, **lora)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    expected = merge_with_peft(full, adapter, model_class)
    # DoRA's norms are sums over a row: PEFT adds in the order of the whole matrix.
    if variant == "dora":
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=3e-6, atol=1e-7)
    else:
        assert_equal_states(result, expected)
    assert report.through_peft is None


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_tied_weights_are_untied_when_only_one_is_changed(tmp_path, targets):
    full, adapter, model_class = make_pair(tmp_path, "gemma", target_modules=targets)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = model_class.from_pretrained(tmp_path / "out")
    assert not merged.config.tie_word_embeddings and report.added == ["lm_head.weight"]
    # Not PEFT's merge, which changes both; but what PEFT's model computes before it.
    expected = PeftModel.from_pretrained(model_class.from_pretrained(full), adapter)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_shared_weight_that_can_not_be_untied_is_an_error(tmp_path):
    full, adapter, _ = make_pair(tmp_path, "t5", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head.*shares"):
        merge_adapter(full, adapter, tmp_path / "out")


def test_a_head_that_the_full_model_lacks_is_added(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "bert")
    model = build_model("bert")
    model.bert.save_pretrained(tmp_path / "encoder")  # keys without a prefix, two labels, no head
    report = merge_adapter(tmp_path / "encoder", adapter, tmp_path / "out", verify=True)
    result, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(report.added) == {"classifier.weight", "classifier.bias"} and not info["missing_keys"]
    assert_equal_states(result.state_dict(), merge_with_peft(full, adapter, model_class))
    assert result.config.num_labels == 3


def test_a_head_of_another_size_is_replaced(tmp_path):
    _, adapter, model_class = make_pair(tmp_path, "bert")
    name, values, _, _ = ARCHITECTURES["bert"]
    config = transformers.BertConfig(**values | {"num_labels": 5})
    other = getattr(transformers, name)(config)
    other.save_pretrained(tmp_path / "five")
    report = merge_adapter(tmp_path / "five", adapter, tmp_path / "out", verify=True)
    result = model_class.from_pretrained(tmp_path / "out")
    tensors, _ = read_adapter(adapter)
    assert torch.equal(result.classifier.weight, tensors["base_model.model.classifier.weight"])
    assert result.config.num_labels == 3 and set(report.replaced) == {"classifier.weight", "classifier.bias"}


def test_what_is_more_than_a_product_goes_through_peft(tmp_path, monkeypatch):
    full, adapter, model_class = make_pair(tmp_path, "llama", trainable_token_indices=[1, 5])
    warned = []
    monkeypatch.setattr(merge.logger, "warning", warned.append)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert "trainable_token_indices" in report.through_peft and not report.verified
    assert any("PEFT, because" in line and "GB, is held in memory" in line for line in warned)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(result, merge_with_peft(full, adapter, model_class))
    with pytest.raises(ValueError, match="one adapter"):
        merge_adapter(full, [adapter, adapter], tmp_path / "mean")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "no room")


def make_others(directory: Path, full: Path, count: int) -> list[Path]:
    """More adapters for the model that [`make_pair`] made."""
    found = []
    for seed in range(count):
        model = transformers.LlamaForCausalLM.from_pretrained(full)
        torch.manual_seed(seed)
        peft_model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
        )
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        peft_model.save_pretrained(directory / f"other-{seed}")
        found.append(directory / f"other-{seed}")
    return found


def test_adapters_of_other_ranks_and_scales_are_averaged(tmp_path):
    full, first, model_class = make_pair(tmp_path)
    shutil.copytree(full, tmp_path / "b" / "full")
    _, second, _ = make_pair(tmp_path / "b", r=2, lora_alpha=7, use_rslora=True)
    merge_adapter(full, [first, second], tmp_path / "out", weights=[3, 1])
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    singles = [merge_with_peft(full, adapter, model_class) for adapter in (first, second)]
    for name, tensor in result.items():
        mean = 0.75 * singles[0][name].double() + 0.25 * singles[1][name].double()
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)
    _, other, _ = make_pair(tmp_path / "c", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="v_proj.*same targets"):
        merge_adapter(full, [first, other], tmp_path / "bad")


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_experts_by_parameter_equal_peft(tmp_path, architecture):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    full, adapter, model_class = make_pair(tmp_path, architecture, target_parameters=experts)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(result, merge_with_peft(full, adapter, model_class))
    assert len(report.layers) == 8


def test_tensors_fused_in_the_file_and_separate_in_the_model(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "dinov2", target_modules=["up_proj", "q_proj"])
    from safetensors import safe_open

    names = [name for file in full.glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert any("weights_in" in name for name in names)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert report.through_peft is None
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(result, merge_with_peft(full, adapter, model_class))


def test_convolutions_equal_peft(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "vit", target_modules=["projection", "q_proj"])
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert report.through_peft is None
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in merge_with_peft(full, adapter, model_class).items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


def test_several_adapters_are_averaged_as_products(tmp_path):
    full, _, model_class = make_pair(tmp_path)
    others, shares = make_others(tmp_path, full, 3), [0.5, 0.2, 0.3]
    merge_adapter(full, others, tmp_path / "out", weights=[5, 2, 3], verify=True)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    singles = [merge_with_peft(full, other, model_class) for other in others]
    for name, tensor in result.items():
        mean = sum(share * single[name].double() for share, single in zip(shares, singles, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="2 weights for 3"):
        merge_adapter(full, others, tmp_path / "bad", weights=[1, 2])
    with pytest.raises(ValueError, match="not negative"):
        merge_adapter(full, others, tmp_path / "bad", weights=[1, 2, -1])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_directory_of_updates_is_averaged_from_the_proxy(tmp_path, quantized):
    full, adapter, model_class = make_pair(tmp_path)
    start, _ = read_adapter(adapter)
    clients = make_others(tmp_path, full, 0) or [1, 3]
    rounds = tmp_path / "updates"
    rounds.mkdir()
    (rounds / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    proxy = {key: quantize(tensor, 4, 64) for key, tensor in start.items()} if quantized else start
    task = ClientTask("f", 0, 1, "a", 0, "print", proxy)
    (rounds / "task.safetensors").write_bytes(task.to_bytes())
    begin, thetas = task.proxy_tensors(), []
    for number, examples in enumerate(clients):
        generator = torch.Generator().manual_seed(number)
        delta = {key: torch.empty_like(tensor).normal_(generator=generator) for key, tensor in start.items()}
        thetas.append({key: begin[key] + delta[key] for key in delta})
        update = ClientUpdate("f", 0, f"client-{number}", "print", examples, delta)
        (rounds / f"client-{number}").mkdir()
        (rounds / f"client-{number}" / "update.safetensors").write_bytes(update.to_bytes())
    merge_adapter(full, rounds, tmp_path / "out", verify=True)
    result, before = (model_class.from_pretrained(tmp_path / d).state_dict() for d in ("out", "full"))
    prefix, name = "base_model.model.model.layers.0.self_attn.q_proj.", "model.layers.0.self_attn.q_proj.weight"
    products = [t[prefix + "lora_B.weight"].double() @ t[prefix + "lora_A.weight"].double() * 1.5 for t in thetas]
    expected = before[name].double() + 0.25 * products[0] + 0.75 * products[1]
    torch.testing.assert_close(result[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_an_untied_head_of_the_base_is_the_bases(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "gemma", target_modules=["lm_head", "q_proj"])
    export_base(full, tmp_path / "base", bits=4, embedding_bits=2, model_class=model_class)
    merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", target="base", verify=True)
    client = PeftModel.from_pretrained(load_base(tmp_path / "base", model_class), adapter)
    ids = torch.arange(20)[None]
    merged = model_class.from_pretrained(tmp_path / "seen")
    torch.testing.assert_close(merged(ids).logits, client(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("bits", "double_quant"), [(2, False), (4, True), (8, False)])
def test_merging_into_the_base_is_what_clients_see(tmp_path, architecture, bits, double_quant):
    full, adapter, model_class = make_pair(tmp_path, architecture)
    export_base(full, tmp_path / "base", bits=bits, double_quant=double_quant, model_class=model_class)
    report = merge_adapter(full, adapter, tmp_path / "out", base_dir=tmp_path / "base", verify=True)
    seen = merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", target="base", verify=True)
    ours, before = (model_class.from_pretrained(tmp_path / d).state_dict() for d in ("seen", "full"))
    assert [layer.ratio for layer in report.layers] == [layer.ratio for layer in seen.layers]
    updated = model_class.from_pretrained(tmp_path / "out").state_dict()
    for layer in report.layers:  # (W + ΔW) − (Q(W) + ΔW) = E
        error = (updated[layer.parameter] - ours[layer.parameter]).norm()
        torch.testing.assert_close(torch.tensor(layer.error_norm), error, rtol=1e-3, atol=1e-6)
        update = (updated[layer.parameter] - before[layer.parameter]).norm()
        torch.testing.assert_close(torch.tensor(layer.update_norm), update, rtol=1e-4, atol=1e-6)
        assert layer.ratio > 0
    if bits < 8:  # int8 computes otherwise on a CPU
        client = PeftModel.from_pretrained(load_base(tmp_path / "base", model_class), adapter)
        ids = torch.arange(20)[None]
        merged = model_class.from_pretrained(tmp_path / "seen")
        torch.testing.assert_close(merged(ids).logits, client(ids).logits, rtol=1e-3, atol=1e-3)


def read_files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_in_place_equals_a_new_copy_and_can_be_undone(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "out")
    shutil.copytree(full, tmp_path / "copy")
    before = read_files(full)
    for arguments in ({"output_dir": tmp_path / "copy"}, {}):
        directory = arguments.get("output_dir", full)
        report = merge_adapter(full, adapter, in_place=True, verify=True, **arguments)
        patched = {name: data for name, data in read_files(directory).items() if not name.startswith("_merge_undo")}
        assert patched == read_files(tmp_path / "out") and report.verified
        with pytest.raises(ValueError, match="already"):
            merge_adapter(full, adapter, in_place=True, **arguments)
        undo_merge_(directory)
        assert read_files(directory) == before
    with pytest.raises(ValueError, match="nothing to undo|no merge in place"):
        undo_merge_(full)


def test_in_place_takes_back_a_merge_that_fails_and_refuses_a_half_one(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    before = read_files(full)
    calls = []

    def fail(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError("no power")
        return run_jobs(*arguments, **keywords)

    from fedlpp_hf.merge import in_place

    run_jobs = in_place.run_jobs
    monkeypatch.setattr(in_place, "run_jobs", fail)
    with pytest.raises(OSError, match="no power"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) == before
    calls.clear()
    monkeypatch.setattr(in_place, "undo_merge_", lambda directory: None)  # as if the process had been killed
    with pytest.raises(OSError, match="no power"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) != before
    with pytest.raises(ValueError, match="interrupted"):
        merge_adapter(full, adapter, tmp_path / "out")
    undo_merge_(full)
    assert read_files(full) == before


def test_in_place_leaves_read_only_files_alone(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    before, access = read_files(full), os.access
    # root, as whom tests often run, may write to any file; what it is told stands in for what others are.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(ValueError, match="is read-only"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) == before


def test_in_place_never_writes_through_a_link(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    before = read_files(full)
    snapshot, hard = tmp_path / "snapshot", tmp_path / "hard"
    for directory, link in ((snapshot, os.symlink), (hard, os.link)):
        directory.mkdir()
        for path in full.iterdir():
            link(path, directory / path.name)
        with pytest.raises(ValueError, match="is a link"):
            merge_adapter(directory, adapter, in_place=True)
    merge_adapter(snapshot, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert read_files(full) == before


def test_verify_finds_a_flipped_bit_anywhere(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    write_shard, offset = merge.write_shard, 0

    def write_and_damage(source, destination, *arguments):
        write_shard(source, destination, *arguments)
        with open(destination, "r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(merge, "write_shard", write_and_damage)
    for offset in (20, 5000, -1, -7000):  # noqa: B007 (the function above reads it)
        with pytest.raises((RuntimeError, ValueError)):
            merge_adapter(full, adapter, tmp_path / "out", verify=True)
        assert not (tmp_path / "out").exists()
    merge_adapter(full, adapter, tmp_path / "unchecked")


def change_tensor(file: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})


WEIGHT = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _truncate(full, adapter):
    shard = sorted(full.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 3)


def _lose_shard(full, adapter):
    sorted(full.glob("*.safetensors"))[2].unlink()


def _lie_in_header(full, adapter):
    shard = sorted(full.glob("*.safetensors"))[2]
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])


def _escape(full, adapter):
    index = json.loads((full / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: "../" + file for name, file in index["weight_map"].items()}
    (full / "model.safetensors.index.json").write_text(json.dumps(index))


def _misplace(full, adapter):
    index = json.loads((full / "model.safetensors.index.json").read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (full / "model.safetensors.index.json").write_text(json.dumps(index))


def _rename_key(full, adapter):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHT)
    save_file({key.replace("layers.0", "blocks.0"): value for key, value in tensors.items()}, adapter / WEIGHT)


def _as_integers(full, adapter):
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = full / json.loads((full / "model.safetensors.index.json").read_text())["weight_map"][name]
    change_tensor(shard, name, lambda tensor: tensor.int())


def _as_nan(full, adapter):
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = full / json.loads((full / "model.safetensors.index.json").read_text())["weight_map"][name]
    change_tensor(shard, name, lambda tensor: tensor.index_fill(0, torch.tensor(3), float("nan")))


def _as_float4(full, adapter):
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = full / json.loads((full / "model.safetensors.index.json").read_text())["weight_map"][name]
    length = struct.unpack("<Q", shard.read_bytes()[:8])[0]
    header = json.loads(shard.read_bytes()[8 : 8 + length])
    header[name]["dtype"] = "F4"
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + shard.read_bytes()[8 + length :])


def _other_config(full, adapter):
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def _quantized(full, adapter):
    config = json.loads((full / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (full / "config.json").write_text(json.dumps(config))


BAD_INPUT = {
    "truncated shard": (_truncate, "truncated"),
    "missing shard": (_lose_shard, "which its index names"),
    "absurd header": (_lie_in_header, "truncated or no safetensors"),
    "index that leaves its directory": (_escape, "beside it"),
    "index that is wrong": (_misplace, "says it has"),
    "NaN in the adapter": (lambda f, a: change_tensor(a / WEIGHT, KEY, lambda t: t / 0), "q_proj.lora_A.*NaN"),
    "integers": (lambda f, a: change_tensor(a / WEIGHT, KEY, lambda t: t.int()), "int32"),
    "other rank": (lambda f, a: change_tensor(a / WEIGHT, KEY, lambda t: t[:2].contiguous()), "of another rank"),
    "missing factor": (lambda f, a: change_tensor(a / WEIGHT, KEY, lambda t: None), "has no `.*q_proj.lora_A.weight`"),
    "key without a home": (_rename_key, "nearest are .*layers"),
    "truncated adapter": (lambda f, a: os.truncate(a / WEIGHT, 500), "truncated"),
    "no adapter": (lambda f, a: (a / WEIGHT).unlink(), WEIGHT),
    "integer weights": (_as_integers, "is of I32"),
    "unknown dtype": (_as_float4, "is of F4"),
    "NaN in the full model": (_as_nan, "layers.0.self_attn.q_proj.weight` would have values that are NaN"),
    "configuration of other weights": (_other_config, "mlp.*has shape"),
    "quantized full model": (_quantized, "is quantized"),
    "damaged configuration": (lambda f, a: (f / "config.json").write_text("{"), "can't be read"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(tmp_path, case):
    full, adapter, _ = make_pair(tmp_path)
    damage, message = BAD_INPUT[case]
    damage(full, adapter)
    with pytest.raises(ValueError, match=message):
        merge_adapter(full, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    full, _, _ = make_pair(tmp_path / "a", "llama")
    _, adapter, _ = make_pair(tmp_path / "b", "gpt2")
    with pytest.raises(ValueError, match="c_attn"):
        merge_adapter(full, adapter, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_overflow_names_the_tensor(tmp_path, dtype, value):
    full, adapter, _ = make_pair(tmp_path, dtype=dtype)
    change_tensor(adapter / WEIGHT, KEY, lambda t: torch.full_like(t.float(), value))
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight` would have"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_destinations_that_can_not_be(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    for destination in (full / "out", full, tmp_path):
        with pytest.raises(ValueError, match="lie in each other|not an empty directory"):
            merge_adapter(full, adapter, destination)
    with pytest.raises(ValueError, match="output_dir"):
        merge_adapter(full, adapter)
    with pytest.raises(ValueError, match="base_dir"):
        merge_adapter(full, adapter, tmp_path / "out", target="base")
    with pytest.raises(ValueError, match="what clients see"):
        merge_adapter(full, adapter, in_place=True, target="base", base_dir=tmp_path / "base")
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device='{device}' can't be used"):
            merge_adapter(full, adapter, tmp_path / "out", device=device)
    with pytest.raises(ValueError, match="can't be fetched again"):
        merge_adapter(full, adapter, tmp_path / "out", delete_source_shards=True)
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file" / "out", Path("/proc/out")):  # the latter is read-only to root, too
        with pytest.raises(OSError):
            merge_adapter(full, adapter, destination)


def test_two_merges_to_one_place(tmp_path):
    import fcntl

    full, adapter, _ = make_pair(tmp_path)
    (tmp_path / ".out.merging").mkdir()
    (tmp_path / ".out.merging" / "left by a killed merge").write_text("")
    lock = os.open(tmp_path / ".out.merging", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="Another process"):
        merge_adapter(full, adapter, tmp_path / "out")
    os.close(lock)
    merge_adapter(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "left by a killed merge").exists()


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path):
    """Stood in for by a limit on the size of files, at which writes fail, too."""
    full, adapter, _ = make_pair(tmp_path)
    sizes = sorted(path.stat().st_size for path in full.glob("*.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            merge_adapter(full, adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_copies_without_the_kernels_help(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "kernel")

    def refuse(*arguments):
        raise OSError(18, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge_adapter(full, adapter, tmp_path / "buffered", verify=True)
    assert read_files(tmp_path / "kernel") == read_files(tmp_path / "buffered")


def test_file_systems_that_share_blocks(tmp_path, monkeypatch):
    from fedlpp_hf.merge import jobs, shards

    full, adapter, _ = make_pair(tmp_path)
    copied = merge_adapter(full, adapter, tmp_path / "copied")

    def clone(source, destination):
        os.copy_file_range(source, destination, os.fstat(source).st_size)
        return True

    for module in (jobs, shards):
        monkeypatch.setattr(module, "clone_file", clone)
    # Room is needed for what is rewritten alone.
    room = shutil._ntuple_diskusage(1 << 30, 0, copied.bytes_rewritten)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    merge_adapter(full, adapter, tmp_path / "cloned", verify=True)
    assert read_files(tmp_path / "copied") == read_files(tmp_path / "cloned")
    room = room._replace(free=room.free - 1)
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "no room")


def test_a_file_system_that_shares_blocks(tmp_path, monkeypatch):
    """The same for real; run it with `--basetemp` on btrfs or XFS."""
    from fedlpp_hf.merge import jobs, shards

    full, adapter, _ = make_pair(tmp_path)
    if not shards.shares_blocks(next(full.glob("*.safetensors")), tmp_path):
        pytest.skip("this file system has no reflinks")
    before, cloned, clone_file = read_files(full), [], jobs.clone_file
    monkeypatch.setattr(jobs, "clone_file", lambda *files: cloned.append(clone_file(*files)) or cloned[-1])
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert cloned == [True] * len(list(full.glob("*.safetensors"))) and read_files(full) == before
    shutil.rmtree(full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_untouched_files_and_ranges_are_the_same_bytes(tmp_path):
    full, adapter, _ = make_pair(tmp_path, layers_to_transform=[1])
    (full / "tokenizer.json").write_text("{}")
    (full / "_federation").mkdir()
    (full / "_federation" / "federation.json").write_text("{}")
    (full / "code.py").write_text("# custom code")
    (full / "adapter_model.safetensors").write_bytes((adapter / WEIGHT).read_bytes())
    report = merge_adapter(full, adapter, tmp_path / "out")
    ours, theirs = read_files(tmp_path / "out"), read_files(full)
    assert set(theirs) - set(ours) == {"_federation/federation.json", "adapter_model.safetensors"}
    changed = {name for name in ours if ours[name] != theirs[name]}
    index = json.loads(theirs["model.safetensors.index.json"])["weight_map"]
    assert changed == {index[layer.parameter] for layer in report.layers} and len(report.layers) == 2


def test_small_chunks_give_the_same_bits(tmp_path, monkeypatch):
    from fedlpp_hf.merge import editor, jobs

    full, adapter, _ = make_pair(tmp_path, "mixtral", target_modules="all-linear")
    merge_adapter(full, adapter, tmp_path / "whole", threads=1)
    monkeypatch.setattr(editor, "CHUNK_BYTES", 1)
    monkeypatch.setattr(jobs, "BLOCK_BYTES", 4096)
    merge_adapter(full, adapter, tmp_path / "rows", threads=3, verify=True)
    assert read_files(tmp_path / "whole") == read_files(tmp_path / "rows")


def test_single_file_models(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "bert", shard_size="1GB")
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert not list((tmp_path / "out").glob("*.index.json"))
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(result, merge_with_peft(full, adapter, model_class))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_containers_that_are_not_computed_in(tmp_path, dtype):
    full, adapter, _ = make_pair(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = full / json.loads((full / "model.safetensors.index.json").read_text())["weight_map"][name]
    change_tensor(shard, name, lambda tensor: tensor.to(dtype))
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    from safetensors.torch import load_file

    tensors, _ = read_adapter(adapter)
    delta = tensors[KEY.replace("_A", "_B")].double() @ tensors[KEY].double() * 1.5
    result, before = load_file(tmp_path / "out" / shard.name)[name], load_file(shard)[name]
    assert result.dtype == dtype
    exact = before.double() + delta
    torch.testing.assert_close(
        result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3 if dtype.itemsize == 1 else 0
    )


def test_a_killed_merge_leaves_nothing_or_everything(tmp_path):
    """One process merges again and again, so that a kill finds it anywhere; there is no time to start twenty."""
    full, adapter, _ = make_pair(tmp_path)
    out = tmp_path / "out"
    merge_adapter(full, adapter, tmp_path / "complete", verify=True)
    expected = read_files(tmp_path / "complete")
    script = (
        "import os, shutil, sys\nfrom fedlpp_hf.merge.streaming import merge_adapter\n"
        "for line in sys.stdin:\n"
        "    if os.fork():\n        print(os.wait()[1], flush=True)\n        continue\n"
        "    print('go', flush=True)\n    merge_adapter(*sys.argv[1:], sync=False)\n    os._exit(0)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, str(full), str(adapter), str(out)]
    kills = random.Random(0)
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True, env=environment) as process:
        outcomes, duration = set(), None
        for _ in range(21):
            process.stdin.write("again\n")
            process.stdin.flush()
            assert process.stdout.readline() == "go\n"
            began = time.perf_counter()
            if duration is not None:  # the first one is left alone, to know how long they take here and now
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                time.sleep(kills.random() * duration)
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(int(children[0]), signal.SIGKILL)
            process.stdout.readline()
            duration = duration or time.perf_counter() - began
            outcomes.add(out.exists())
            if out.exists():
                assert read_files(out) == expected
                shutil.rmtree(out)
        process.stdin.close()
    merge_adapter(full, adapter, out, verify=True)
    assert read_files(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter", "complete", "out"}
    assert False in outcomes
