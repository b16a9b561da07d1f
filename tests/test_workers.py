# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients side by side: the same bits as one after the other, and one that dies or hangs costs its client alone."""

import os
import time
from pathlib import Path

import pytest
import torch

from fedlpp_hf import FederatedTrainer
from fedlpp_hf.workers import as_bytes, as_tensor

from .conftest import make_rows
from .test_trainer import make_args, make_trainer


class FragileTrainer(FederatedTrainer):
    """Its run of client site-1 ends its process, or never ends, as `FRAGILE` says."""

    def train_client(self, task):
        if task.client_id == "site-1":
            if os.environ.get("FRAGILE") == "dies":
                os._exit(3)
            if os.environ.get("FRAGILE") == "hangs":
                time.sleep(600)
            if os.environ.get("FRAGILE") == "fails":
                raise ValueError("the disk is full")
        return super().train_client(task)


@pytest.mark.parametrize(
    "options", [{}, {"update_bits": 4}, {"broadcast": "never", "num_train_epochs": 1, "max_steps": -1}]
)
def test_any_number_of_workers_ends_in_the_same_bits(llama_base, lora, tmp_path, monkeypatch, options):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for each worker, as the tests have
    ends = []
    for count in (1, 2):
        trainer = make_trainer(llama_base, tmp_path / str(count), lora, client_workers=count, **options)
        trainer.train()
        ends.append(trainer.server.adapter)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert any(value.abs().sum() > 0 for key, value in ends[0].items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("fragility", "reason"),
    [
        ("dies", "died during `train` (exit code 3)"),
        ("hangs", "longer than client_timeout=8 seconds"),
        ("fails", "the disk is full"),
    ],
)
def test_a_worker_that_is_lost_costs_its_client_alone(llama_base, lora, tmp_path, monkeypatch, fragility, reason):
    monkeypatch.setenv("FRAGILE", fragility)
    timeout = 8 if fragility == "hangs" else None
    trainer = make_trainer(
        llama_base, tmp_path, lora, FragileTrainer, client_workers=2, client_timeout=timeout, num_rounds=1
    )
    trainer.train()
    (record,) = trainer.server.store.records()[1:]
    assert set(record["clients"]) == {"site-0", "site-2"}
    assert reason in record["rejected"]["site-1"]


def test_a_round_that_closes_early_leaves_no_answer_for_the_next(llama_base, lora, tmp_path):
    trainer = make_trainer(
        llama_base, tmp_path, lora, client_workers=2, clients_per_round=1, over_sample=1.0, num_rounds=2
    )
    trainer.train()
    for record in trainer.server.store.records()[1:]:
        assert len(record["clients"]) == 1
        assert set(record["rejected"].values()) <= {"the round closed without it"}


def test_owners_things_stay_out_of_workers(full_llama, lora, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fedlpp_hf.trainer.ClientWorkers", lambda blueprint, *_: seen.append(blueprint))
    rows = make_rows()
    trainer = FederatedTrainer(
        str(full_llama),
        make_args(tmp_path, client_workers=2),
        train_dataset=rows,
        eval_dataset=rows,
        owner_dataset=rows,
        peft_config=lora,
    )
    with pytest.raises(AttributeError):
        trainer.train()
    trainer.owner.close()
    assert seen[0].owner_dataset is None and seen[0].full_model == ""
    assert Path(seen[0].base_dir).name == "base"


def test_what_workers_need(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="client_timeout needs client_workers"):
        make_args(tmp_path, client_timeout=3)
    with pytest.raises(ValueError, match="client_workers=0; expected a positive number"):
        make_args(tmp_path, client_workers=0)


def test_bytes_travel_as_a_tensor():
    assert as_bytes(as_tensor(b"\x00\xff update")) == b"\x00\xff update"
