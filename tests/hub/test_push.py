# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Pushes to a Hub on loopback: what is sent, copied, refused and resumed, and what the card says."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.hub.push import push_adapter, push_merged
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.server.store import SCHEMA_VERSION
from tests.fake_hub import Hub


SOURCE_CARD = "---\nlicense: mit\ntags:\n- stories\nlanguage: en\n---\n# The full model\n"


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A sharded full model with a card and a tokenizer's file, and an adapter for its last layer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    model.save_pretrained(tmp_path / "full", max_shard_size="15KB")
    (tmp_path / "full" / "README.md").write_text(SOURCE_CARD)
    (tmp_path / "full" / "special_tokens_map.json").write_text("{}")
    lora = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    return tmp_path / "full", tmp_path / "adapter"


def put_on_hub(hub: Hub, name: str, directory: Path, private: bool = True) -> None:
    hub.add_repo(name, {path.name: path.read_bytes() for path in directory.iterdir()}, private)


def sent_shards(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.requests if method == "PUT"]


def test_round_trip(hub, pair, tmp_path):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert hub.repos["owner/merged"].private
    local, remote = (LlamaForCausalLM.from_pretrained(place) for place in (tmp_path / "merged", "owner/merged"))
    ids = torch.arange(12)[None]
    assert torch.equal(local(ids).logits, remote(ids).logits)
    card = hub.files("owner/merged")["README.md"].data.decode()
    assert "license: mit" in card and "- stories" in card and "- federated-learning" in card
    assert "No privacy audit was run" in card and 'LlamaForCausalLM.from_pretrained("owner/merged")' in card
    assert str(tmp_path) not in card
    hub.requests.clear()
    push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert not sent_shards(hub) and not [path for _, path, _ in hub.requests if "/commit/" in path]


def test_the_full_model_is_streamed_from_the_hub_and_its_shards_deleted(hub, pair, tmp_path, monkeypatch):
    full, adapter = pair
    put_on_hub(hub, "owner/full", full)
    merge_adapter(full, adapter, tmp_path / "local")
    held, fetch = [], FullModel.fetch

    def fetch_and_count(model, file):
        path = fetch(model, file)
        held.append(len(list(model.scratch.glob("*.safetensors"))))
        return path

    with monkeypatch.context() as patch:
        patch.setattr(FullModel, "fetch", fetch_and_count)
        report = merge_adapter("owner/full", adapter, tmp_path / "merged", delete_source_shards=True, verify=True)
    assert report.verified and max(held) <= 2 and len(held) > 3
    names = {path.name for path in (tmp_path / "local").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    assert all((tmp_path / "merged" / n).read_bytes() == (tmp_path / "local" / n).read_bytes() for n in names)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    merge_adapter("owner/full", adapter, tmp_path / "kept")
    shards = len(list(full.glob("*.safetensors")))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == shards


@pytest.mark.parametrize("how", ["drop", 500])
@pytest.mark.parametrize("after", [0, 1, 2])  # its header takes two requests; the third is for all of it
def test_a_download_that_breaks_goes_on(hub, pair, tmp_path, monkeypatch, how, after):
    full, adapter = pair
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # what has arrived of a chunk is lost
    put_on_hub(hub, "owner/full", full)
    hub.fail("GET", "resolve/.*-00003-of", how, after=after)
    merge_adapter("owner/full", adapter, tmp_path / "merged", delete_source_shards=True, verify=True)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    if (how, after) == ("drop", 2):  # and it goes on where it was cut
        (shard,) = full.glob("*-00003-of-*")
        asked = [asked for path, asked in hub.ranges if path == shard.name]
        assert asked[-1] == f"bytes={shard.stat().st_size // 2 // 512 * 512}-"


def test_a_broken_download_leaves_nothing(hub, pair, tmp_path):
    full, adapter = pair
    put_on_hub(hub, "owner/full", full)
    hub.fail("GET", "resolve/.*-00003-of", 404, times=100)
    with pytest.raises((RuntimeError, ValueError), match="00003-of"):
        merge_adapter("owner/full", adapter, tmp_path / "merged", delete_source_shards=True)
    assert not (tmp_path / "merged").exists() and not (tmp_path / ".merged.merging").exists()
    with pytest.raises(ValueError, match="neither a directory nor a model"):
        merge_adapter("owner/absent", adapter, tmp_path / "merged")


def test_peft_merges_what_is_on_the_hub_but_not_shard_by_shard(hub, pair, tmp_path):
    full, _ = pair
    put_on_hub(hub, "owner/full", full)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(full), lora).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="trainable_token_indices.*Leave out .*delete_source_shards"):
        merge_adapter("owner/full", tmp_path / "tokens", tmp_path / "merged", delete_source_shards=True)
    assert merge_adapter("owner/full", tmp_path / "tokens", tmp_path / "merged").through_peft
    merge_adapter(full, tmp_path / "tokens", tmp_path / "local")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def test_only_changed_shards_are_sent(hub, pair, tmp_path):
    full, adapter = pair
    put_on_hub(hub, "owner/full", full)
    report = merge_adapter("owner/full", adapter, tmp_path / "merged")
    assert len(report.layers) == 1 and len(list(full.glob("*.safetensors"))) > 3
    push_merged(tmp_path / "merged", "owner/merged", source="owner/full")
    assert len(sent_shards(hub)) == 1
    assert any("lfs-files/duplicate" in path for _, path, _ in hub.requests)
    hub.requests.clear()
    push_merged(tmp_path / "merged", "owner/full", source="owner/full", revision="merged")
    assert len(sent_shards(hub)) == 1 and "merged" in hub.repos["owner/full"].branches
    for name in ("owner/merged", "owner/full"):
        branch = "main" if name == "owner/merged" else "merged"
        stored = hub.files(name, branch)
        for path in (tmp_path / "merged").glob("*.safetensors"):
            assert stored[path.name].data == path.read_bytes()
        card = stored["README.md"].data.decode()
        assert "base_model: owner/full" in card and "license: mit" in card and "- stories" in card


