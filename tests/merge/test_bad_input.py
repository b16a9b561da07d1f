# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Damaged or foreign input is refused by its name, before anything is written."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file

from fedlpp_hf.merge import merge
from fedlpp_hf.merge.merge import check_merge, merge_adapter
from fedlpp_hf.tensors.adapters import ADAPTER_WEIGHTS
from tests.helpers import LORA_KEY, change_tensor, change_tensors, make_pair, read_files


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

    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file(
        {key.replace("layers.0", "blocks.0"): value for key, value in tensors.items()}, adapter / ADAPTER_WEIGHTS
    )


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
    "absurd header": (_lie_in_header, "truncated or not a safetensors"),
    "index that leaves its directory": (_escape, "beside it"),
    "index that is wrong": (_misplace, "index.json` says it does"),
    "NaN in the adapter": (
        lambda f, a: change_tensor(a / ADAPTER_WEIGHTS, LORA_KEY, lambda t: t / 0),
        "q_proj.lora_A.*NaN",
    ),
    "integers": (lambda f, a: change_tensor(a / ADAPTER_WEIGHTS, LORA_KEY, lambda t: t.int()), "int32"),
    "other rank": (
        lambda f, a: change_tensor(a / ADAPTER_WEIGHTS, LORA_KEY, lambda t: t[:2].contiguous()),
        "of another rank",
    ),
    "missing factor": (
        lambda f, a: change_tensor(a / ADAPTER_WEIGHTS, LORA_KEY, lambda t: None),
        "has no `.*q_proj.lora_A.weight`",
    ),
    "key without a home": (_rename_key, "nearest are .*layers"),
    "truncated adapter": (lambda f, a: os.truncate(a / ADAPTER_WEIGHTS, 500), "truncated"),
    "no adapter": (lambda f, a: (a / ADAPTER_WEIGHTS).unlink(), ADAPTER_WEIGHTS),
    "integer weights": (_as_integers, "has the dtype I32"),
    "unknown dtype": (_as_float4, "has the dtype F4"),
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


@pytest.mark.parametrize("change", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}])
def test_an_adapter_that_was_never_trained_says_so(tmp_path, monkeypatch, change):
    warned = []
    monkeypatch.setattr(merge.logger, "warning", warned.append)
    full, adapter, _ = make_pair(tmp_path, **change)
    merge_adapter(full, adapter, tmp_path / "trained")
    assert not warned
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change_tensors(adapter / ADAPTER_WEIGHTS, {key: value * 0 for key, value in tensors.items() if "lora_B" in key})
    merge_adapter(full, adapter, tmp_path / "out")
    assert "Every B of the adapter" in warned[0] and "zero" in warned[0]


def test_stray_files_below_the_adapter_do_not_matter(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "before")
    names = ["config.json", "model.safetensors", "adapter_model.bin", "README.md", "old/adapter_config.json"]
    for name in [
        *names,
        "old/adapter_model.safetensors",
        "checkpoint-3/model.safetensors",
        "_federation/federation.json",
    ]:
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("{")
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "before")


def test_a_merge_can_be_checked_before_the_training(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    check_merge(full, adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}
    _misplace(full, adapter)
    with pytest.raises(ValueError, match="index.json` says it does"):
        check_merge(full, adapter)
    full, adapter, _ = make_pair(tmp_path / "bias", lora_bias=True)  # Llama's layers have none to add it to
    with pytest.raises(ValueError, match=r"lora_B\.bias.*has no bias to add it to"):
        check_merge(full, adapter)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    full, _, _ = make_pair(tmp_path / "a", "llama")
    _, adapter, _ = make_pair(tmp_path / "b", "gpt2")
    with pytest.raises(ValueError, match="c_attn"):
        merge_adapter(full, adapter, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_overflow_names_the_tensor(tmp_path, dtype, value):
    full, adapter, _ = make_pair(tmp_path, dtype=dtype)
    change_tensor(adapter / ADAPTER_WEIGHTS, LORA_KEY, lambda t: torch.full_like(t.float(), value))
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight` would have"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
