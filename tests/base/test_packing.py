# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A packed base: as small as its information, and bit-identical when it is unpacked."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import check_base
from fedlpp_hf.base.packing import pack_base, unpack_base


_SIZES = {
    "vocab_size": 101, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def full_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**_SIZES)).to(torch.bfloat16)
    with torch.no_grad():
        llama.model.embed_tokens.weight[3:9] = 0  # whole blocks of zeros
        llama.model.layers[0].mlp.up_proj.weight[-2:] = 0  # and the last block, which bitsandbytes gives a scale
        llama.model.layers[0].mlp.down_proj.weight *= 1e-30
    llama.save_pretrained(root / "llama")
    MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=3)).save_pretrained(root / "mixtral")
    return root


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 2, "embedding_bits": 8, "max_shard_size": 30_000},
        {"bits": 2, "double_quant": True},
        {"bits": 3, "embedding_bits": 2, "block_size": 128},
        {"bits": 4, "embedding_bits": 32},
        {"bits": 8},
    ],
    ids=str,
)
def test_unpacked_base_is_the_base(name, settings, full_models, tmp_path):
    manifest = export_base(full_models / name, tmp_path / "base", **settings)
    size = pack_base(tmp_path / "base", tmp_path / "packed.safetensors")
    assert size == (tmp_path / "packed.safetensors").stat().st_size
    assert unpack_base(tmp_path / "packed.safetensors", tmp_path / "again") == manifest
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    load_base(tmp_path / "again")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_tensors_take_at_most_what_the_manifest_promises(bits, full_models, tmp_path):
    manifest = export_base(full_models / "llama", tmp_path / "base", bits=bits)
    pack_base(tmp_path / "base", tmp_path / "packed")
    packed = load_file(tmp_path / "packed")
    for entry in manifest["tensors"]:
        parts = [
            packed[entry["name"] + part].numel()
            for part in ("", ".absmax", ".scales")
            if entry["name"] + part in packed
        ]
        tail = entry["name"] == "model.layers.0.mlp.up_proj.weight"  # its last scale, 1e-38, is no bfloat16
        assert sum(parts) <= entry["information_bytes"] or tail, entry["name"]
    linears = [entry for entry in manifest["tensors"] if entry["kind"] == "linear4bit"]
    count = sum(entry["shape"][0] * entry["shape"][1] for entry in linears)
    promised = sum(entry["information_bytes"] for entry in linears)
    assert promised * 8 / count == pytest.approx((1.6 if bits == 1 else bits) + 16 / 64, rel=0.01)
    taken = sum(packed[entry["name"]].numel() for entry in linears) * 8 / count
    # These matrices are small, and each brings its table of code lengths.
    assert taken <= {1: 1.1, 2: 1.7, 3: 2.85, 4: 4.0}[bits]


@pytest.fixture
def packed(full_models, tmp_path):
    export_base(full_models / "llama", tmp_path / "base", bits=2)
    pack_base(tmp_path / "base", tmp_path / "packed")
    return tmp_path / "packed"


def test_damage_is_noticed(packed, tmp_path):
    data = bytearray(packed.read_bytes())
    for change in (data[:-5], data[:-300] + bytes(byte ^ 255 for byte in data[-300:]), b"", data[:50]):
        packed.write_bytes(change)
        with pytest.raises(ValueError):
            unpack_base(packed, tmp_path / "new")
        assert not list(tmp_path.glob("*new*"))


def test_a_dtype_that_torch_does_not_have(packed, tmp_path):
    data = packed.read_bytes()
    changed = data.replace(rb"source_dtype\": \"bfloat16", rb"source_dtype\": \"bflOat16")
    assert changed != data
    packed.write_bytes(changed)
    with pytest.raises(ValueError, match="not a packed base, or it is damaged .*bflOat16"):
        unpack_base(packed, tmp_path / "new")


def test_other_files_are_no_packed_base(packed, tmp_path):
    with pytest.raises(ValueError, match="not a packed base"):
        unpack_base(tmp_path / "base" / "model.safetensors", tmp_path / "new")


def test_existing_base_is_kept_unless_told(packed, tmp_path):
    before = check_base(tmp_path / "base")
    with pytest.raises(ValueError, match="overwrite=True"):
        unpack_base(packed, tmp_path / "base")
    assert unpack_base(packed, tmp_path / "base", overwrite=True) == before


def test_changed_base_is_not_packed(packed, tmp_path):
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        pack_base(tmp_path / "base", tmp_path / "other")
    assert not (tmp_path / "other").exists()
