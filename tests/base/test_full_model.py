# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Full models on disk and on the Hub: what is opened, and what is refused."""

import json
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fedlpp_hf.base import full_model as full_model_module
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.merge.merge import check_merge, merge_adapter
from tests.helpers import read_files, save_adapter


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
    with pytest.raises(ValueError, match="but `model.safetensors.index.json` says it does"):
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


@pytest.fixture
def sharded(full_model, tmp_path):
    """A full model in several shards."""
    model = LlamaForCausalLM.from_pretrained(full_model("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def change_index(directory, change):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_index_that_leaves_its_directory_is_refused(sharded, tmp_path):
    change_index(sharded, lambda files: files.update({name: f"../sharded/{file}" for name, file in files.items()}))
    with pytest.raises(ValueError, match="expected safetensors files beside it"):
        export_base(sharded, tmp_path / "base")


def test_tensor_that_the_index_does_not_have_is_refused(sharded, tmp_path):
    change_index(sharded, lambda files: files.pop("model.norm.weight"))
    lora = LoraConfig(target_modules=["q_proj"])
    save_adapter(LlamaForCausalLM.from_pretrained(sharded), lora, tmp_path / "adapter")
    for act in (
        lambda: export_base(sharded, tmp_path / "base"),
        lambda: merge_adapter(sharded, tmp_path / "adapter", tmp_path / "out"),
        lambda: check_merge(sharded, tmp_path / "adapter"),
    ):
        with pytest.raises(
            ValueError, match=r"has `model\.norm\.weight`, which .* does not place there.*`save_pretrained`"
        ):
            act()


def test_single_file_comes_before_an_index(sharded, full_model):
    """As in `from_pretrained`."""
    shutil.copyfile(full_model("llama") / "model.safetensors", sharded / "model.safetensors")
    assert list(FullModel(sharded).shards) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_read_as_they_are_stored(full_model, tmp_path, dtype):
    LlamaForCausalLM.from_pretrained(full_model("llama"), dtype=dtype).save_pretrained(tmp_path, max_shard_size="60KB")
    model, stored = FullModel(tmp_path), {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    assert model.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()} and model.dtype == dtype
    for name, tensor in stored.items():
        assert model.read(name).dtype == dtype and torch.equal(model.read(name), tensor)


def test_shards_come_from_the_hub_when_they_are_wanted(hub, sharded, tmp_path):
    hub.add_repo("owner/full", read_files(sharded))
    remote, local, cache = FullModel("owner/full"), FullModel(sharded), tmp_path / "cache"
    assert remote.shapes == local.shapes and remote.dtype == local.dtype and remote.size == local.size
    assert not list(cache.rglob("*.safetensors")) and len(remote.shards) == 3
    assert torch.equal(remote.read("model.norm.weight"), local.read("model.norm.weight"))
    assert len(list(cache.rglob("*.safetensors"))) == 1


def test_model_from_the_hub_leaves_no_name(hub, full_model, tmp_path, monkeypatch):
    files = read_files(full_model("llama"))
    told = {"_name_or_path": "owner/secret", "teachers": ["owner/secret"], "tuned_from": "owner/secret at 0123abc"}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | told).encode()
    pickles = ["pytorch_model.bin", "optimizer.pt", "vocabulary.pkl", "original/consolidated.00.pth"]
    repo = hub.add_repo("owner/secret", files | dict.fromkeys(pickles, b"a pickle"))
    repo.branches = {"0123abc": repo.branches["main"]}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="neither a directory nor a model on the Hub"):
        export_base("owner/secret", tmp_path / "base", revision="0123abc", token="stranger")
    export_base("owner/secret", tmp_path / "base", revision="0123abc", token="reader")
    assert not any(name in path for _, path, _ in hub.requests for name in pickles)
    for path in (tmp_path / "base").iterdir():
        assert not any(word in path.read_bytes() for word in (b"secret", b"0123abc", b"reader")), path
    assert (tmp_path / "base" / "tokenizer_config.json").is_file()


