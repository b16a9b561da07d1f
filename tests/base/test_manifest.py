# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The manifest says what is in a base, and a base that was changed is refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoModel,
)

from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import check_base, describe_base, read_manifest


def test_manifest_adds_up(base):
    for name, settings in (("llama", {"bits": 2}), ("bert", {}), ("gpt2", {"bits": 8})):
        directory = base(name, **settings)
        manifest = check_base(directory)
        shard = directory / "model.safetensors"
        with shard.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert header + manifest["totals"]["bytes"] == shard.stat().st_size
        assert describe_base(directory)["file_bytes"] == sum(
            path.stat().st_size for path in directory.iterdir() if path.name != "base_manifest.json"
        )
        model = AutoModel.from_pretrained(directory)
        assert manifest["totals"]["parameters"] >= sum(entry["shape"][0] for entry in manifest["tensors"])
        assert {entry["name"].split(".")[0] for entry in manifest["tensors"]} <= {model.base_model_prefix, "lm_head", "classifier"}  # fmt: skip
    assert read_manifest(base("llama", bits=2))["totals"]["information_bits_per_parameter"] < 4


def test_changed_base_is_refused(base, tmp_path):
    def changed(change):
        directory = shutil.copytree(base("llama"), tmp_path / change.__name__)
        change(directory)
        with pytest.raises(ValueError) as error:
            load_base(directory)
        return str(error.value)

    def flip(directory: Path):
        data = bytearray((directory / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (directory / "model.safetensors").write_bytes(data)

    def lose(directory: Path):
        (directory / "config.json").unlink()

    def smuggle(directory: Path):
        (directory / "pytorch_model.bin").write_bytes(b"a pickle")

    def relabel(directory: Path):
        manifest = read_manifest(directory)
        (directory / "base_manifest.json").write_text(json.dumps(manifest | {"bits": 2}))

    def garble(directory: Path):
        (directory / "base_manifest.json").write_text("{")

    def age(directory: Path):
        manifest = read_manifest(directory)
        (directory / "base_manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))

    assert "sha256" in changed(flip)
    assert "config.json" in changed(lose)
    assert "pytorch_model.bin" in changed(smuggle)
    assert "fingerprint" in changed(relabel)
    assert "can't be read" in changed(garble)
    assert "format 99" in changed(age)
    # The last bytes are of a quantization state: what is not verified may fail later, and in other words.
    assert read_manifest(tmp_path / "flip") == read_manifest(base("llama"))
