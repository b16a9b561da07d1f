# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a federation can be resumed with, and what is refused by name."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig

from fedlpp_hf.server.resume import read_resume
from fedlpp_hf.server.store import FEDERATION_FILE, RoundStore
from fedlpp_hf.wire.messages import ClientFailure

from .small_server import CLIENTS, KEY_B, answer, answer_all, make_server


@pytest.fixture
def output_dir(tmp_path):
    """A federation of one round."""
    make_server(tmp_path / "out", num_rounds=1).run(answer_all)
    return tmp_path / "out"


def resume(output_dir, *values, **options):
    server = make_server(output_dir, *values, **options)
    return server, server.run(answer_all, resume=True)


@pytest.mark.parametrize(
    "clients, message",
    [
        ({"a": 10, "b": 20}, "begun with 3 clients, and now others are here .missing: c.. .*same ones"),
        (CLIENTS | {"d": 1}, "new: d"),
        ({"a": 10, "x": 20, "y": 30}, "missing: b, c; new: x, y"),
        ({f"client-{n}": 1 for n in range(9)}, "new: client-0, client-1, client-2 and 6 more"),
        (CLIENTS | {"b": 21}, "Client 'b' had 20 rows when this federation was begun, and now has 21 rows"),
        (CLIENTS | {"b": None}, "Client 'b' had 20 rows .* now has an unknown number of rows"),
    ],
)
def test_other_clients_are_refused(output_dir, clients, message):
    with pytest.raises(ValueError, match=message):
        resume(output_dir, clients, num_rounds=2)
    assert RoundStore(output_dir).latest() == 1


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"lora_alpha": 99}, "lora_alpha=8, now it is 99. Resume with the same LoraConfig"),
        ({"use_rslora": True}, "use_rslora=False, now it is True"),
        ({"lora_dropout": 0.5}, "lora_dropout=0.0, now it is 0.5"),
        ({"target_modules": ["q", "v"]}, r"target_modules=\['q'\], now it is \['q', 'v'\]"),
        ({"alpha_pattern": {"q": 3}}, "alpha_pattern={}, now it is {'q': 3}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_adapter_is_refused(output_dir, lora, message):
    """With another alpha the same factors are another adapter: nothing in their shapes would show it."""
    server = make_server(output_dir, num_rounds=2)
    server.peft_config = LoraConfig(**{"r": 2, "target_modules": ["q"], **lora})
    with pytest.raises(ValueError, match=f"This federation's adapter was begun with {message}"):
        server.run(answer_all, resume=True)


def test_an_adapter_that_is_written_otherwise_is_the_same(output_dir):
    """As PEFT makes it and as it reads it back: sets, lists, and what says how it is loaded."""
    server = make_server(output_dir, num_rounds=2)
    server.peft_config = LoraConfig(r=2, target_modules={"q"}, base_model_name_or_path="x", inference_mode=True)
    server.peft_config.auto_mapping = {"base_model_class": "LlamaForCausalLM"}
    server.run(answer_all, resume=True)
    assert RoundStore(output_dir).latest() == 2


def test_another_base_is_refused(output_dir):
    server = make_server(output_dir, num_rounds=2)
    server.base_fingerprint = "another"
    with pytest.raises(ValueError, match="begun with the base fingerprint…, now it is another…"):
        server.run(answer_all, resume=True)


def test_damaged_round_is_refused_before_any_client_is_asked(output_dir):
    path = RoundStore(output_dir).round_dir(1) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Round 1: .*adapter_model.safetensors` is damaged"):
        make_server(output_dir, num_rounds=2).run(lambda tasks: pytest.fail("a client was asked"), resume=True)
    shutil.rmtree(path.parent)  # as the message says
    server, records = resume(output_dir, num_rounds=2)
    assert len(records) == 3 and torch.equal(server.adapter[KEY_B], torch.full((4, 2), 2.0))


@pytest.mark.parametrize("again", [True, False], ids=["resumed", "started"])
def test_killed_before_its_first_commit_begins_anew(output_dir, again):
    """Nothing is lost, so that other clients and other options do no harm either."""
    shutil.rmtree(RoundStore(output_dir).root / "rounds")
    server = make_server(output_dir, {"x": 1}, num_rounds=2, server_learning_rate=0.5)
    assert len(server.run(lambda tasks: answer_all(tasks), resume=again)) == 3
    assert set(json.loads((RoundStore(output_dir).root / FEDERATION_FILE).read_text())["clients"]) == {"x"}


def test_resuming_nothing_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="holds no federation to resume"):
        resume(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, False), (False, False), (True, True), ("true", True), ("True", True), ("False", False), ("none", False), ("", False),
        ("out", True), ("out/_federation", True), ("out/_federation/rounds/round-00001", True), ("out/", True),
    ],
)  # fmt: skip
def test_ways_to_say_resume(output_dir, monkeypatch, value, expected):
    monkeypatch.chdir(output_dir.parent)
    assert read_resume(value, RoundStore("out")) is expected


@pytest.mark.parametrize(
    "value, message",
    [
        ("gone", "resume_from_checkpoint='gone' does not exist. Set it to True"),
        ("out/_federation/rounds/round-00009", "round-00009' does not exist"),
        ("out/_federation/rounds/round-00000", "is not the last committed round, which is 1. To go back, delete"),
        ("other", "is not in output_dir=`.*out`.*Set output_dir to the federation's directory"),
    ],
)
def test_other_paths_are_refused(output_dir, monkeypatch, value, message):
    monkeypatch.chdir(output_dir.parent)
    (output_dir.parent / "other").mkdir()
    with pytest.raises(ValueError, match=message):
        read_resume(value, RoundStore("out"))


def test_a_round_that_lacked_clients_is_resumed_with_fewer(tmp_path):
    """No result depends on `min_clients`; without this, one client that is gone for good would end the federation."""

    def lose_one(tasks):
        return [ClientFailure("c", "gone") if task.client_id == "c" else answer(task) for task in tasks]

    with pytest.raises(RuntimeError, match="Round 1 has 2 acceptable updates; min_clients=3"):
        make_server(tmp_path, min_clients=3).run(lose_one)
    assert len(make_server(tmp_path, min_clients=2).run(lose_one, resume=True)) == 3
