# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client that is held to its own policy: what it does not train, what it does not send, and what it remembers."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers.utils import logging

from fedlpp_hf import QuantizedBaseCallback, load_base
from fedlpp_hf.client.gate import ClientGate
from fedlpp_hf.client.guard import TASK_FILE, UPDATE_FILE
from fedlpp_hf.client.ledger import LEDGER_FILE, ClientLedger
from fedlpp_hf.client.outgoing import describe_update, pack_update
from fedlpp_hf.client.policy import ClientPolicy, PolicyRefusal
from fedlpp_hf.tensors.adapters import global_norm
from fedlpp_hf.wire.compression import decompress_update
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions
from tests.helpers import make_rows, make_trainer, run_client_script, task_of


@pytest.fixture(scope="module")
def trainer(llama_base, tmp_path_factory):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return make_trainer(load_base(llama_base), tmp_path_factory.mktemp("gate"), lora, overwrite=True)


@pytest.fixture
def task(trainer):
    trainer.guard.gate = None
    return task_of(trainer)


def hold(trainer, directory, dry_run=False, **policy):
    trainer.guard.gate = ClientGate(ClientPolicy(**policy), directory, dry_run)


def norm_of(update, reference):
    return global_norm(decompress_update(update.delta, reference))


@pytest.mark.parametrize("clip", [0.0, 1e-3])
@pytest.mark.parametrize("options", [{}, {"update_bits": 2}, {"update_bits": 4, "update_density": 0.1}])
def test_own_clip_stands_whatever_the_task_says(trainer, task, tmp_path, clip, options):
    trainer.guard.memory_dir = tmp_path / "memory"
    task = replace(task, options=LocalOptions(clip_norm=clip, **options))
    hold(trainer, tmp_path, clip_norm=5e-3, check_proxy=False)
    limit = min(5e-3, clip or 1.0)
    for number in (1, 2):  # the second has what compression left of the first
        update = trainer.train_client(ClientTask.from_bytes(replace(task, round=number).to_bytes()))
        assert 0.3 * limit < norm_of(update, trainer.guard.initial) <= limit * (1 + 1e-5)


def test_policy_is_of_one_client(trainer, tmp_path):
    with pytest.raises(ValueError, match="A policy is of one client, and this trainer has 3"):
        trainer.obey(ClientPolicy(), tmp_path)


def test_server_announces_its_clients(trainer, task, tmp_path):
    hold(trainer, tmp_path, min_clients=3)
    trainer.guard.admit(task)
    hold(trainer, tmp_path, min_clients=4)
    with pytest.raises(PolicyRefusal, match="announces num_clients=3; the policy demands at least 4"):
        trainer.guard.admit(task)


def test_task_whose_noise_is_drawn_anew_counts_again(trainer, task, tmp_path):
    """The mean of two answers has half of the noise. Without noise of the client's own, the same task tells nothing new."""
    shared = replace(task, options=replace(task.options, share_noise=4.0))
    for name, asked, rounds in (("plain", task, 1), ("shared", shared, 2)):
        trainer.guard.gate = ClientGate(ClientPolicy(max_rounds=2), tmp_path / name, in_sum=True)
        (tmp_path / name).mkdir()
        for _ in range(2):
            trainer.guard.admit(asked)
        assert len(ClientLedger.open(tmp_path / name).rounds) == rounds
    with pytest.raises(PolicyRefusal, match="has answered 2 rounds, and its policy allows 2"):
        trainer.guard.admit(shared)


def test_without_a_policy_the_task_decides(trainer, task):
    update = trainer.train_client(replace(task, options=LocalOptions(clip_norm=0.0)))
    assert norm_of(update, trainer.guard.initial) > 5e-3


