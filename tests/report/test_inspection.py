# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is said of a base, an adapter and a federation."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.report.inspection import describe_directory
from fedlpp_hf.report.text import format_bytes
from fedlpp_hf.server.store import RoundStore
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG, write_adapter
from fedlpp_hf.tensors.quantization import quantize
from tests.helpers import make_federation, make_llama_adapter, read_table


@pytest.fixture(scope="module")
def adapter(full_llama, tmp_path_factory) -> Path:
    return make_llama_adapter(full_llama, tmp_path_factory.mktemp("adapters") / "adapter", 0)


@pytest.fixture
def federation(tmp_path, adapter) -> RoundStore:
    return make_federation(tmp_path / "out", adapter)


def describe(directory, **options) -> str:
    return "\n".join(describe_directory(directory, **options))


def test_base_accounts_for_every_tensor(llama_base):
    manifest = read_manifest(llama_base)
    out = describe(llama_base, tensors=True, verify=True)
    rows = read_table(out)
    assert len(rows) == 2 + len(manifest["tensors"]) + 1
    assert [row[0].split()[0] for row in rows[2:-1]] == [entry["name"] for entry in manifest["tensors"]]
    totals = manifest["totals"]
    assert rows[-1][2:5] == [
        f"{totals['parameters']:,}",
        f"{totals['information_bits_per_parameter']:.2f}",
        format_bytes(totals["information_bytes"]),
    ]
    assert manifest["fingerprint"] in out and "every file checked" in out
    exact = [entry["name"] for entry in manifest["tensors"] if entry["kind"] == "full_precision"]
    assert f"In full precision: {format_bytes(totals['full_precision_bytes'])}" in out and exact[0] in out
    summary = read_table(describe(llama_base))
    assert summary[-1] == rows[-1] and sum(int(row[1]) for row in summary[2:-1]) == len(manifest["tensors"])


def test_adapter_with_the_cost_of_a_broadcast(adapter):
    out = describe(adapter, tensors=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    header, sizes = read_table(out)[-3], read_table(out)[-1]
    assert header == ["bits", "1", "2", "3", "4", "8", "32"]
    for bits, size in zip(header[1:-1], sizes[1:-1], strict=True):
        assert size == format_bytes(sum(quantize(tensor, bits).nbytes for tensor in tensors.values()))
    assert sizes[-1] == format_bytes(4 * sum(tensor.numel() for tensor in tensors.values()))
    assert {row[0] for row in read_table(out)} >= set(tensors)
    assert "rank 4, alpha 8, 4 targets (scale 2)" in out and "WARNING" not in out


def test_adapter_that_names_its_model_is_warned_of(adapter, tmp_path):
    write_adapter(tmp_path, load_file(adapter / "adapter_model.safetensors"), LoraConfig(r=4, lora_alpha=8))
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "owner/secret"}))
    assert "WARNING: its configuration names the model `owner/secret`" in describe(tmp_path)
    path.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is not a configuration of LoRA"):
        describe(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        describe(tmp_path)


def test_federation_with_its_rounds(federation):
    out = describe(federation.output_dir)
    assert describe(federation.root) == out
    assert "Federation f0: 1 of 5 rounds committed, 2 clients" in out
    assert "base_bits=3, adapter_bits=2, broadcast=every_round\n" in out
    header, _, *rows = read_table(out)
    assert header[3:6] == ["clients' loss", "base + proxy accuracy", "server accuracy"]
    assert rows == [
        ["0", "0", "0", "", "0.4000", "0.5000", "0 B", "0 B", "0.0"],
        ["1", "2", "0", "2.5000", "0.8000", "0.7000", "2.0 kB", "3.0 kB", "2.5"],
    ]
    assert "WARNING: The clients' proxy (accuracy 0.8000) is better than the server's model" in out


def test_federation_with_its_published_adapter(federation, adapter):
    federation.publish(load_file(adapter / "adapter_model.safetensors"), LoraConfig(r=4, lora_alpha=8))
    out = describe(federation.output_dir)
    assert "Federation f0" in out and "LORA adapter: rank 4" in out
    assert "LORA adapter" in describe(federation.round_dir(1))


def test_federation_without_a_round(tmp_path):
    settings = {"federation_id": "f0", "base_fingerprint": "ab", "clients": {}, "config": {"num_rounds": 5}}
    RoundStore(tmp_path).create(settings)
    assert "No round is committed" in describe(tmp_path)


def test_damaged_federation(federation):
    (federation.round_dir(0) / "round.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        describe(federation.output_dir)
