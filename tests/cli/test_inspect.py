# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf inspect` prints what `describe_directory` returns, and checks files only when asked."""

import shutil
from pathlib import Path

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
