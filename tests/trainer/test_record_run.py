# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Local runs as DP-SGD: what they are without noise and clip, what they spend, and what they are refused for."""

import logging as python_logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.utils import logging

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.client.gate import ClientGate
from fedlpp_hf.client.ledger import ClientLedger
from fedlpp_hf.client.outgoing import describe_update
from fedlpp_hf.client.policy import ClientPolicy, PolicyRefusal
from fedlpp_hf.privacy.record_accounting import compute_record_epsilon
from fedlpp_hf.report.text import describe_round
from fedlpp_hf.trainer import record_run
from tests.helpers import assert_equal, make_rows, make_sft_classes, make_tokenizer, make_trainer, task_of


pytest.importorskip("opacus", reason="needs the extra `privacy`")

BUDGET = {"record_epsilon": 4.0, "record_delta": 1e-3}


@pytest.fixture
def make(llama_base, lora, tmp_path):
    def make(directory="out", **options):
        return make_trainer(load_base(llama_base), tmp_path / directory, lora, **{**BUDGET, **options})

    return make


def hide_noise(monkeypatch):
    monkeypatch.setattr(record_run, "solve_record_noise", lambda *args: 1e-12)
    monkeypatch.setattr(record_run, "compute_record_epsilon", lambda *args: 1.0)


def train(trainer, task, seed=0):
    trainer.read_bytes = np.random.default_rng(seed).bytes
    return trainer.train_client(task)


def test_without_noise_clip_and_sampling_it_is_the_trainer(make, monkeypatch):
    """All 8 rows of a client in each step: the plain Trainer's batch, whose order does not matter."""
    hide_noise(monkeypatch)
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "per_device_train_batch_size": 8}
    plain = make("plain", **options, record_epsilon=None, record_delta=None)
    private = make("private", **options, record_clip=1e6)
    task = task_of(plain)
    wanted, found = plain.train_client(task), train(private, task)
    for key, delta in wanted.delta.items():
        torch.testing.assert_close(found.delta[key], delta, rtol=1e-3, atol=1e-6)
    assert any(delta.norm() > 1e-3 for delta in wanted.delta.values())
    assert math.isnan(found.metrics["loss"]) and not math.isnan(wanted.metrics["loss"])


