# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole runs of the trainer: bases of all bits, what trackers see, who is left out, and what stays the caller's."""

import copy
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from fedlpp_hf import FederatedTrainer, export_base, load_base
from tests.helpers import make_args, make_rows, make_trainer


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 3, 2, 1])
def test_bases_of_all_bits_train(full_llama, lora, tmp_path, bits):
    export_base(full_llama, tmp_path / "base", bits=bits)
    rows = make_rows()
    trainer = make_trainer(load_base(tmp_path / "base"), tmp_path / "out", lora, eval_dataset=rows, max_steps=4)
    trainer.train()
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in trainer.server.store.records()]
    assert losses[-1] < losses[0]


def test_trackers_see_rounds_and_no_client_runs(llama_base, lora, tmp_path, monkeypatch):
    seen = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append("begin")

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append((state.global_step, logs))

        def on_train_end(self, args, state, control, **kwargs):
            seen.append("end")

    monkeypatch.setattr("fedlpp_hf.trainer.federated.get_reporting_integration_callbacks", lambda names: [Tracker])
    make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(), logging_steps=1).train()
    assert (seen[0], seen[-1]) == ("begin", "end")
    assert [step for step, _ in seen[1:-1]] == [0, 1, 2]
    assert {"proxy/eval_loss", "clients/loss", "bytes/down", "bytes/up"} <= seen[2][1].keys()


def test_diverged_client_is_rejected_by_name(llama_base, lora, tmp_path):
    class Diverges(FederatedTrainer):
        def train_client(self, task):
            update = super().train_client(task)
            if task.client_id == "site-1":
                next(iter(update.delta.values())).fill_(float("nan"))
            return update

    trainer = make_trainer(load_base(llama_base), tmp_path, lora, cls=Diverges, num_rounds=1)
    trainer.train()
    record = trainer.server.store.records()[1]
    assert list(record["clients"]) == ["site-0", "site-2"]
    assert "NaN" in record["rejected"]["site-1"]
    strict = make_trainer(load_base(llama_base), tmp_path, lora, cls=Diverges, min_clients=3, overwrite=True)
    with pytest.raises(RuntimeError, match=r"2 acceptable updates; min_clients=3.*site-1"):
        strict.train()


def test_arguments_of_the_caller_stay_as_they_were(full_llama, lora, tmp_path, monkeypatch):
    owner = SimpleNamespace(initial_adapter=dict, selects=False, evaluate=lambda adapter, residual, weight: {})
    monkeypatch.setattr("fedlpp_hf.trainer.federated.OwnerProcess", lambda blueprint: owner)
    args = make_args(tmp_path, num_rounds=1, max_steps=1, merge=False, base_bits=32, report_to=["none"])
    before, values = dict(vars(args)), copy.deepcopy(args.to_dict())
    trainer = FederatedTrainer(str(full_llama), args, train_dataset=make_rows(), peft_config=lora)
    trainer.train()
    assert vars(args) == before and args.to_dict() == values
    assert args.full_model is None and trainer.args.full_model == str(full_llama)