def test_without_the_hub_its_cache_is_read(hub, sharded, base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nor in the Hub's cache, and HF_HUB_OFFLINE is set"):
        export_base("owner/full", tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.add_repo("owner/full", read_files(sharded))
    export_base("owner/full", tmp_path / "online")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    export_base("owner/full", tmp_path / "offline")
    assert read_files(tmp_path / "offline") == read_files(tmp_path / "online") and not hub.requests


def unreachable(monkeypatch):
    """Point huggingface_hub to a port where nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_ENDPOINT", url)


@pytest.mark.parametrize("how", ["unreachable", "offline"])
def test_everything_in_the_cache_is_enough(hub, sharded, tmp_path, monkeypatch, how):
    """For an export and for a merge, with the adapter on the Hub, too; pickles are not missed."""
    save_adapter(
        LlamaForCausalLM.from_pretrained(sharded), LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter"
    )
    files = read_files(sharded) | {"tokenizer.json": b"{}", "README.md": b"words"}
    hub.add_repo("owner/full", files | {"pytorch_model.bin": b"a pickle", "original/params.pth": b"another"})
    hub.add_repo("owner/adapter", read_files(tmp_path / "adapter") | {"optimizer.pt": b"a pickle"})
    merge_adapter("owner/full", "owner/adapter", tmp_path / "online")
    export_base("owner/full", tmp_path / "base")
    hub.requests.clear()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        unreachable(monkeypatch)
    merge_adapter("owner/full", "owner/adapter", tmp_path / "cached", verify=True)
    export_base("owner/full", tmp_path / "cached base")
    assert read_files(tmp_path / "cached") == read_files(tmp_path / "online")
    assert read_files(tmp_path / "cached base") == read_files(tmp_path / "base") and not hub.requests
    with pytest.raises(ValueError, match="`owner/absent` is neither a directory nor in the Hub's cache"):
        merge_adapter("owner/full", "owner/absent", tmp_path / "out")
    with pytest.raises(ValueError, match="`owner/absent` is neither a directory nor in the Hub's cache"):
        merge_adapter("owner/absent", "owner/adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="delete_source_shards.*is on disk"):
        merge_adapter("owner/full", "owner/adapter", tmp_path / "out", delete_source_shards=True)
    for shard in list((tmp_path / "cache").rglob("*00002-of*")):
        shard.unlink()
    with pytest.raises(ValueError, match=r"owner/full in the Hub's cache .* has no `.*00002-of"):
        merge_adapter("owner/full", "owner/adapter", tmp_path / "out")


def test_what_from_pretrained_left_in_the_cache_is_merged_with_a_warning(hub, sharded, tmp_path, monkeypatch):
    save_adapter(
        LlamaForCausalLM.from_pretrained(sharded), LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter"
    )
    hub.add_repo("owner/full", read_files(sharded) | {"tokenizer.json": b"{}"})
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # of an earlier Hub
    FullModel("owner/full")  # the list of files is in the cache now, as after other downloads
    LlamaForCausalLM.from_pretrained("owner/full")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    warned = []
    monkeypatch.setattr(full_model_module.logger, "warning", warned.append)
    merge_adapter("owner/full", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert "tokenizer.json" in warned[0] and not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_adapter_or_revision_that_the_hub_does_not_have_is_refused(hub, sharded, tmp_path):
    hub.add_repo("owner/full", read_files(sharded))
    with pytest.raises(ValueError, match="`owner/absent` is neither a directory nor the name of an adapter"):
        merge_adapter("owner/full", "owner/absent", tmp_path / "out")
    with pytest.raises(ValueError, match="`owner/full` is neither a directory nor a model on the Hub.*"):
        export_base("owner/full", tmp_path / "base", revision="absent")


@pytest.mark.parametrize("name", ["./nowhere", "some/where/else", "/no/where"])
def test_directories_that_do_not_exist_are_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(ValueError, match="neither a directory nor a name on the Hub"):
        export_base(name, tmp_path / "base")
