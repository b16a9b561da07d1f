# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Identities of the federated trainer: with itself interrupted, with the plain Trainer, with fewer clients."""

import gc

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from fedlpp_hf import FederatedTrainer, RoundStore, load_base
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, read_adapter
from tests.helpers import assert_equal, make_rows, make_trainer, task_of


def load_full(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def test_frozen_or_not_is_the_same(llama_base, lora, tmp_path):
    """`train()` freezes what lives long, `train_client` alone does not; neither changes a bit."""
    trainer = make_trainer(llama_base, tmp_path, lora)
    task = task_of(trainer)
    thawed = trainer.train_client(task).delta
    gc.freeze()
    frozen = trainer.train_client(task).delta
    gc.unfreeze()
    assert_equal(thawed, frozen)


def test_one_client_without_quantization_is_plain_trainer(full_llama, lora, tmp_path):
    rows = make_rows(clients=1)
    lora.lora_dropout = 0.1  # so that the random numbers matter, too
    federated = make_trainer(
        load_full(full_llama),
        tmp_path / "f",
        lora,
        train_dataset=rows,
        num_rounds=1,
        max_steps=3,
        base_bits=32,
        adapter_bits=32,
    )
    ends = []
    run = federated.train_client

    def spy(task):
        update = run(task)
        ends.append(copy_adapter(federated.guard.parameters))
        return update

    federated.train_client = spy
    federated.train()
    task = task_of(
        make_trainer(
            load_full(full_llama),
            tmp_path / "t",
            lora,
            train_dataset=rows,
            num_rounds=1,
            base_bits=32,
            adapter_bits=32,
        )
    )

    set_seed(federated.args.seed)
    model = get_peft_model(load_full(full_llama), lora)
    args = TrainingArguments(
        str(tmp_path / "p"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        seed=task.seed, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()

    plain = copy_adapter(adapter_parameters(model))
    assert_equal(*ends, plain)
    for key, value in federated.server.adapter.items():  # θ₀ + (θ₁ − θ₀) may differ in the last bit
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-8)
        if "lora_B" in key:
            assert torch.equal(value, plain[key])


def test_equal_clients_are_any_one_of_them(llama_base, lora, tmp_path):
    rows = make_rows(8)
    # Rows in order, no dropout: then equal data are equal runs, whatever a client's seed.
    options = {"train_sampling_strategy": "sequential", "num_rounds": 2}
    many = make_trainer(
        load_base(llama_base), tmp_path / "many", lora, train_dataset=dict.fromkeys("abcd", rows), **options
    )
    one = make_trainer(load_base(llama_base), tmp_path / "one", lora, train_dataset={"b": rows}, **options)
    many.train()
    one.train()
    assert_equal(many.server.adapter, one.server.adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"server_momentum": 0.9, "clients_per_round": 2},
        {"broadcast": "never", "num_rounds": 1},
        {"broadcast": "never", "num_rounds": 3, "clients_per_round": 2, "update_bits": 4},
        {"learning_rate_horizon": "federation", "adapter_bits": 2},
        {"update_bits": 2, "update_density": 0.5, "server_optimizer": "yogi", "server_learning_rate": 0.05},
        {"aggregation": "exact"},
    ],
    ids=["momentum", "never", "never, in rounds", "horizon", "compressed", "exact"],
)
def test_resumed_is_uninterrupted(llama_base, lora, tmp_path, monkeypatch, options):
    monkeypatch.setattr("fedlpp_hf.aggregation.exact.RESIDUAL_RANK", 3)  # so that a part is dropped in each round
    options = {"num_rounds": 4, "max_steps": 1, **options}
    last = min(3, options["num_rounds"])
    whole = make_trainer(load_base(llama_base), tmp_path / "whole", lora, **options)
    whole.train()

    class Dies(FederatedTrainer):
        def train_client(self, task):
            update = super().train_client(task)
            if task.round == last:
                raise KeyboardInterrupt
            return update

    with pytest.raises(KeyboardInterrupt):
        make_trainer(load_base(llama_base), tmp_path / "cut", lora, cls=Dies, **options).train()
    assert RoundStore(tmp_path / "cut").latest() == last - 1
    resumed = make_trainer(load_base(llama_base), tmp_path / "cut", lora, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.server.adapter, whole.server.adapter)
    assert_equal(read_adapter(tmp_path / "cut")[0], read_adapter(tmp_path / "whole")[0])


def test_runs_are_deterministic_and_clients_differ(llama_base, lora, tmp_path):
    orders: dict[str, list] = {}

    class Watches(FederatedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            orders.setdefault(f"{self.guard.task.round}/{self.guard.task.client_id}", []).append(
                inputs["input_ids"][:, 0].tolist()
            )
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = make_rows(8)
    trainer = make_trainer(
        load_base(llama_base), tmp_path / "a", lora, cls=Watches, train_dataset={"a": rows, "b": rows}
    )
    trainer.train()
    first = dict(orders)
    assert len({str(order) for order in first.values()}) == 4  # two rounds of two clients, each its own order
    orders.clear()
    again = make_trainer(
        load_base(llama_base), tmp_path / "b", lora, cls=Watches, train_dataset={"a": rows, "b": rows}
    )
    again.train()
    assert orders == first
    assert_equal(trainer.server.adapter, again.server.adapter)


def test_learning_rate_horizon(llama_base, lora, tmp_path):
    class Rates(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            self.seen.append(optimizer.param_groups[0]["lr"])

    seen = {}
    for horizon in ("round", "federation"):
        rates = Rates()
        trainer = make_trainer(
            load_base(llama_base), tmp_path / horizon, lora, train_dataset={"a": make_rows(8)}, num_rounds=3,
            learning_rate_horizon=horizon, learning_rate=0.6,
        )  # fmt: skip
        trainer.add_callback(rates)
        trainer.train()
        seen[horizon] = rates.seen
    assert seen["round"] == pytest.approx([0.6, 0.3] * 3)
    assert seen["federation"] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_never_broadcasting_averages_the_clients(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, broadcast="never", num_rounds=1)
    updates = []
    run = trainer.train_client

    def spy(task):
        assert task.proxy is None
        update = run(task)
        updates.append(update)
        return update

    trainer.train_client = spy
    trainer.train()
    mean = {key: sum(update.delta[key].double() for update in updates) / len(updates) for key in updates[0].delta}
    for key, value in trainer.server.adapter.items():
        torch.testing.assert_close(
            value.double(), trainer.guard.initial[key].double() + mean[key], rtol=1e-5, atol=1e-8
        )
