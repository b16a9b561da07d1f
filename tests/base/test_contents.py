# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Checkpoints and bases that others made: links, code, pickles and sizes in them are refused before anything is followed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.contents import check_link
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import BASE_MANIFEST, read_manifest, write_manifest
from fedlpp_hf.base.packing import pack_base, unpack_base

from ..helpers import SMALL_MODELS


SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def cloned(tmp_path):
    """A model that was cloned from somewhere, in the home of a user with a private key."""
    kind, config = SMALL_MODELS["llama"]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "cloned")
    (tmp_path / "id_rsa").write_text(SECRET)
    return tmp_path / "cloned"


@pytest.mark.parametrize("name", ["merges.txt", "generation_config.json", "config.json"])
def test_a_link_out_of_a_checkpoint_is_refused(cloned, tmp_path, name):
    (cloned / name).unlink(missing_ok=True)
    (cloned / name).symlink_to("../id_rsa")
    with pytest.raises(ValueError, match=f"{name}` is a link out of its directory.*put the file itself there"):
        export_base(cloned, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_link_to_other_weights_is_refused(cloned, tmp_path):
    (cloned / "model.safetensors").rename(tmp_path / "private.safetensors")
    (cloned / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(ValueError, match="is a link out of its directory"):
        FullModel(cloned)


def test_companions_of_a_merge_are_not_followed_out(cloned, tmp_path):
    (cloned / "notes").mkdir()
    (cloned / "notes" / "deep.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match="deep.txt` is a link out of its directory"):
        FullModel(cloned).copy_companions(tmp_path / "merged")


def test_links_inside_and_into_the_cache_of_the_hub_are_followed(tmp_path):
    inside, cache = tmp_path / "model", tmp_path / "models--x" / "snapshots" / "abc"
    for directory in (inside, cache, tmp_path / "models--x" / "blobs"):
        directory.mkdir(parents=True)
    (inside / "a").write_text("a")
    (inside / "b").symlink_to("a")
    (cache / "c").symlink_to("../../blobs/c")
    (tmp_path / "model-2").symlink_to(inside)  # the directory itself may be one
    for directory, path in ((inside, inside / "b"), (cache, cache / "c"), (tmp_path / "model-2", inside / "a")):
        assert check_link(directory, path) == path
    (cache / "d").symlink_to("../../../id_rsa")
    with pytest.raises(ValueError, match="is a link out"):
        check_link(cache, cache / "d")


# --- Bases whose manifest fits what was put into them.
def change_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put_pickle(base, manifest):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def put_pickle_beside(base, manifest):
    torch.save({}, base / "pytorch_model.bin")


def put_adapter(base, manifest):
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}')


def put_code(base, manifest):
    (base / "evil.py").write_text("raise SystemExit")


def put_folder(base, manifest):
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text("raise SystemExit")


def ask_for_code(base, manifest):
    change_config(base, auto_map={"AutoConfig": "evil/repo--evil.C"}, model_type="evil")


def ask_for_code_in_the_tokenizer(base, manifest):
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')


def ask_for_a_kernel(base, manifest):
    change_config(base, attn_implementation="evil/kernel")


def generate_by_code(base, manifest):
    (base / "generation_config.json").write_text('{"custom_generate": "evil/repo"}')


def generate_compiled(base, manifest):
    (base / "generation_config.json").write_text('{"compile_config": {"backend": "x"}}')


def claim_layers(base, manifest):
    change_config(base, num_hidden_layers=10**7)


def claim_no_size(base, manifest):
    change_config(base, hidden_size=-5)


def claim_words(base, manifest):
    change_config(base, vocab_size=10**9)


def leave_quantization_out(base, manifest):
    change_config(base, quantization_config=None)


def name_another_quantizer(base, manifest):
    change_config(base, quantization_config={"quant_method": "torchao", "quant_type": "int8"})


def link_weights(base, manifest):
    (base / "model.safetensors").rename(base.parent / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to("../elsewhere.safetensors")


def lead_index_out(base, manifest):
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    names = load_file(base.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def nest_without_end(base, manifest):
    (base / "config.json").write_text("[" * 100_000)


def call_no_class(base, manifest):
    manifest["architecture"] = "pipeline"


def write_numbers_for_tensors(base, manifest):
    manifest["tensors"] = 5


def list_nothing(base, manifest):
    manifest["full_precision_linears"] = None


def name_an_outside_file(base, manifest):
    manifest["evil"] = True  # what is unknown is part of the fingerprint, too
    save_file({"x": torch.zeros(1)}, base / "weights.safetensors")


def claim_labels(base, manifest):
    change_config(base, num_labels=10**9)


def quantize_all_but(value):
    def change(base, manifest):
        quantization = json.loads((base / "config.json").read_text())["quantization_config"]
        change_config(base, quantization_config=quantization | {"llm_int8_skip_modules": value})

    return change


skip_without_end = quantize_all_but(["(a|a|b)*(.|.)*(.|.)*c$"])
skip_without_end.__name__ = "skip_without_end"
skip_a_number = quantize_all_but(5)
skip_a_number.__name__ = "skip_a_number"


def list_for_a_quantization(base, manifest):
    change_config(base, quantization_config=[1])


def name_no_activation(base, manifest):
    change_config(base, hidden_act="none of transformers'")


def pad_with_no_token(base, manifest):
    change_config(base, pad_token_id=10**12)


def scale_by_nothing(base, manifest):
    change_config(base, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 0.0})


def turn_everything(base, manifest):
    rope = {"rope_type": "linear", "factor": 1.0, "rope_theta": 10000.0, "partial_rotary_factor": 1e9}
    change_config(base, rope_parameters=rope)


def fill_configuration(base, manifest):
    with (base / "config.json").open("r+b") as file:
        file.truncate(49 << 20)  # as a hole: it takes no room


CHANGES = {
    put_pickle: "pytorch_model.bin`, which is no file of a base",
    put_pickle_beside: "pytorch_model.bin`, which is no file of a base",
    put_adapter: "adapter_config.json`, which is no file of a base",
    put_code: "evil.py`, which is no file of a base",
    put_folder: "custom_generate/generate.py`, which is no file of a base",
    ask_for_code: "`auto_map`: it asks for code of others",
    ask_for_code_in_the_tokenizer: "tokenizer_config.json` has `auto_map`",
    ask_for_a_kernel: "attn_implementation='evil/kernel': it asks for a kernel from elsewhere",
    generate_by_code: "`custom_generate`: it asks for code",
    generate_compiled: "compile_config=.* expected numbers and names",
    claim_layers: "num_hidden_layers=10000000, and the base has",
    claim_no_size: "The configuration in .* can't be used",
    claim_words: "has the shape \\[1000000000, 40\\], by its manifest \\[101, 40\\]",
    leave_quantization_out: "quant_method=None; a base is quantized with bitsandbytes",
    name_another_quantizer: "quant_method='torchao'",
    link_weights: "is a link out of its directory",
    lead_index_out: "expected safetensors files beside it",
    nest_without_end: "can't be read \\(RecursionError",
    call_no_class: "'pipeline', which is no model of transformers",
    write_numbers_for_tensors: "`tensors` of the manifest is 5",
    list_nothing: "`full_precision_linears` of the manifest is None",
    claim_labels: "num_labels=1000000000; expected at most",
    skip_without_end: "llm_int8_skip_modules=.* a regular expression; expected names",
    skip_a_number: "can't be loaded",
    list_for_a_quantization: "quant_method=None",
    name_no_activation: "can't be loaded \\(KeyError",
    pad_with_no_token: "can't be loaded \\(AssertionError",
    scale_by_nothing: "can't be (used|loaded) \\(.*ZeroDivisionError",
    turn_everything: "has buffers of [0-9]+ values; expected at most",
    fill_configuration: "gives `config.json` 51380224 bytes; expected at most",
    name_an_outside_file: "weights.safetensors`, which is no file of a base",
}


@pytest.mark.parametrize("change", list(CHANGES), ids=lambda change: change.__name__)
def test_a_hostile_base_is_refused(base, tmp_path, change):
    directory = shutil.copytree(base("llama"), tmp_path / "base")
    manifest = read_manifest(directory)
    change(directory, manifest)
    write_manifest(directory, manifest, {})
    with pytest.raises(ValueError, match=CHANGES[change]):
        load_base(directory)


def test_every_field_of_the_manifest_is_in_the_fingerprint(base, tmp_path):
    directory = shutil.copytree(base("llama"), tmp_path / "base")
    whole = (directory / BASE_MANIFEST).read_text()
    for field in json.loads(whole).keys() - {"fingerprint", "copy", "files", "tensors", "format_version"}:
        manifest = json.loads(whole)
        value = manifest[field]
        manifest[field] = (
            [*value, "x"] if isinstance(value, list) else not value if isinstance(value, bool) else type(value)()
        )
        (directory / BASE_MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="does not match its own fingerprint|of the manifest"):
            read_manifest(directory)
    for field in json.loads(whole)["tensors"][0]:
        manifest = json.loads(whole)
        value = manifest["tensors"][0][field]
        manifest["tensors"][0][field] = (
            value + "x" if isinstance(value, str) else [1] if isinstance(value, list) else value + 1
        )
        (directory / BASE_MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="does not match its own fingerprint"):
            read_manifest(directory)


def test_a_packed_base_names_no_file_outside(base, tmp_path):
    pack_base(base("llama"), tmp_path / "packed")
    data = (tmp_path / "packed").read_bytes()
    assert data.count(b"generation_config.json") > 1
    (tmp_path / "packed").write_bytes(data.replace(b"generation_config.json", b"../../../fedlpp-escape"))
    with pytest.raises(ValueError, match="no file of a base|damaged"):
        unpack_base(tmp_path / "packed", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_files_that_would_take_all_memory_are_not_read(base, tmp_path):
    directory = shutil.copytree(base("llama"), tmp_path / "base")
    with (directory / BASE_MANIFEST).open("r+b") as file:
        file.truncate(40 << 30)  # as a hole, which an archive stores in a few bytes
    with pytest.raises(ValueError, match="has 42949672960 bytes; expected at most"):
        read_manifest(directory)


def test_an_index_that_would_take_all_memory_is_not_read(cloned, tmp_path):
    (cloned / "model.safetensors").unlink()
    with (cloned / "model.safetensors.index.json").open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(ValueError, match="index.json` of .* has 42949672960 bytes; expected at most"):
        FullModel(cloned)


def test_a_manifest_that_leads_out_is_refused(base, tmp_path):
    directory = shutil.copytree(base("llama"), tmp_path / "base")
    (directory / BASE_MANIFEST).rename(tmp_path / "elsewhere.json")
    (directory / BASE_MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="is a link out of its directory"):
        read_manifest(directory)


def test_a_packed_base_with_blocks_of_nothing_is_refused(base, tmp_path):
    pack_base(base("llama"), tmp_path / "packed")
    data = (tmp_path / "packed").read_bytes()
    assert b'\\"block_size\\": 64' in data
    (tmp_path / "packed").write_bytes(data.replace(b'\\"block_size\\": 64', b'\\"block_size\\": 00'[:-2] + b" 0"))
    with pytest.raises(ValueError, match="is not a packed base, or it is damaged .*ZeroDivisionError"):
        unpack_base(tmp_path / "packed", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_a_base_still_loads_and_trains(base):
    model = load_base(base("llama"), AutoModelForCausalLM)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
