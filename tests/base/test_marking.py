# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Marked copies of a base: what they change, what they cost, and how a suspect is traced back to one."""

import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from fedlpp_hf import export_base, load_base, merge_adapter
from fedlpp_hf.base.manifest import check_base, read_manifest
from fedlpp_hf.base.mark_keys import MarkKey, prepare_mark
from fedlpp_hf.base.marking import trace_base
from tests.helpers import make_llama_adapter


SETTINGS = {"bits": 4, "block_size": 64, "skip_modules": None, "model_class": None}


@pytest.fixture(scope="module")
def copies(wide_llama, tmp_path_factory):
    """The key file and the copies of three clients."""
    folder = tmp_path_factory.mktemp("copies")
    for client in ("a", "b", "c"):
        mark = prepare_mark(folder / "key.json", client, wide_llama, SETTINGS)
        export_base(wide_llama, folder / client, mark=mark)
    return folder


def accuse(suspect, copies, **options):
    return [
        t.client for t in trace_base(suspect, MarkKey.read(copies / "key.json"), **options) if t.false_alarm < 1e-6
    ]


def test_copies_differ_in_a_per_cent_of_their_codes_and_each_is_traced(wide_llama, copies):
    codes = [load_file(copies / client / "model.safetensors") for client in ("a", "b")]
    name = "model.layers.0.mlp.up_proj.weight"
    nibbles = [torch.stack([c[name] >> 4, c[name] & 15]) for c in codes]
    assert 0.001 < (nibbles[0] != nibbles[1]).float().mean() < 0.01
    steps = (nibbles[0].int() - nibbles[1].int()).abs()
    assert steps.max() == 1  # neighbouring levels, either of which is as near
    for key in codes[0]:
        if not key.endswith("proj.weight"):
            assert torch.equal(codes[0][key], codes[1][key]), key
    manifests = [check_base(copies / client) for client in ("a", "b", "c")]
    assert len({manifest["fingerprint"] for manifest in manifests}) == 1  # one federation's tasks fit all of them
    assert len({manifest["copy"] for manifest in manifests}) == 3
    for client in ("a", "b", "c"):
        assert accuse(copies / client, copies) == [client]
    assert accuse(wide_llama, copies) == []


def test_unmarked_base_and_another_owners_key_accuse_nobody(wide_llama, copies, tmp_path):
    export_base(wide_llama, tmp_path / "plain")
    assert read_manifest(tmp_path / "plain")["fingerprint"] == read_manifest(copies / "a")["fingerprint"]
    assert accuse(tmp_path / "plain", copies) == []
    for client in ("a", "b", "c"):
        prepare_mark(tmp_path / "key.json", client, wide_llama, SETTINGS)
    assert accuse(copies / "a", tmp_path) == []


def test_marks_cost_nothing(wide_llama, copies, tmp_path):
    """A marked weight was halfway between two levels, so that its error is the same either way, to a thousandth."""
    export_base(wide_llama, tmp_path / "plain")
    full = LlamaForCausalLM.from_pretrained(wide_llama).state_dict()
    errors = []
    for directory in (tmp_path / "plain", copies / "a"):
        load_base(directory)
        from fedlpp_hf.base.reader import BaseReader

        reader = BaseReader(directory, {name: tuple(tensor.shape) for name, tensor in full.items()}, set())
        names = [name for name in reader.entries if reader.is_quantized(name)]
        errors.append(sum(float((reader.read(name) - full[name]).square().sum()) for name in names))
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_copy_with_an_adapter_merged_in_is_traced(wide_llama, copies, tmp_path):
    adapter = make_llama_adapter(wide_llama, tmp_path / "adapter", seed=1)
    merge_adapter(wide_llama, adapter, tmp_path / "view", base_dir=copies / "b", base_weight=1.0)
    assert accuse(tmp_path / "view", copies) == ["b"]
    halved = {name: t.to(torch.bfloat16) for name, t in load_file(tmp_path / "view" / "model.safetensors").items()}
    save_file(halved, tmp_path / "view" / "model.safetensors", metadata={"format": "pt"})
    assert accuse(tmp_path / "view", copies) == ["b"]
    merge_adapter(wide_llama, adapter, tmp_path / "merged")  # what the owner publishes is nobody's copy
    assert accuse(tmp_path / "merged", copies) == []


def test_transposed_weights_are_traced(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=128, n_layer=2, n_head=4, n_positions=32)).save_pretrained(
        tmp_path / "full"
    )
    for client in ("a", "b"):
        export_base(
            tmp_path / "full",
            tmp_path / client,
            mark=prepare_mark(tmp_path / "key.json", client, tmp_path / "full", SETTINGS),
        )
    assert accuse(tmp_path / "b", tmp_path) == ["b"]
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "full")
    from fedlpp_hf.base.reader import BaseReader

    state = merged.state_dict()
    transposed = {f"{name}.weight" for name, module in merged.named_modules() if type(module).__name__ == "Conv1D"}
    reader = BaseReader(tmp_path / "b", {name: tuple(tensor.shape) for name, tensor in state.items()}, transposed)
    merged.load_state_dict(state | {name: reader.read(name) for name in reader.entries})
    merged.save_pretrained(tmp_path / "suspect")
    assert accuse(tmp_path / "suspect", tmp_path) == ["b"]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_coarser_bases_are_marked_too(wide_llama, tmp_path, bits):
    settings = SETTINGS | {"bits": bits}
    for client in ("a", "b"):
        mark = prepare_mark(tmp_path / "key.json", client, wide_llama, settings)
        export_base(wide_llama, tmp_path / client, bits=bits, mark=mark)
    assert accuse(tmp_path / "a", tmp_path) == ["a"]
    assert read_manifest(tmp_path / "a")["bits"] == bits


def test_key_is_for_its_user_alone_and_for_one_model(wide_llama, full_llama, tmp_path):
    prepare_mark(tmp_path / "key.json", "a", wide_llama, SETTINGS)
    assert stat.S_IMODE((tmp_path / "key.json").stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="is for copies of .*wide-llama.*given were .*full-llama"):
        prepare_mark(tmp_path / "key.json", "b", full_llama, SETTINGS)
    with pytest.raises(ValueError, match="use the same settings"):
        prepare_mark(tmp_path / "key.json", "b", wide_llama, SETTINGS | {"bits": 3})
    (tmp_path / "key.json").chmod(0o644)
    with pytest.raises(ValueError, match="Other users can read"):
        MarkKey.read(tmp_path / "key.json")


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"secret": "ab", "full_model": "", "settings": {}})])
def test_damaged_key_is_refused(tmp_path, text):
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(ValueError, match="can't be read"):
        MarkKey.read(tmp_path / "key.json")


def test_suspect_of_another_architecture_is_refused(full_bert, copies):
    with pytest.raises(ValueError, match="none of the full model's marked weights"):
        accuse(full_bert, copies)


def test_full_model_that_has_moved_can_be_named(wide_llama, copies, tmp_path):
    moved = tmp_path / "moved"
    AutoModelForCausalLM.from_pretrained(wide_llama).save_pretrained(moved)
    assert accuse(copies / "c", copies, full_model=moved) == ["c"]
