# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients that fail, and clients whose rows are not a Dataset."""

import pytest
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.trainer.ranks import check_launch
from fedlpp_hf.wire.messages import ClientFailure
from tests.helpers import assert_equal, make_args, make_rows, make_trainer


class Fails(FederatedTrainer):
    """The run of one client raises in its second step, in the middle of everything."""

    error: BaseException = RuntimeError("out of memory")

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.guard.task.client_id == "site-1" and self.state.global_step == 1:
            raise self.error
        return loss


class Skips(FederatedTrainer):
    """The same client has no run at all."""

    def train_clients(self, tasks):
        for task in tasks:
            skipped = task.client_id == "site-1"
            yield ClientFailure("site-1", "as planned") if skipped else self.train_client(task)


@pytest.mark.parametrize("options", [{}, {"neftune_noise_alpha": 5.0}, {"gradient_checkpointing": True}], ids=str)
def test_a_run_that_raises_costs_its_client_alone(llama_base, lora, tmp_path, caplog, options):
    failed, skipped = (
        make_trainer(
            load_base(llama_base), tmp_path / cls.__name__, lora, cls=cls, eval_dataset=make_rows(), **options
        )
        for cls in (Fails, Skips)
    )
    failed.train()
    skipped.train()
    for record in failed.server.store.records()[1:]:
        assert record["rejected"] == {"site-1": "its run failed: RuntimeError: out of memory"}
        assert sorted(record["clients"]) == ["site-0", "site-2"]
    assert "in training_step" in caplog.text  # with the traceback, for whoever wrote it
    # The clients after it train as if it had not been there.
    assert_equal(dict(failed.server.adapter), dict(skipped.server.adapter))
    metrics = [trainer.server.store.records()[-1]["metrics"] for trainer in (failed, skipped)]
    assert metrics[0] == metrics[1]


class RaisesAtTheEnd(TrainerCallback):
    """A user's callback that fails when a local run is over: each run has one `on_train_end`, in order of the clients."""

    def __init__(self):
        self.ends = 0

    def on_train_end(self, args, state, control, **kwargs):
        self.ends += 1
        if self.ends == 2:
            raise OSError("disk full")


def test_a_callback_that_raises_costs_its_client_alone(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    trainer.add_callback(RaisesAtTheEnd())
    trainer.train()
    first, second = trainer.server.store.records()[1:]
    assert first["rejected"] == {"site-1": "its run failed: OSError: disk full"} and not second["rejected"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_ends_the_federation(llama_base, lora, tmp_path, error):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, cls=Fails)
    trainer.error = error()
    with pytest.raises(error):
        trainer.train()
    assert trainer.server.store.latest() == 0


def test_when_all_runs_fail_the_message_says_why(llama_base, lora, tmp_path):
    rows = make_rows()
    trainer = FederatedTrainer(
        load_base(llama_base), make_args(tmp_path), train_dataset=rows, peft_config=lora,
        data_collator=lambda rows: rows[0]["no such column"],
    )  # fmt: skip
    with pytest.raises(
        RuntimeError, match="Round 1 has 0 acceptable updates.*site-0: its run failed: KeyError: 'no such"
    ):
        trainer.train()


def test_a_run_that_spoils_the_base_ends_the_federation(llama_base, lora, tmp_path):
    class Spoils(FederatedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                next(p for _, p in self.guard.frozen if p.is_floating_point()).add_(1)
            raise ValueError("as planned")

    with pytest.raises(RuntimeError, match="The base differs from what it was before training"):
        make_trainer(load_base(llama_base), tmp_path, lora, cls=Spoils).train()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def strip(rows):
    return [{name: row[name] for name in ("input_ids", "labels", "attention_mask")} for row in rows]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: rows.to_iterable_dataset(),
        lambda rows: Stream(strip(rows)),
        strip,
        lambda rows: Subset(strip(rows), range(8)),
    ],
    ids=["streamed Dataset", "torch IterableDataset", "list", "Subset"],
)
def test_clients_train_on_what_trainers_take(llama_base, lora, tmp_path, wrap):
    rows = make_rows(8)
    trainer = make_trainer(
        load_base(llama_base), tmp_path, lora, train_dataset={7: wrap(rows), "b": rows}, num_rounds=1
    )
    trainer.train()
    clients = trainer.server.store.records()[1]["clients"]
    assert {name: (client["num_examples"], client["steps"]) for name, client in clients.items()} == {
        "7": (8, 2),
        "b": (8, 2),
    }
    assert trainer.server.num_examples["b"] == 8
    trainer.create_model_card()  # which does not count what streams
    assert ("examples of all clients" in (tmp_path / "README.md").read_text()) == hasattr(wrap(rows), "__len__")
    # Two steps of four rows each are all of a stream of eight; and what is a list has the order of a Dataset.
    if isinstance(wrap(rows), (list, Subset)):
        plain = make_trainer(
            load_base(llama_base), tmp_path / "plain", lora, train_dataset={"7": rows, "b": rows}, num_rounds=1
        )
        plain.train()
        assert_equal(dict(trainer.server.adapter), dict(plain.server.adapter))


def test_resumed_stream_is_the_same_client(llama_base, lora, tmp_path):
    data = {"a": make_rows(8).to_iterable_dataset()}
    make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data, num_rounds=1).train()
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data)
    trainer.train(resume_from_checkpoint="true")
    assert trainer.server.store.latest() == 2
    other = make_trainer(load_base(llama_base), tmp_path, lora, train_dataset={"a": make_rows(8)}, num_rounds=3)
    with pytest.raises(ValueError, match="Client 'a' had an unknown number of rows .* and now has 8 rows"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize(
    "launched, refused", [(None, False), ("", False), ("1", False), ("2", True), ("8", True), ("nonsense", False)]
)
def test_launch_in_which_each_process_is_alone_is_refused(lora, tmp_path, monkeypatch, variable, launched, refused):
    """As with FSDP or DeepSpeed on a machine where the Trainer does not take part in the launch."""
    args = make_args(tmp_path)
    monkeypatch.delenv(variable, raising=False)
    if launched is not None:
        monkeypatch.setenv(variable, launched)
    if not refused:
        return check_launch(args)
    with pytest.raises(ValueError, match=rf"{launched} processes were launched .{variable}., .* world has 1"):
        FederatedTrainer("no/such/model", args, train_dataset=make_rows(), peft_config=lora)
    assert not (tmp_path / "_federation").exists()
    return None
