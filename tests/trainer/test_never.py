# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Many rounds without a broadcast: each client goes on from its own adapter and sends its whole way from the base."""

import shutil

import pytest
import torch

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.processes.owner_handler import OWNER_DIR
from fedlpp_hf.tensors.adapters import copy_adapter
from fedlpp_hf.trainer.federated import CLIENTS_DIR
from tests.helpers import assert_equal, make_args, make_rows, make_trainer


def test_one_client_ends_where_broadcasts_in_full_precision_take_it(llama_base, lora, tmp_path):
    rows, ends = {"a": make_rows()}, []
    for broadcast in ("never", "every_round"):
        trainer = make_trainer(
            load_base(llama_base), tmp_path / broadcast, lora, train_dataset=rows, num_rounds=3, adapter_bits=32,
            broadcast=broadcast,
        )  # fmt: skip
        trainer.train()
        ends.append(trainer.server.adapter)
    for key, value in ends[0].items():  # sums of three roundings
        torch.testing.assert_close(value, ends[1][key], rtol=1e-4, atol=1e-6)


def test_clients_go_on_and_the_server_takes_the_mean_of_their_ways(llama_base, lora, tmp_path):
    class Watches(FederatedTrainer):
        def train_client(self, task):
            assert task.proxy is None
            update = super().train_client(task)
            seen.setdefault(task.client_id, []).append((copy_adapter(self.guard.parameters), update))
            return update

    seen = {}
    trainer = make_trainer(
        load_base(llama_base), tmp_path, lora, cls=Watches, broadcast="never", num_rounds=3, weighting="uniform"
    )
    trainer.train()
    initial = trainer.guard.initial
    for runs in seen.values():
        for place, (adapter, update) in enumerate(runs):
            for key, value in update.delta.items():
                torch.testing.assert_close(value, adapter[key] - initial[key], rtol=1e-5, atol=1e-7)
            if place:
                assert any(not torch.equal(adapter[key], runs[place - 1][0][key]) for key in adapter)
    for number in (1, 2, 3):
        after, _ = trainer.server.store.load(number)
        for key, value in after.items():
            mean = sum(runs[number - 1][0][key].double() for runs in seen.values()) / len(seen)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    assert all(record["bytes_down"] < 5000 for record in trainer.server.store.records())  # "go on", and nothing else
    assert trainer.server.client_adapter() is None


def test_a_client_without_its_adapter_begins_again(llama_base, lora, tmp_path):
    """As one does that joins late: its way is shorter."""

    class Forgets(FederatedTrainer):
        def train_client(self, task):
            if task.round == 3:
                shutil.rmtree(tmp_path / CLIENTS_DIR)
            norms.append(sum(float(value.norm()) ** 2 for value in super().train_client(task).delta.values()) ** 0.5)
            return self.guard.update

    norms = []
    make_trainer(
        load_base(llama_base), tmp_path, lora, cls=Forgets, broadcast="never", num_rounds=3,
        train_dataset={"a": make_rows()},
    ).train()  # fmt: skip
    assert norms[0] < norms[1] and norms[2] < norms[1]


@pytest.mark.slow
def test_the_owners_variate_goes_on_as_the_clients_do(full_llama, lora, tmp_path):
    """The only client has the owner's rows and seeds, so that the server ends where W alone would, whatever the base."""
    rows = make_rows().remove_columns("client")

    def federate(name, **options):
        args = make_args(
            tmp_path / name, full_model=str(full_llama), adapter_bits=32, base_bits=2, merge=False, broadcast="never",
            num_rounds=2, **options,
        )  # fmt: skip
        return FederatedTrainer(
            str(full_llama),
            args,
            train_dataset={"owner": rows},
            eval_dataset=rows,
            owner_dataset=rows,
            peft_config=lora,
        )

    whole = federate("whole", control_variate=1.0)
    whole.train()
    reference = whole.owner.run_reference(own_rows=True)["eval_loss"]
    assert whole.server.store.records()[-1]["metrics"]["server"]["eval_loss"] == pytest.approx(reference, rel=1e-5)

    cut = federate("cut", control_variate=1.0)
    run = cut.train_client
    cut.train_client = lambda task: run(task) if task.round == 1 else pytest.fail("stopped")
    with pytest.raises(pytest.fail.Exception):
        cut.train()
    lost = tmp_path / "cut" / OWNER_DIR
    shutil.move(lost, tmp_path / "kept")
    resumed = federate("cut", control_variate=1.0)
    with pytest.raises(RuntimeError, match="The owner's adapters of earlier rounds are gone"):
        resumed.train(resume_from_checkpoint=True)
    shutil.rmtree(lost, ignore_errors=True)
    shutil.move(tmp_path / "kept", lost)
    resumed = federate("cut", control_variate=1.0)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.server.adapter, whole.server.adapter)


def test_a_single_round_can_not_be_gone_on_from(llama_base, lora, tmp_path):
    make_trainer(load_base(llama_base), tmp_path, lora, broadcast="never", num_rounds=1).train()
    assert not (tmp_path / CLIENTS_DIR).exists()
    longer = make_trainer(load_base(llama_base), tmp_path, lora, broadcast="never", num_rounds=2)
    with pytest.raises(ValueError, match="begun with num_rounds=1, now it is 2"):
        longer.train(resume_from_checkpoint=True)
