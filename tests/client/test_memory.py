# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client keeps for its next round is there after a step back, and is nobody else's."""

from pathlib import Path

import pytest
import torch

from fedlpp_hf.client.memory import ClientMemory, sweep_memories
from fedlpp_hf.tensors import atomic
from fedlpp_hf.wire.messages import ClientTask


def open_memory(directory, number: int, client: str = "a", federation: str = "f") -> ClientMemory:
    return ClientMemory(directory, ClientTask(federation, number, 9, client, 0, "", None))


def read_value(memory: ClientMemory) -> float | None:
    tensors = memory.read()
    return tensors["w"].item() if tensors else None


def test_client_reads_what_it_kept_in_its_last_round(tmp_path):
    assert read_value(open_memory(tmp_path, 1)) is None
    for number in (1, 2, 4):  # it was not asked in round 3
        open_memory(tmp_path, number).write({"w": torch.tensor([float(number)])})
    assert [read_value(open_memory(tmp_path, number)) for number in (5, 4, 3)] == [4.0, 2.0, 2.0]


def test_two_rounds_are_kept_and_a_repeated_one_is_replaced(tmp_path):
    for number, value in ((1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0)):  # a resumed federation trains round 3 again
        open_memory(tmp_path, number).write({"w": torch.tensor([value])})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert [read_value(open_memory(tmp_path, number)) for number in (4, 3)] == [30.0, 2.0]


@pytest.mark.parametrize("client", ["b", "../../elsewhere", "/etc/passwd", "\0", "ä" * 400])
def test_clients_do_not_share_and_their_ids_are_no_paths(tmp_path, client):
    open_memory(tmp_path, 1).write({"w": torch.ones(1)})
    other = open_memory(tmp_path, 2, client)
    assert other.read() == {}
    other.write({"w": torch.zeros(1)})
    assert tmp_path in other.file.resolve().parents
    assert open_memory(tmp_path, 2, federation="another").read() == {}


@pytest.mark.parametrize("remedy", ["the next round", "the end"])
@pytest.mark.parametrize("killed_at", ["the write", "the removal"])
def test_what_a_killed_write_left_goes(tmp_path, monkeypatch, killed_at, remedy):
    for number in (1, 2):
        open_memory(tmp_path, number).write({"w": torch.tensor([float(number)])})
    with monkeypatch.context() as patch:
        if killed_at == "the write":
            patch.setattr(atomic, "sync_path", lambda path: 1 / 0)
        else:
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: missing_ok or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_memory(tmp_path, 3).write({"w": torch.tensor([3.0])})
    assert len(list(tmp_path.glob("*/*"))) == 3
    if remedy == "the end":
        sweep_memories(tmp_path, 3)
    else:
        open_memory(tmp_path, 4).write({"w": torch.tensor([4.0])})
    kept = {
        "the write": {"the end": [2], "the next round": [2, 4]},
        "the removal": {"the end": [2, 3], "the next round": [3, 4]},
    }
    there = sorted(path.name for path in tmp_path.glob("*/*"))
    assert there == [f"round-{number:05d}.safetensors" for number in kept[killed_at][remedy]]


def test_a_sweep_keeps_what_a_federation_that_goes_back_needs(tmp_path):
    for number in (1, 2, 3, 2):  # back at round 2: what was kept of round 3 is of no use
        open_memory(tmp_path, number).write({"w": torch.tensor([float(number)])})
    sweep_memories(tmp_path, 2)
    assert [read_value(open_memory(tmp_path, number)) for number in (3, 2)] == [2.0, None]