def test_update_above_the_clip_does_not_leave(trainer, task, tmp_path):
    update = trainer.train_client(task)
    gate = ClientGate(ClientPolicy(clip_norm=1e-4), tmp_path)
    with pytest.raises(PolicyRefusal, match=r"norm is .*; the policy's clip is 0.0001"):
        gate.check_update(update, trainer.guard.initial)
    gate = ClientGate(ClientPolicy(), tmp_path)
    gate.check_update(update, trainer.guard.initial)
    with pytest.raises(PolicyRefusal, match=r"metrics \['rows'\]"):
        gate.check_update(replace(update, metrics=update.metrics | {"rows": 1.0}), trainer.guard.initial)
    with pytest.raises(PolicyRefusal, match="not the adapter's change: .*unknown: rows"):
        gate.check_update(replace(update, delta=dict(update.delta) | {"rows": torch.ones(2)}), trainer.guard.initial)


def test_rounds_are_counted_across_restarts_and_federations(trainer, task, tmp_path):
    for number, federation in ((1, task.federation_id), (1, "renamed")):
        hold(trainer, tmp_path, max_rounds=2)  # a new process would read the same files
        trainer.train_client(replace(task, round=number, federation_id=federation))
    hold(trainer, tmp_path, max_rounds=2)
    with pytest.raises(PolicyRefusal, match="answered 2 rounds, and its policy allows 2"):
        trainer.train_client(replace(task, federation_id="renamed again"))
    assert len(ClientLedger.open(tmp_path).rounds) == 2
    trainer.train_client(replace(task, federation_id="renamed"))  # this very task again: its answer tells nothing new


def test_run_that_crashes_counts(trainer, task, tmp_path, monkeypatch):
    hold(trainer, tmp_path, max_rounds=1)
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train_client(task)
    with pytest.raises(PolicyRefusal, match="answered 1 rounds"):
        trainer.train_client(replace(task, round=2))


def test_a_round_has_one_task(trainer, task, tmp_path):
    hold(trainer, tmp_path)
    first = trainer.train_client(task)
    repeated = trainer.train_client(task)  # as a resumed server asks
    assert all(torch.equal(first.delta[key], repeated.delta[key]) for key in first.delta)
    with pytest.raises(PolicyRefusal, match="Round 1 was answered already"):
        trainer.train_client(replace(task, seed=task.seed + 1))


def test_crafted_adapter_is_not_trained_on(trainer, task, tmp_path):
    hold(trainer, tmp_path)
    proxy = {key: torch.zeros_like(value) for key, value in trainer.guard.initial.items()}
    with pytest.raises(PolicyRefusal, match=r"looks made to leak: .*all zero.*check_proxy: false"):
        trainer.train_client(replace(task, proxy=proxy))
    assert not ClientLedger.open(tmp_path).rounds  # nothing was answered
    hold(trainer, tmp_path, check_proxy=False)
    trainer.train_client(replace(task, proxy=proxy))


def test_steps_are_those_of_the_run(trainer, task, tmp_path):
    hold(trainer, tmp_path, min_local_steps=3)
    with pytest.raises(PolicyRefusal, match="would have 2 steps; the policy allows 3 to inf"):
        trainer.train_client(task)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}', '{"schema": 1, "more": 1}'])
def test_damaged_ledger_is_not_replaced_by_an_empty_one(tmp_path, text):
    (tmp_path / LEDGER_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"ledger\.json` can't be read"):
        ClientGate(ClientPolicy(), tmp_path)


def test_dry_run_counts_and_writes_nothing(trainer, task, tmp_path):
    hold(trainer, tmp_path, dry_run=True, max_rounds=1)
    update = trainer.train_client(task)
    assert not list(tmp_path.iterdir())
    text = describe_update(update, trainer.guard.initial)
    assert (
        f"{update.num_bytes:,} bytes would leave" in text and f"{norm_of(update, trainer.guard.initial):.6g}" in text
    )
    for key, tensor in update.delta.items():
        first = ", ".join(f"{value:.4g}" for value in tensor.flatten()[:3].tolist())
        assert (
            f"| {key} | {tensor.shape[0]} × {tensor.shape[1]} | float32 | {float(tensor.norm()):.4g} | {first} |"
            in text
        )
    assert "| num_examples | 8 |" in text and "| metric steps | 2 |" in text


