# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients side by side: the same bits as one after the other, and one that dies or hangs costs its client alone."""

import os
import time
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import EarlyStoppingCallback

from fedlpp_hf import FederatedCallback, FederatedTrainer, load_base
from fedlpp_hf.client.guard import BaseMovedError
from fedlpp_hf.processes.workers import ClientWorkers, WorkerHandler, as_bytes, as_tensor, share_gpus
from fedlpp_hf.wire.messages import ClientFailure, ClientTask, ClientUpdate
from tests.helpers import assert_equal, make_args, make_rows, make_trainer


class FragileTrainer(FederatedTrainer):
    """Its run of one client ends the process."""

    def train_client(self, task, rows=None):
        if task.client_id == "site-0":
            os._exit(3)
        return super().train_client(task, rows)


class HangingTrainer(FederatedTrainer):
    """Its run of one client never ends."""

    def train_client(self, task, rows=None):
        if task.client_id == "site-1":
            time.sleep(600)
        return super().train_client(task, rows)


class FailingTrainer(FederatedTrainer):
    """Its run of one client raises, and that of another changes the base, where it is said to."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.guard.task.client_id == "site-1":
            raise KeyError("no such row")
        if self.guard.task.client_id == "site-2" and self.args.run_name == "spoils":
            with torch.no_grad():
                next(p for _, p in self.guard.frozen if p.is_floating_point()).add_(1)
        return super().compute_loss(model, inputs, *args, **kwargs)


class Pushes(FederatedCallback):
    """Changes what a client trains, and hears of rounds."""

    def __init__(self):
        self.heard = []

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)

    def on_client_begin(self, args, state, control, *, round_number, client_id, **kwargs):
        self.heard.append((round_number, client_id, "begins"))

    def on_client_end(self, args, state, control, *, round_number, client_id, metrics, reason, **kwargs):
        self.heard.append((round_number, client_id, reason))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.heard.append(state.global_step)


def test_any_number_of_workers_ends_in_the_same_bits(llama_base, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for each worker, as the tests have
    ends, heard = [], []
    for count in (1, 2):  # error feedback: what a client remembers is there for the next worker that trains it
        trainer = make_trainer(llama_base, tmp_path / str(count), lora, client_workers=count, update_bits=4)
        callback = Pushes()  # a worker has a copy for its local runs; rounds are heard of here
        trainer.add_callback(callback)
        trainer.add_callback(EarlyStoppingCallback())  # of rounds alone: a worker has no use for it
        trainer.eval_dataset, trainer.args.metric_for_best_model = make_rows(8), "loss"
        trainer.args.greater_is_better = True
        trainer.train()
        ends.append(trainer.server.adapter)
        heard.append(callback.heard)
    assert_equal(*ends)
    assert sorted(map(str, heard[0])) == sorted(map(str, heard[1])) and len(heard[0]) >= 7
    assert any(value.abs().sum() > 0 for key, value in ends[0].items() if "lora_B" in key)


def test_a_worker_that_dies_costs_its_client_alone(llama_base, lora, tmp_path):
    trainer = make_trainer(llama_base, tmp_path, lora, FragileTrainer, client_workers=2, num_rounds=1)
    trainer.train()
    (record,) = trainer.server.store.records()[1:]
    assert set(record["clients"]) == {"site-1", "site-2"}
    assert set(record["rejected"]) == {"site-0"}
    assert "died during `train` (exit code 3)" in record["rejected"]["site-0"]


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (KeyError("no such row"), {"reason": "its run failed: KeyError: 'no such row'", "base_moved": False}),
        (BaseMovedError("it moved"), {"reason": "it moved", "base_moved": True}),
    ],
    ids=["a run that raises", "a base that moved"],
)
def test_a_worker_answers_why_there_is_no_update(monkeypatch, error, answer):
    def fail(task):
        raise error

    monkeypatch.setattr(ClientTask, "from_bytes", lambda data: None)
    handler = object.__new__(WorkerHandler)
    handler.trainer = SimpleNamespace(train_client=fail)
    assert handler.train({"task": as_tensor(b"task")}) == (answer, {})


@pytest.mark.slow
def test_a_run_that_raises_is_the_same_in_a_worker(llama_base, lora, tmp_path):
    """As with one client after the other: the client alone, with the same words, or the federation, for a base that moved."""
    trainer = make_trainer(llama_base, tmp_path / "a", lora, FailingTrainer, client_workers=2, num_rounds=1)
    trainer.train()
    (record,) = trainer.server.store.records()[1:]
    assert set(record["clients"]) == {"site-0", "site-2"}
    assert record["rejected"] == {"site-1": "its run failed: KeyError: 'no such row'"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_base_that_moved_ends_the_federation(llama_base, lora, tmp_path, workers):
    trainer = make_trainer(llama_base, tmp_path, lora, FailingTrainer, client_workers=workers, run_name="spoils")
    with pytest.raises(RuntimeError, match="^`.*` of the base was written to during training"):
        trainer.train()


@pytest.mark.slow
def test_a_worker_that_hangs_is_left_behind(llama_base, lora, tmp_path):
    """As [`test_a_round_closes_without_a_straggler`], with real processes."""
    trainer = make_trainer(
        llama_base, tmp_path, lora, HangingTrainer, client_workers=2, round_timeout=20, num_rounds=1
    )
    trainer.train()
    (record,) = trainer.server.store.records()[1:]
    assert set(record["clients"]) == {"site-0", "site-2"}
    assert record["rejected"] == {"site-1": "it had not answered within round_timeout=20 seconds"}


@pytest.mark.parametrize("visible, names", [(None, ["0", "1", "0"]), ("4, 7", ["4", "7", "4"])])
def test_workers_share_the_gpus(monkeypatch, visible, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert share_gpus(3) == [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert share_gpus(3) == [{}, {}, {}]


class EchoService:
    """A worker that answers in this process, when it is asked for the answer."""

    killed = 0
    hanging = ""
    refusing = ""
    loading = 0.0
    stuck: ClassVar[set[int]] = set()  # which of them, in the order of their making, never start
    born_dead: ClassVar[set[int]] = set()
    made: ClassVar[list["EchoService"]] = []
    dead = False

    def __init__(self, name, make_handler, setup, environment):
        self.environment = environment
        self.pipe, self._far = Pipe()
        self.number = len(EchoService.made)
        EchoService.made.append(self)

    def send(self, command, tensors=None):
        if self.dead:
            raise RuntimeError("The client worker's process died during `train` (exit code -9).")
        if command == "start" and self.number in self.stuck:
            return
        self._task = None if tensors is None else ClientTask.from_bytes(as_bytes(tensors["task"]))
        if self._task is None or self._task.client_id != EchoService.hanging:
            self._far.send(command)

    def receive(self):
        self.pipe.recv()
        if self._task is None and self.number in self.born_dead:
            raise RuntimeError("The client worker's process died during `start` (exit code -9).")
        if self._task is None:
            time.sleep(EchoService.loading)
            return {}, {}
        if self._task.client_id == EchoService.refusing:
            raise ValueError("the disk is full")
        update = ClientUpdate("", self._task.round, self._task.client_id, "", 1, {})
        return {}, {"update": as_tensor(update.to_bytes())}

    def kill(self):
        EchoService.killed += 1

    close = kill


def start_echoes(monkeypatch, **options):
    """Two workers, and tasks of three clients."""
    monkeypatch.setattr("fedlpp_hf.processes.workers.Service", EchoService)
    monkeypatch.setattr(EchoService, "killed", 0)
    monkeypatch.setattr(EchoService, "made", [])
    rows = {name: range(count) for name, count in (("small", 1), ("large", 9), ("middle", 5))}
    args = SimpleNamespace(**{"round_timeout": None, **options})
    workers = ClientWorkers(SimpleNamespace(client_datasets=rows, args=args), 2)
    return workers, [ClientTask("", 1, 1, name, 0, "", None) for name in rows]


def test_the_largest_client_begins_and_a_round_that_closes_early_leaves_nothing_behind(monkeypatch):
    workers, tasks = start_echoes(monkeypatch)
    answers = workers.train_clients(tasks)
    assert next(answers).client_id == "large"
    answers.close()  # `middle` has been asked; its answer must not come in the next round
    assert EchoService.killed == 1
    assert [answer.client_id for answer in workers.train_clients(tasks[:1])] == ["small"]


def test_a_round_closes_without_a_straggler(monkeypatch):
    workers, tasks = start_echoes(monkeypatch, round_timeout=0.3)
    monkeypatch.setattr(EchoService, "hanging", "large")
    *answers, late = workers.train_clients(tasks)
    assert {answer.client_id for answer in answers} == {"small", "middle"}
    assert late == ClientFailure("large", "it had not answered within round_timeout=0.3 seconds")
    assert EchoService.killed == 1
    assert len(list(workers.train_clients(tasks[:1]))) == 1  # another took the straggler's place


def test_loading_the_base_is_no_part_of_a_rounds_time(monkeypatch):
    monkeypatch.setattr(EchoService, "loading", 0.4)
    workers, tasks = start_echoes(monkeypatch, round_timeout=0.3)
    answers = list(workers.train_clients(tasks))
    assert {type(answer) for answer in answers} == {ClientUpdate} and len(answers) == 3


def test_a_worker_that_dies_while_idle_costs_one_client(monkeypatch):
    workers, tasks = start_echoes(monkeypatch)
    assert len(list(workers.train_clients(tasks))) == 3
    EchoService.made[0].dead = True  # the system was out of memory
    answers = list(workers.train_clients(tasks))
    (lost,) = [answer for answer in answers if isinstance(answer, ClientFailure)]
    assert len(answers) == 3 and "died during `train` (exit code -9)" in lost.reason
    assert {type(answer) for answer in workers.train_clients(tasks)} == {ClientUpdate}  # another took its place
    assert EchoService.killed == 1 and len(EchoService.made) == 3


@pytest.mark.parametrize("trouble", ["stuck", "born_dead"])
def test_a_worker_that_never_starts_is_given_up(monkeypatch, trouble):
    monkeypatch.setattr("fedlpp_hf.processes.workers._LEAST_START_SECONDS", 0.2)
    monkeypatch.setattr(EchoService, trouble, {1})
    workers, tasks = start_echoes(monkeypatch, round_timeout=0.2)
    for _ in range(2):
        assert {type(answer) for answer in workers.train_clients(tasks)} == {ClientUpdate}
    assert EchoService.killed == 1


@pytest.mark.parametrize(
    ("trouble", "message"), [("stuck", "had not started after 0.2 seconds"), ("born_dead", "died during `start`")]
)
def test_without_a_worker_the_round_ends(monkeypatch, trouble, message):
    monkeypatch.setattr("fedlpp_hf.processes.workers._LEAST_START_SECONDS", 0.2)
    monkeypatch.setattr(EchoService, trouble, {0, 1})
    workers, tasks = start_echoes(monkeypatch, round_timeout=0.2)
    with pytest.raises(RuntimeError, match=message):
        list(workers.train_clients(tasks))


def test_a_refused_client_is_left_out_with_the_reason(monkeypatch):
    workers, tasks = start_echoes(monkeypatch)
    monkeypatch.setattr(EchoService, "refusing", "middle")
    answers = {answer.client_id: answer for answer in workers.train_clients(tasks)}
    assert answers.keys() == {"small", "middle", "large"}
    assert answers["middle"] == ClientFailure("middle", "the disk is full")


def test_owners_things_stay_out_of_workers(full_llama, llama_base, lora, tmp_path, monkeypatch):
    seen = []
    owner = SimpleNamespace(initial_adapter=dict, has_rows=True, check_merge=lambda *_: None)
    monkeypatch.setattr("fedlpp_hf.trainer.federated.OwnerProcess", lambda blueprint: owner)
    monkeypatch.setattr("fedlpp_hf.trainer.workers.ClientWorkers", lambda blueprint, *_: seen.append(blueprint))
    rows = make_rows()
    args = make_args(tmp_path, client_workers=2, full_model=str(full_llama))
    trainer = FederatedTrainer(
        str(llama_base), args, train_dataset=rows, eval_dataset=rows, owner_dataset=rows, peft_config=lora
    )
    with pytest.raises(AttributeError):  # there are no workers
        trainer.train()
    assert trainer.blueprint.owner_dataset is not None and trainer.blueprint.full_model == str(full_llama)
    assert seen[0].owner_dataset is None and seen[0].full_model == ""
    assert seen[0].base_dir == str(llama_base) and seen[0].client_datasets.keys() == {"site-0", "site-1", "site-2"}


def test_clients_whose_turn_is_too_late_are_named(llama_base, lora, tmp_path):
    class SlowTrainer(FederatedTrainer):
        def train_client(self, task):
            update = super().train_client(task)
            time.sleep(0.2)
            return update

    rows = make_rows(clients=3)
    trainer = make_trainer(
        llama_base, tmp_path, lora, SlowTrainer, train_dataset=rows, num_rounds=1, round_timeout=0.1
    )
    trainer.train()
    (record,) = trainer.server.store.records()[1:]
    assert list(record["clients"]) == ["site-0"]
    assert record["rejected"] == dict.fromkeys(
        ["site-1", "site-2"], "it had not answered within round_timeout=0.1 seconds"
    )
    # The references of the report are no network: nobody is late there.
    assert (
        trainer.blueprint.build(trainer.client_datasets, tmp_path / "reference", str(llama_base)).args.round_timeout
        is None
    )


def test_what_workers_need(llama_base, lora, tmp_path):
    """Each loads the base from its directory: a model in memory can't be handed on."""
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, client_workers=2)
    with pytest.raises(ValueError, match="client_workers=2: each loads the base; give `model` as the path"):
        trainer.train()


def test_bytes_travel_as_a_tensor():
    assert as_bytes(as_tensor(b"\x00\xff update")) == b"\x00\xff update"
