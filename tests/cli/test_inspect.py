# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf inspect` prints what `describe_directory` returns, and checks files only when asked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.merge import foreign_config
from fedlpp_hf.report.inspection import describe_directory
from tests.helpers import assert_fails_in_one_line, make_federation


def test_prints_what_the_function_returns(run, llama_base, adapters):
    code, out, _ = run("inspect", llama_base, "--tensors", "--verify")
    assert code == 0 and out.splitlines() == describe_directory(llama_base, tensors=True, verify=True)
    code, out, _ = run("inspect", adapters[0])
    assert code == 0 and out.splitlines() == describe_directory(adapters[0])


def test_verifies_only_when_asked(run, full_llama, tmp_path):
    assert run("quantize", full_llama, tmp_path / "base")[0] == 0
    with open(tmp_path / "base" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert run("inspect", tmp_path / "base")[0] == 0
    assert_fails_in_one_line(run("inspect", tmp_path / "base", "--verify"), "is not the exported file")


def test_damage_ends_in_one_line(run, adapters, tmp_path):
    federation = make_federation(tmp_path / "out", adapters[0])
    (federation.round_dir(0) / "round.json").write_text("{")
    assert_fails_in_one_line(run("inspect", federation.output_dir), "can't be read")
    adapter = Path(shutil.copytree(adapters[0], tmp_path / "adapter"))
    for text, reason in (('{"peft_type": "LORA"}', "is not a configuration of LoRA"), ("{", "can't be read")):
        (adapter / "adapter_config.json").write_text(text)
        assert_fails_in_one_line(run("inspect", adapter), reason)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(.*.*.*.*)*!", "took more than 1 s"),
        ("(?:.|.)" * 26 + "!", "took more than 1 s"),
        ("((.*", "no regular expression"),
        ("((q", "is not a configuration of LoRA"),
    ],
)
def test_patterns_of_an_adapter_from_elsewhere(run, adapters, tmp_path, monkeypatch, field, pattern, reason):
    monkeypatch.setattr(foreign_config, "_SECONDS", 1.0)
    adapter = Path(shutil.copytree(adapters[0], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: {pattern: 3}}))
    assert_fails_in_one_line(run("inspect", adapter), reason)
    assert_fails_in_one_line(run("inspect", adapter, "--json"), reason)


def test_pattern_that_ends_gives_its_targets_scale(run, adapters, tmp_path):
    adapter = Path(shutil.copytree(adapters[0], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {r"layers\.0\..*": 300.0}}))
    targets = json.loads(run("inspect", adapter, "--json")[1])["targets"]
    assert (
        {path for path, scale in targets.items() if scale == 300 / config["r"]}
        == {path for path in targets if "layers.0." in path}
        != set()
    )


def test_json_of_a_base(run, llama_base):
    code, out, err = run("inspect", llama_base, "--json", "--verify")
    values, manifest = json.loads(out), read_manifest(llama_base)
    assert (code, err, values["kind"], values["verified"]) == (0, "", "base", True)
    for key in ("bits", "block_size", "fingerprint", "architecture", "totals", "full_precision_linears"):
        assert values[key] == manifest[key]
    assert (
        values["file_bytes"] == sum(file["bytes"] for file in manifest["files"].values()) and "tensors" not in values
    )
    values = json.loads(run("inspect", llama_base, "--json", "--tensors")[1])
    assert values["tensors"] == manifest["tensors"]


def test_json_of_an_adapter(run, adapters):
    values = json.loads(run("inspect", adapters[0], "--json", "--tensors")[1])
    assert values["kind"] == "adapter" and len(values["targets"]) == 4
    assert len(values["tensors"]) == 8 and values["broadcast_bytes"]["32"] == 4 * values["parameters"]
    assert values["broadcast_bytes"]["2"] < values["broadcast_bytes"]["4"] < values["bytes"]


def test_json_of_a_federation(run, adapters, tmp_path):
    federation = make_federation(tmp_path / "out", adapters[0])
    values = json.loads(run("inspect", federation.output_dir, "--json")[1])
    assert values["kind"] == "federation" and values["adapter"] is None
    assert values["rounds"] == federation.records() and values["clients"] == federation.read()["clients"]
    assert values["bytes_up"] == sum(record["bytes_up"] for record in federation.records())


def test_json_of_nothing_is_an_error(run, tmp_path):
    assert_fails_in_one_line(run("inspect", tmp_path, "--json"), "is not a base")


def test_base_is_inspected_without_torch(llama_base):
    code = f"""
import sys
from fedlpp_hf.cli.main import main
main(["inspect", {str(llama_base)!r}, "--verify"])
main(["inspect", {str(llama_base)!r}, "--json"])
assert not {{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)