def test_a_hub_that_does_not_copy_is_sent_everything(hub, pair, tmp_path):
    full, adapter = pair
    put_on_hub(hub, "owner/full", full)
    merge_adapter("owner/full", adapter, tmp_path / "merged")
    hub.fail("POST", "lfs-files/duplicate", 400)
    push_merged(tmp_path / "merged", "owner/merged", source="owner/full")
    assert len(sent_shards(hub)) == len(list(full.glob("*.safetensors")))


def test_stale_weights_are_deleted_and_pull_requests_made(hub, pair, tmp_path):
    full, adapter = pair
    hub.add_repo("owner/merged", {"model.safetensors": b"old", "notes.txt": b"kept"})
    merge_adapter(full, adapter, tmp_path / "merged")
    info = push_merged(tmp_path / "merged", "owner/merged", source=full, create_pr=True)
    assert info.pr_url and set(hub.files("owner/merged")) == {"model.safetensors", "notes.txt"}
    (branch,) = set(hub.repos["owner/merged"].branches) - {"main"}
    assert "model.safetensors" not in hub.files("owner/merged", branch)
    assert "notes.txt" in hub.files("owner/merged", branch)


@pytest.mark.parametrize(
    ("method", "pattern", "how"), [("PUT", "^/lfs/", 500), ("PUT", "^/lfs/", "drop"), ("POST", "preupload", 503)]
)
def test_transient_failures_are_retried(hub, pair, tmp_path, method, pattern, how):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    hub.fail(method, pattern, how)
    push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert LlamaForCausalLM.from_pretrained("owner/merged")


def test_an_interrupted_push_resumes(hub, pair, tmp_path):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(RuntimeError, match="push again"):
        push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert sent_shards(hub)
    hub.requests.clear()
    push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert not sent_shards(hub) and "model.safetensors.index.json" in hub.files("owner/merged")


def test_refusals_say_what_to_do(hub, pair, tmp_path):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    with pytest.raises(RuntimeError, match=r"(?s)\(401\).*hf auth login"):
        push_merged(tmp_path / "merged", "owner/merged", token="stranger")
    with pytest.raises(RuntimeError, match=r"(?s)\(403\).*write access"):
        push_merged(tmp_path / "merged", "owner/merged", token="reader")
    with pytest.raises(RuntimeError, match=r"\(403\)"):
        push_merged(tmp_path / "merged", "other/merged")
    hub.add_repo("owner/merged", {})
    for status in (409, 412):
        hub.fail("POST", "/commit/", status)
        with pytest.raises(RuntimeError, match="changed it meanwhile"):
            push_merged(tmp_path / "merged", "owner/merged")


