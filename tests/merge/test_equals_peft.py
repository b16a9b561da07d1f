# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A merge writes what PEFT's `merge_and_unload` and `save_pretrained` would."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import (
    ARCHITECTURES,
    LORA_KEY,
    assert_equal_states,
    change_tensor,
    make_pair,
    merge_with_peft,
)


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


@pytest.mark.slow
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
    delta = tensors[LORA_KEY.replace("_A", "_B")].double() @ tensors[LORA_KEY].double() * 1.5
    result, before = load_file(tmp_path / "out" / shard.name)[name], load_file(shard)[name]
    assert result.dtype == dtype
    exact = before.double() + delta
    torch.testing.assert_close(
        result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3 if dtype.itemsize == 1 else 0
    )
