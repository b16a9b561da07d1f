# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Full models on disk and on the Hub: what is opened, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
)

from fedlpp_hf.base.export import export_base


def test_pickles_are_not_opened(copied, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
        export_base(copied, tmp_path / "base")


def test_truncated_shard_is_refused(copied, tmp_path):
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="truncated"):
        export_base(copied, tmp_path / "base")


def test_missing_shard_and_tensor_are_refused(full_model, tmp_path):
    LlamaForCausalLM.from_pretrained(full_model("llama")).save_pretrained(tmp_path / "full", max_shard_size="60KB")
    index = tmp_path / "full" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    other = next(file for file in content["weight_map"].values() if file != shard)
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {name: other}}))
    with pytest.raises(ValueError, match="which the index says it has"):
        export_base(tmp_path / "full", tmp_path / "base")
    index.write_text(json.dumps(content))
    (tmp_path / "full" / shard).unlink()
    with pytest.raises(ValueError, match="which its index names"):
        export_base(tmp_path / "full", tmp_path / "base")


def test_checkpoint_that_does_not_fit_is_refused(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    lost = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.*missing"):
        export_base(copied, tmp_path / "base")
    save_file(tensors | {lost: torch.ones(3, 3)}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.*\(3, 3\)"):
        export_base(copied, tmp_path / "base")


def test_model_from_the_hub_leaves_no_name(full_model, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(snapshot)

    snapshot = shutil.copytree(full_model("llama"), tmp_path / "models--owner--secret" / "snapshot")
    config = json.loads((snapshot / "config.json").read_text())
    told = {"_name_or_path": "owner/secret", "teachers": ["owner/secret"], "tuned_from": "owner/secret at 0123abc"}
    (snapshot / "config.json").write_text(json.dumps(config | told))
    monkeypatch.setattr("fedlpp_hf.base.checkpoint.snapshot_download", download)
    export_base("owner/secret", tmp_path / "base", revision="0123abc", token="hf_token")
    assert asked["repo_id"] == "owner/secret"
    assert (asked["revision"], asked["token"]) == ("0123abc", "hf_token")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    for path in (tmp_path / "base").iterdir():
        assert not any(word in path.read_bytes() for word in (b"secret", b"0123abc", b"hf_token")), path


@pytest.mark.parametrize("name", ["./nowhere", "some/where/else", "/no/where"])
def test_directories_that_do_not_exist_are_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        export_base(name, tmp_path / "base")
