# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A round is on disk whole or not at all, whatever happens while it is written."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import torch as safetensors_torch

from fedlpp_hf.server.store import (
    FEDERATION_DIR,
    FEDERATION_FILE,
    ROUND_FILE,
    ROUND_FILES,
    SERVER_STATE,
    RoundStore,
)
from fedlpp_hf.tensors import adapters
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter


CONFIG = LoraConfig(r=2, target_modules=["q"], base_model_name_or_path="owner/secret")
STEPS = 12  # more than there are writes in a commit


def make_round(number: int) -> tuple[dict, dict, dict]:
    generator = torch.Generator().manual_seed(number)
    adapter = {"base_model.model.q.lora_A.weight": torch.randn(2, 3, generator=generator)}
    return (
        adapter,
        {"optimizer:momentum.q": torch.tensor(number)},
        {"round": number, "metrics": {"loss": 1 / (number + 1)}},
    )


def commit(store: RoundStore, number: int) -> None:
    adapter, state, record = make_round(number)
    store.commit(number, adapter, CONFIG, state, record)


def check_round(store: RoundStore, number: int) -> None:
    """The latest round is `number`, and it and all before it are what was committed."""
    assert store.latest() == number
    assert store.records() == [make_round(n)[2] for n in range(number + 1)]
    for n in range(number + 1):
        loaded, expected = store.load(n), make_round(n)[:2]
        for one, other in zip(loaded, expected, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


@pytest.fixture
def store(tmp_path) -> RoundStore:
    store = RoundStore(tmp_path / "out")
    store.create({"federation_id": "f0"})
    for number in (0, 1):
        commit(store, number)
    return store


def write_half(path) -> None:
    with open(path, "wb") as file:
        file.write(b'{"ro')


class Saboteur:
    """Lets `count` writes through and fails the next one half-way, and every one after it."""

    def __init__(self, monkeypatch, count: int, error: BaseException):
        self.left, self.error = count, error
        monkeypatch.setattr(os, "replace", self.wrap(os.replace))
        monkeypatch.setattr(os, "fsync", self.wrap(os.fsync))
        for name in ("write_text", "write_bytes"):
            monkeypatch.setattr(Path, name, self.wrap(getattr(Path, name), lambda path, *_, **__: write_half(path)))
        for module in (adapters, safetensors_torch):
            half = self.wrap(module.save_file, lambda _, path, **__: write_half(path))
            monkeypatch.setattr(module, "save_file", half)

    def wrap(self, function, half=lambda *_, **__: None):
        def call(*arguments, **options):
            self.left -= 1
            if self.left >= 0:
                return function(*arguments, **options)
            half(*arguments, **options)
            raise self.error

        return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_commit_that_dies_at_any_write_leaves_the_round_before_it(store, error):
    died = 0
    for step in range(STEPS):
        with pytest.MonkeyPatch.context() as monkeypatch:
            Saboteur(monkeypatch, step, error)
            try:
                commit(store, 2)
            except type(error):
                died += 1
        marked = (store.round_dir(2) / ROUND_FILE).is_file()
        assert marked or died > step  # without an error, the round is there
        check_round(RoundStore(store.output_dir), 2 if marked else 1)
        if marked:
            break
    assert died >= 7  # two files of the adapter, the state, their syncs, the record's text and its sync
    commit(store, 2)
    check_round(store, 2)


def test_commit_mark_is_written_last_and_by_replacing(store, monkeypatch):
    seen = []

    def replace(source, target, _replace=os.replace):
        seen.append((Path(target), {path.name for path in Path(target).parent.iterdir()} - {Path(source).name}))
        _replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    commit(store, 2)
    others = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, SERVER_STATE}
    assert seen == [(store.round_dir(2) / ROUND_FILE, others)]
    assert {path.name for path in store.round_dir(2).iterdir()} == others | {ROUND_FILE}


def test_round_without_its_mark_does_not_count_and_is_written_anew(store):
    (store.round_dir(2) / "nested").mkdir(parents=True)
    (store.round_dir(2) / ADAPTER_WEIGHTS).write_bytes(b"half")
    assert store.latest() == 1
    commit(store, 2)
    check_round(store, 2)
    assert not (store.round_dir(2) / "nested").exists()


def test_store_without_rounds_has_none(tmp_path):
    store = RoundStore(tmp_path / "out")
    assert (store.exists, store.latest(), store.records()) == (False, None, [])
    with pytest.raises(ValueError, match="holds no federation to resume"):
        store.read()


def test_federation_in_the_way_is_kept_unless_overwritten(store):
    with pytest.raises(ValueError, match=r"already holds a federation.*--resume_from_checkpoint.*--overwrite"):
        store.create({"federation_id": "f1"})
    check_round(store, 1)
    assert store.read() == {"schema": 2, "federation_id": "f0"}
    store.create({"federation_id": "f1"}, overwrite=True)
    assert (store.read()["federation_id"], store.latest()) == ("f1", None)