def test_accumulation_and_empty_batches_do_not_change_a_step(make, monkeypatch):
    """The same draws, whole or in parts; at a rate of 1 in 8, many steps draw no row at all."""
    hide_noise(monkeypatch)
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 12}
    one = make("one", **options, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    four = make("four", **options, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    task = task_of(one)
    left, right = train(one, task), train(four, task)
    for key, delta in left.delta.items():
        torch.testing.assert_close(right.delta[key], delta, rtol=1e-3, atol=1e-6)
    single = make("single", **options, per_device_train_batch_size=1)
    assert train(single, task).metrics["steps"] == 12


def test_epsilon_is_that_of_all_rounds_and_stays_in_the_budget(make, caplog):
    trainer = make(num_rounds=3, client_workers=1)
    logging.enable_propagation()
    try:
        with caplog.at_level(python_logging.WARNING):
            trainer.train()
    finally:
        logging.disable_propagation()
    records = trainer.server.store.records()[1:]
    noises = {client["record_noise_multiplier"] for record in records for client in record["clients"].values()}
    assert len(noises) == 1 and not any(record["rejected"] for record in records)
    for number, record in enumerate(records, 1):
        wanted = compute_record_epsilon([(min(noises), 4 / 8, 2)] * number, 1e-3)
        assert {client["record_epsilon"] for client in record["clients"].values()} == {wanted}
        assert all(math.isnan(client["loss"]) for client in record["clients"].values())
    assert 3.9 < wanted <= 4.0
    assert f"| clients' rows: ε up to {wanted:.3g} |" in describe_round(records[-1], 3)
    assert "Round 3, client 'site-0': ε of each row is" in caplog.text and "of 4 after this run" in caplog.text


@pytest.mark.slow
def test_budget_is_kept_across_processes_and_a_repeated_round_counts(make):
    trainer = make(num_rounds=2)
    task = task_of(trainer)
    first = train(trainer, task)
    second = train(
        make(num_rounds=2), task, seed=1
    )  # a server that has lost the first, and a client that was restarted
    assert any(not torch.equal(first.delta[key], second.delta[key]) for key in first.delta)  # noise was drawn anew
    assert second.metrics["record_epsilon"] > first.metrics["record_epsilon"]
    with pytest.raises(
        PolicyRefusal, match=r"would bring the rows' ε to .*; record_epsilon is 4 .*The budget is spent"
    ):
        train(make(num_rounds=2), replace(task, round=2))


@pytest.mark.slow
def test_run_that_crashes_is_paid_for(make, monkeypatch):
    trainer = make(num_rounds=1)
    task = task_of(trainer)
    monkeypatch.setattr(record_run.RecordGradients, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(trainer, task)
    monkeypatch.undo()
    with pytest.raises(PolicyRefusal, match="The budget is spent"):
        train(trainer, task)


@pytest.mark.slow
def test_resumed_round_that_noise_was_drawn_for_counts(make):
    """The server dies after the first client of the last round: its rows have no budget left, and the others go on."""
    trainer = make(num_rounds=2)

    def train_some(tasks):
        for task in tasks:
            yield trainer.train_client(task)
            if task.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train_remotely(train_some, dict.fromkeys(trainer.client_datasets, 8))
    trainer = make(num_rounds=2)
    trainer.train(resume_from_checkpoint=True)
    last = trainer.server.store.records()[-1]
    assert list(last["rejected"]) == ["site-0"] and "The budget is spent" in last["rejected"]["site-0"]
    assert all(3.5 < client["record_epsilon"] <= 4.0 for client in last["clients"].values())


@pytest.mark.slow
def test_policy_decides_and_not_the_configuration(make, tmp_path):
    trainer = make(record_epsilon=None, record_delta=None)
    task = task_of(trainer)

    def hold(dry_run=False):
        policy = ClientPolicy(clip_norm=1.0, max_rounds=2, record_epsilon=2.0, record_delta=1e-3, record_clip=0.1)
        trainer.guard.gate = ClientGate(policy, tmp_path / "ledger", dry_run)

    hold(dry_run=True)
    assert "metric record_epsilon" in describe_update(train(trainer, task), trainer.guard.initial)
    assert not (tmp_path / "ledger").exists()
    hold()
    update = train(trainer, task)
    [spent] = ClientLedger.open(tmp_path / "ledger").record
    assert update.metrics["record_noise_multiplier"] == spent[0]
    assert update.metrics["record_epsilon"] == compute_record_epsilon([tuple(spent)], 1e-3) < 2.0
    hold()  # another process
    train(trainer, task)  # the very same task is no new round, but its noise is new
    with pytest.raises(PolicyRefusal, match="The budget is spent"):
        train(trainer, task)


def test_noise_is_not_of_the_tasks_seed(make):
    trainer = make()
    task = task_of(trainer)
    with pytest.raises(AssertionError):
        assert_equal(trainer.train_client(task).delta, trainer.train_client(task).delta)


def test_dropout_is_not_of_the_tasks_seed(make, monkeypatch):
    """Known masks that move with every row before them would be known differences between neighbours."""
    hide_noise(monkeypatch)
    trainer, seen = make(per_device_train_batch_size=8, max_steps=1), []
    finish = record_run.RecordGradients.finish
    monkeypatch.setattr(record_run.RecordGradients, "finish", lambda self: seen.append(torch.rand(4)) or finish(self))
    task = task_of(trainer)
    for _ in range(2):
        trainer.train_client(task)
    assert not torch.equal(*seen)


class OwnLoss(FederatedTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls": OwnLoss}, "OwnLoss has a `compute_loss` of its own"),
        ({"compute_loss_func": lambda *args, **kwargs: None}, "compute_loss_func"),
        ({"record_delta": 0.2}, r"record_delta=0.2 for 8 rows; expected less than 1.2e-01"),
    ],
    ids=["own compute_loss", "loss function", "large delta"],
)
def test_trainer_that_is_refused(make, options, message):
    compute_loss_func = options.pop("compute_loss_func", None)
    trainer = make(**options)
    trainer.compute_loss_func = compute_loss_func
    with pytest.raises(ValueError, match=message):
        trainer.train_client(task_of(trainer))


def test_trainer_is_refused_before_the_first_round(make):
    with pytest.raises(ValueError, match="OwnLoss has a `compute_loss` of its own"):
        make(cls=OwnLoss).train()


def test_several_ranks_are_refused(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="with 2 ranks: each would draw"):
        trainer.check_record_training()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_delta": None}, "record_epsilon=4.0 and record_delta=None come together"),
        ({"record_epsilon": 0.0}, "record_epsilon=0.0; expected a positive number"),
        ({"record_clip": 0.0}, "record_clip=0.0; expected a positive number"),
        ({"record_delta": 1.0}, "record_delta=1.0; expected a number below 1"),
        ({"control_variate": 1.0}, "control_variate=1.0 does not go with record-level"),
        ({"logit_adjustment": 1.0}, "logit_adjustment=1.0 does not go with record-level"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True does not go with"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True does not go with"),
    ],
)
def test_options_that_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_attackers_of_the_audit_train_as_they_like(make):
    trainer = make()
    update = trainer.train_client(task_of(trainer), rows=make_rows(8))
    assert not math.isnan(update.metrics["loss"]) and "record_epsilon" not in update.metrics


@pytest.mark.slow
def test_sft(llama_base, lora, tmp_path, monkeypatch):
    """TRL's own loss, on rows of different lengths."""
    config_class, trainer_class = make_sft_classes()
    hide_noise(monkeypatch)
    rows = make_rows().map(lambda row, place: {"input_ids": row["input_ids"][: 4 + place % 9]}, with_indices=True)
    rows = rows.remove_columns(["labels", "attention_mask"])
    args = config_class(
        str(tmp_path), num_rounds=1, partition="client", max_steps=2, use_cpu=True, report_to=[], max_length=16, bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4, **BUDGET,
    )  # fmt: skip
    trainer = trainer_class(
        load_base(llama_base), args, train_dataset=rows, peft_config=lora, processing_class=make_tokenizer()
    )
    update = trainer.train_client(task_of(trainer))
    assert update.metrics["record_epsilon"] == 1.0
