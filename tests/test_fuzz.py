# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A few seconds of the fuzz run over messages and files, and its promises' own test: they can be broken.

The long form is `python -m benchmarks.fuzz`.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import fuzz
from benchmarks.fuzz_messages import MessageFuzz
from fedlpp_hf.base.manifest import check_base
from fedlpp_hf.base.mark_keys import MarkKey
from fedlpp_hf.client.memory import ClientMemory
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.server import admission
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.tensors.headers import parse_header
from fedlpp_hf.tensors.lora import lora_factors
from fedlpp_hf.wire.messages import ClientTask, LocalOptions


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


def explain(found):
    return "\n".join(text for findings in found.values() for text in findings.broken)


def test_mutated_messages_are_refused_or_harmless():
    found = fuzz.run(1000, 1, ["messages"])
    assert not explain(found)
    kinds = set(found["messages"].kinds)
    assert kinds == {
        "flip",
        "overwrite",
        "truncate",
        "splice",
        "insert",
        "delete",
        "header",
        "forged header",
        "forged tensors",
        "made up",
    }
    outcomes = found["messages"].outcomes
    assert outcomes["refused"] > 500 and outcomes["admitted"] and outcomes.total() == 1000


@pytest.mark.slow
def test_mutated_files_are_refused_or_harmless():
    pytest.importorskip("cryptography", reason="needs the extra `flower`")
    found = fuzz.run(1200, 2, sorted(fuzz.SHARES.keys() - {"messages"}))
    assert not explain(found)
    for name, findings in found.items():
        assert findings.outcomes["refused"] or name == "certificates", name
        assert not findings.outcomes["admitted"]


@pytest.mark.parametrize(
    "break_",
    [
        lambda delta: next(iter(delta.values())).fill_(torch.inf),
        lambda delta: delta.pop(next(iter(delta))),
        lambda delta: 1 / 0,
        lambda delta: os._exit(1),
        lambda delta: torch.empty(2**30, dtype=torch.float64),
        lambda delta: time.sleep(5),
    ],
)
def test_a_broken_promise_is_found(monkeypatch, break_):
    real = admission.decompress_update

    def decompress_update(payload, reference):
        delta = real(payload, reference)
        break_(delta)
        return delta

    monkeypatch.setattr(admission, "decompress_update", decompress_update)
    monkeypatch.setattr(fuzz, "TIME_LIMIT", 0.5)
    assert fuzz.fuzz("messages", MessageFuzz(), 12, 3).broken


# --- What the fuzz run found.
@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [None], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
    ],
)
def test_header_with_other_types(entry):
    header = b"01234567" + json.dumps({"a": entry}).encode()
    with pytest.raises(ValueError, match="has a header"):
        parse_header(header, len(header) + 4)
    with pytest.raises(ValueError, match="has a header that can't be read"):
        parse_header(b"01234567" + b"[" * 100_000, 100_008)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: [config], "its configuration is a list"),
        (lambda config: config | {"r": "4"}, "has r='4'"),
        (lambda config: config | {"lora_alpha": None}, "lora_alpha=None"),
        (lambda config: config | {"rank_pattern": 3}, "rank_pattern=3"),
        (lambda config: {key: value for key, value in config.items() if key != "r"}, "has r=None"),
    ],
)
def test_adapter_configuration_with_other_types(full_llama, tmp_path, change, message):
    from tests.helpers import make_llama_adapter

    path = make_llama_adapter(full_llama, tmp_path / "adapter", 0) / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        lora_factors(*read_adapter(path.parent))
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="can't be read"):
        read_adapter(path.parent)


def test_manifest_that_says_more_or_another_size(llama_base, tmp_path):
    import shutil

    shutil.copytree(llama_base, tmp_path / "base")
    path = tmp_path / "base" / "base_manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (({"bytes": 5}, "its size or sha256 differs"), ({"x": 1}, "says more of the file")):
        files = {name: file | change for name, file in manifest["files"].items()}
        path.write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(ValueError, match=message):
            check_base(tmp_path / "base")


def test_clients_files_with_other_types(tmp_path):
    task = ClientTask("f", 2, 3, "a", 0, "ab" * 32, None, LocalOptions())
    memory = ClientMemory(tmp_path, task)
    memory.directory.mkdir()
    (memory.directory / "round-00001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"kept of an earlier round, is damaged.*delete"):
        memory.read()
    for text in ("[" * 100_000, '{"config": 1, "data": "", "client_id": "", "state_dir": "", "cache_dir": ""}'):
        (tmp_path / "client.json").write_text(text)
        with pytest.raises(ValueError, match="client's settings"):
            ClientSettings.read(tmp_path / "client.json")


def test_keys_with_other_types(tmp_path):
    key = {"secret": "ab" * 32, "full_model": "m", "settings": {}}
    for text in ("[" * 100_000, json.dumps(key | {"clients": "x" * 10**6}), json.dumps(key | {"clients": [1]})):
        path = tmp_path / "marks.json"
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ValueError, match="can't be read"):
            MarkKey.read(path)
    pytest.importorskip("cryptography", reason="needs the extra `flower`")
    from fedlpp_hf.flower.certificates import NODE_KEY, make_node_key

    path = make_node_key(tmp_path)
    data = path.read_bytes()
    for place in range(60, 120):  # where the key's own kind and cipher stand
        (tmp_path / NODE_KEY).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            make_node_key(tmp_path)
        except ValueError as error:
            assert "is not a private key of OpenSSH" in str(error)