def test_federation_of_another_schema_is_refused(store):
    path = store.root / FEDERATION_FILE
    for schema in (1, 99):
        path.write_text(json.dumps({"schema": schema}))
        with pytest.raises(ValueError, match=f"has schema {schema}; this version of fedlpp_hf reads 2") as error:
            store.read()
        assert "\n" not in str(error.value)
    path.write_text('{"schema": 2')
    with pytest.raises(ValueError, match="federation.json` can't be read"):
        store.read()


@pytest.mark.parametrize("name", ROUND_FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "other", "longer"])
def test_damaged_round_is_refused_and_the_one_before_it_loads(store, name, damage):
    path = store.round_dir(1) / name
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"truncated": data[:-5], "longer": data + b" ", "other": b"\xff\xfe nonsense"}[damage])
    with pytest.raises(ValueError, match=f"round-00001.*{name}"):
        store.load(1)
    assert torch.equal(
        *(tensors["base_model.model.q.lora_A.weight"] for tensors in (store.load(0)[0], make_round(0)[0]))
    )


@pytest.mark.parametrize("name", [*ROUND_FILES, ROUND_FILE])
def test_a_bit_that_flipped_is_noticed(store, name):
    path = store.round_dir(1) / name
    data = path.read_bytes()
    for place in range(0, len(data), max(len(data) // 40, 1)):
        for bit in (1, 64):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            try:
                store.load(1), store.records()
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:  # white space of JSON, which says nothing
                assert name == ROUND_FILE and json.loads(path.read_text()) == json.loads(data)
    path.write_bytes(data)
    check_round(store, 1)


def test_record_names_the_digests_of_its_files(store):
    record = json.loads((store.round_dir(1) / ROUND_FILE).read_text())
    digests = {name: hashlib.sha256((store.round_dir(1) / name).read_bytes()).hexdigest() for name in ROUND_FILES}
    assert record["files"] == digests
    assert not {"files", "sha256"} & store.records()[1].keys()


def test_federation_without_a_commit_is_no_obstacle(tmp_path):
    store = RoundStore(tmp_path / "out")
    store.create({"federation_id": "f0"})
    store.round_dir(0).mkdir(parents=True)  # stopped while it was written
    store.create({"federation_id": "f1"})
    assert store.read()["federation_id"] == "f1" and not (store.root / "rounds").exists()


def test_one_process_runs_a_federation(store):
    other = RoundStore(store.output_dir)
    holder = rf"Another process is running a federation in `.*` \(process {os.getpid()} on .*, since 20"
    with store.lock(), pytest.raises(ValueError, match=holder), other.lock():
        pass
    with other.lock():
        pass


def test_state_is_its_users_alone(tmp_path):
    store = RoundStore(tmp_path / "out")
    with store.lock():
        assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.output_dir.stat().st_mode) & 0o055  # the adapter and the report can be shared


def test_state_stays_where_it_is_when_the_script_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = RoundStore("out")
    monkeypatch.chdir("/")
    with store.lock():
        store.create({"federation_id": "f"})
    assert (tmp_path / "out" / FEDERATION_DIR / FEDERATION_FILE).is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds a list, expected an object"), ("[" * 100_000, "can't be read"), ("null", "holds a NoneType")],
)
def test_federation_that_is_no_federation(store, text, message):
    (store.root / FEDERATION_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        store.read()


def test_federation_changed_by_hand(store):
    path = store.root / FEDERATION_FILE
    federation = json.loads(path.read_text())
    path.write_text(json.dumps(federation | {"federation_id": "another"}))
    with pytest.raises(ValueError, match="damaged or was changed by hand"):
        store.read()
    del federation["sha256"]  # as earlier versions wrote it
    path.write_text(json.dumps(federation))
    assert store.read()["federation_id"] == federation["federation_id"]
    path.write_text(json.dumps(federation | {"sha2u6": "a digest whose key has lost a bit"}))
    with pytest.raises(ValueError, match="damaged or was changed by hand"):
        store.read()


def test_damaged_record_is_refused_by_its_path(store):
    (store.round_dir(1) / ROUND_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"round-00001/round\.json` can't be read"):
        store.records()


def test_published_adapter_is_a_peft_repository_without_the_owners_name(store):
    for number in (0, 1):  # the second replaces the first
        store.publish(make_round(number)[0], CONFIG)
    tensors, config = read_adapter(store.output_dir)
    assert all(torch.equal(tensors[key], value) for key, value in make_round(1)[0].items())
    assert config["base_model_name_or_path"] is None and "secret" not in json.dumps(config)
    assert sorted(path.name for path in store.output_dir.iterdir()) == [
        FEDERATION_DIR,
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
    ]
    for path in store.root.rglob("*.json"):
        assert "secret" not in path.read_text()