def test_a_card_that_the_hub_does_not_take(hub, pair, tmp_path):
    full, adapter = pair
    (full / "README.md").write_text(SOURCE_CARD.replace("mit", "all rights reserved"))
    merge_adapter(full, adapter, tmp_path / "merged")
    with pytest.raises(ValueError, match="does not accept the model card .*license"):
        push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert "owner/merged" not in hub.repos


def test_a_commit_in_between_is_a_conflict(hub, pair, tmp_path, monkeypatch):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    repo = hub.add_repo("owner/merged", {})
    from fedlpp_hf.hub import upload as module

    same = module._is_same

    def and_someone_commits(*arguments):
        repo.commit("main", {})
        return same(*arguments)

    monkeypatch.setattr(module, "_is_same", and_someone_commits)
    with pytest.raises(RuntimeError, match="(?s)412.*changed it meanwhile"):
        push_merged(tmp_path / "merged", "owner/merged")


def test_nothing_becomes_public_by_accident(hub, pair, tmp_path):
    full, adapter = pair
    put_on_hub(hub, "owner/full", full)
    put_on_hub(hub, "owner/open", full, private=False)
    merge_adapter(full, adapter, tmp_path / "merged")
    for source in (None, full, "owner/full"):
        with pytest.raises(ValueError, match="allow_public"):
            push_merged(tmp_path / "merged", "owner/merged", source=source, private=False)
    assert "owner/merged" not in hub.repos
    hub.add_repo("owner/shop", {}, private=False)
    with pytest.raises(ValueError, match="allow_public"):
        push_merged(tmp_path / "merged", "owner/shop", source=full)
    push_merged(tmp_path / "merged", "owner/shop", source=full, allow_public=True)
    push_merged(tmp_path / "merged", "owner/merged", source="owner/open", private=False)
    assert not hub.repos["owner/merged"].private


def _federation(directory):
    (directory / "_federation").mkdir()


def _quantize(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))


def _merge_into_base(directory):
    full, adapter, base = (directory.with_name(name) for name in ("full", "adapter", "base"))
    export_base(full, base)
    shutil.rmtree(directory)
    merge_adapter(full, adapter, directory, base_dir=base, base_weight=1.0)
    assert LlamaForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_federation, "_federation"),
        (_quantize, "client's view"),
        (_merge_into_base, "client's view"),
        (lambda d: (d / "base_manifest.json").write_text("{}"), "base_manifest"),
        (lambda d: (d / "training_args.bin").write_text(""), "training_args"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].unlink(), "index names"),
        (lambda d: shutil.rmtree(d), "not a directory"),
    ],
)
def test_what_is_no_merged_model_is_not_pushed(hub, pair, tmp_path, damage, message):
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "merged")
    damage(tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        push_merged(tmp_path / "merged", "owner/merged", source=full)
    assert not hub.requests


def test_the_adapter_is_pushed_alone(hub, pair, tmp_path):
    _, adapter = pair
    federation = adapter / "_federation"
    (federation / "rounds" / "round-00000").mkdir(parents=True)
    (federation / "rounds" / "round-00000" / "round.json").write_text('{"round": 0}')
    state = {
        "schema": SCHEMA_VERSION,
        "config": {"num_rounds": 3, "base_bits": 4, "adapter_bits": 2},
        "clients": {"a": 5, "b": 6},
    }
    (federation / "federation.json").write_text(json.dumps(state))
    (adapter / "training_args.bin").write_text("a token")
    (adapter / "report.md").write_text("# Federation report\n\n| model | loss |\n|---|---|\n| server | 1.5 |\n")
    (adapter / "report.html").write_text("<!DOCTYPE html>")
    (adapter / "audit.md").write_text("# Audit\n\nRecovered 3 % of the update.\n")
    push_adapter(adapter, "owner/adapter")
    files = hub.files("owner/adapter")
    assert set(files) - {".gitattributes"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].data.decode()
    for text in ("| rounds | 3 |", "| clients | 2 |", "| server | 1.5 |", "Recovered 3 %", "4 bits per weight"):
        assert text in card
    assert os.fspath(tmp_path) not in card
