# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A trainer that resumes with something else than its federation began with is refused, before any client trains."""

import shutil

import pytest

from fedlpp_hf import FederatedTrainer, RoundStore, export_base
from tests.helpers import make_rows, make_trainer


class Untouched(FederatedTrainer):
    def train_client(self, task, rows=None):
        raise KeyboardInterrupt("a client trained")


@pytest.fixture
def begun(llama_base, lora, tmp_path):
    """The base and the output of a federation of one round."""
    shutil.copytree(llama_base, tmp_path / "base")
    make_trainer(str(tmp_path / "base"), tmp_path / "out", lora, num_rounds=1, max_steps=1).train()
    return tmp_path / "base", tmp_path / "out"


def resume(base, output_dir, lora, how=True, **options):
    trainer = make_trainer(str(base), output_dir, lora, cls=Untouched, **{"num_rounds": 2, "max_steps": 1, **options})
    trainer.train(resume_from_checkpoint=how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, message",
    [
        (make_rows(clients=2), "begun with 3 clients, and now others are here .missing: site-2"),
        (make_rows(25), "Client 'site-0' had 8 rows when this federation was begun, and now has 9 rows"),
        ({"site-0": make_rows(8), "site-1": make_rows(8), "x": make_rows(8)}, "missing: site-2; new: x"),
    ],
)
def test_other_clients_and_rows(begun, lora, rows, message):
    with pytest.raises(ValueError, match=message):
        resume(*begun, lora, train_dataset=rows)


@pytest.mark.parametrize(
    "path, message",
    [("gone", "resume_from_checkpoint='.*gone' does not exist"), ("base", "is not in output_dir")],
)
def test_paths(begun, lora, path, message):
    with pytest.raises(ValueError, match=message):
        resume(*begun, lora, how=begun[1].parent / path)


def test_another_base(begun, full_llama, lora, tmp_path):
    export_base(full_llama, tmp_path / "other", bits=3)
    with pytest.raises(ValueError, match=r"was begun with the base \w{12}…, now it is \w{12}…. Give it the same base"):
        resume(tmp_path / "other", begun[1], lora)


def test_base_without_its_weights(begun, lora):
    (begun[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="base` has no `model.safetensors`"):
        resume(*begun, lora)


@pytest.mark.slow
def test_base_that_is_gone(begun, lora):
    shutil.rmtree(begun[0])
    with pytest.raises(ValueError, match=f"`{begun[0]}` is neither a directory nor a name on the Hub"):
        resume(*begun, lora)


def test_damaged_round(begun, lora):
    path = RoundStore(begun[1]).round_dir(1) / "server_state.safetensors"
    data = bytearray(path.read_bytes())
    data[3] ^= 128
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Round 1: .*server_state.safetensors` is damaged"):
        resume(*begun, lora)


def test_what_no_result_depends_on_may_change(begun, lora):
    with pytest.raises(KeyboardInterrupt, match="a client trained"):
        resume(*begun, lora, how="True", metric_for_best_model="loss", greater_is_better=False, run_name="again")