@pytest.mark.parametrize(("density", "form"), [(1.0, "4 bits"), (0.1, "4 bits, 26 places")])
def test_compressed_update_is_described_as_it_is_sent(trainer, density, form):
    key = next(key for key in trainer.guard.initial if "lora_A" in key)
    delta = {key: torch.randn(4, 64, generator=torch.Generator().manual_seed(0))}
    payload, _ = pack_update(delta, LocalOptions(update_bits=4, update_density=density), {})
    update = ClientUpdate("f", 1, "site", "a" * 64, 8, payload, {})
    assert f"| {key} | 4 × 64 | {form} |" in describe_update(update, trainer.guard.initial)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"adapter_bits": 2, "update_bits": 4, "server_momentum": 0.9, "num_rounds": 5},
        {"adapter_bits": 1, "aggregation": "freeze_a"},
        {"aggregation": "exact", "num_rounds": 5},
        {
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "clients_per_round": 1,
        },
    ],
    ids=str,
)
def test_honest_federation_is_not_refused(llama_base, tmp_path, options):
    """All clients with a policy, over all linear layers; and one that resumes after its third round."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"num_rounds": 4, "adapter_block_size": 64, "weighting": "uniform"} | options

    def run(stop=None, resume=False):
        trainer = make_trainer(load_base(llama_base), tmp_path / "out", lora, **options)
        gates = {}

        def train(tasks):
            for task in tasks:
                if task.round == stop:
                    raise KeyboardInterrupt
                gates.setdefault(task.client_id, ClientGate(ClientPolicy(max_rounds=6), tmp_path / task.client_id))
                trainer.guard.gate = gates[task.client_id]
                yield trainer.train_client(ClientTask.from_bytes(task.to_bytes()))

        trainer.train_remotely(train, dict.fromkeys(trainer.client_datasets, 8), resume)
        return trainer.server.store.records()

    with pytest.raises(KeyboardInterrupt):
        run(stop=4)
    records = run(resume=True)
    assert len(records) == options["num_rounds"] + 1 and not any(record["rejected"] for record in records)


class TestScript:
    """A user's own script, by files and the callback."""

    def run(self, llama_base, lora, tmp_path, monkeypatch, **options):
        monkeypatch.setattr(
            "tests.helpers.QuantizedBaseCallback", lambda **dirs: QuantizedBaseCallback(**dirs, **options)
        )
        (tmp_path / "out").mkdir(exist_ok=True)
        run_client_script(llama_base, lora, tmp_path, tmp_path / "out", make_rows(8))
        return tmp_path / "out" / UPDATE_FILE

    def test_policy(self, trainer, task, llama_base, lora, tmp_path, monkeypatch):
        (tmp_path / "policy.yaml").write_text("clip_norm: 1e-3\nmax_rounds: 1\n")
        options = {"memory_dir": tmp_path / "memory", "policy": tmp_path / "policy.yaml"}
        (tmp_path / TASK_FILE).write_bytes(task.to_bytes())
        update = ClientUpdate.from_bytes(self.run(llama_base, lora, tmp_path, monkeypatch, **options).read_bytes())
        assert norm_of(update, trainer.guard.initial) == pytest.approx(1e-3, rel=1e-4)
        (tmp_path / TASK_FILE).write_bytes(replace(task, client_id="renamed").to_bytes())
        with pytest.raises(PolicyRefusal, match="another one"):
            self.run(llama_base, lora, tmp_path, monkeypatch, **options)

    def test_dry_run(self, task, llama_base, lora, tmp_path, monkeypatch, caplog):
        (tmp_path / TASK_FILE).write_bytes(task.to_bytes())
        logging.enable_propagation()
        try:
            assert not self.run(llama_base, lora, tmp_path, monkeypatch, dry_run=True).exists()
        finally:
            logging.disable_propagation()
        assert "nothing is sent" in caplog.text and "lora_A.weight | 4 × 64 | float32" in caplog.text

    def test_ledger_needs_a_directory(self):
        with pytest.raises(ValueError, match="`policy` needs `memory_dir`"):
            QuantizedBaseCallback("in", "out", policy=ClientPolicy())
