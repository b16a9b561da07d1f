# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What callbacks hear of rounds and of clients, and rounds that end early."""

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fedlpp_hf import FederatedCallback, FederatedTrainer, RoundStore, load_base
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.helpers import assert_equal, make_args, make_labelled_rows, make_rows, make_trainer


def make(base, output_dir, lora, *callbacks, cls=FederatedTrainer, **options):
    return cls(
        load_base(base), make_args(output_dir, **{"max_steps": 1, **options}), train_dataset=make_rows(), eval_dataset=make_rows(8),
        peft_config=lora, callbacks=list(callbacks),
    )  # fmt: skip


class Hears(FederatedCallback):
    """Writes down all it hears, with the rounds' state."""

    def __init__(self):
        self.heard = []

    def on_federation_begin(self, args, state, control, **kwargs):
        self.heard.append(("federation", state.global_step))

    def on_round_begin(self, args, state, control, *, round_number, client_ids, **kwargs):
        self.heard.append(("round", round_number, state.global_step, *client_ids))

    def on_client_begin(self, args, state, control, *, round_number, client_id, **kwargs):
        self.heard.append(("client", round_number, client_id))

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("run")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append(("ran", state.global_step))

    def on_client_end(self, args, state, control, *, client_id, metrics, reason, **kwargs):
        self.heard.append(("client's end", client_id, None if metrics is None else sorted(metrics), reason))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.heard.append(("evaluated", state.global_step, sorted(metrics)))

    def on_round_end(self, args, state, control, *, round_number, record, **kwargs):
        self.heard.append(("round's end", round_number, state.global_step, sorted(record["clients"])))

    def on_federation_end(self, args, state, control, **kwargs):
        self.heard.append(("federation's end", state.global_step, len(state.log_history)))


def test_callbacks_hear_of_rounds_and_clients(llama_base, lora, tmp_path):
    hears = Hears()
    make(llama_base, tmp_path, lora, hears).train()

    def run(number, client):
        yield from (("client", number, client), "run", ("ran", 1), ("client's end", client, ["loss", "steps"], None))

    expected = [("federation", 0)]
    for number in (1, 2):
        expected.append(("round", number, number - 1, "site-0", "site-1", "site-2"))
        expected += [event for client in ("site-0", "site-1", "site-2") for event in run(number, client)]
        expected += [
            ("evaluated", number, ["eval_loss"]),
            ("round's end", number, number, ["site-0", "site-1", "site-2"]),
        ]
    assert hears.heard == [*expected, ("federation's end", 2, 4)]


def test_clients_elsewhere_begin_at_the_latest_when_they_answer(llama_base, lora, tmp_path):
    hears = Hears()
    trainer = make(llama_base, tmp_path, lora, hears, num_rounds=1)

    def train_clients(tasks):
        return [trainer.train_client(task) for task in reversed(tasks)]

    trainer.train_remotely(train_clients, dict.fromkeys(trainer.client_datasets, 8))
    named = [event for event in hears.heard if event[0] in ("client", "client's end")]
    assert [event[0] for event in named] == ["client", "client's end"] * 3


def test_callbacks_of_a_trainer_hear_each_run_and_each_round_once(llama_base, lora, tmp_path):
    class Plain(TrainerCallback):
        def __init__(self):
            self.steps, self.metrics = [], []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.metrics.append(metrics)

    plain = Plain()
    trainer = make(llama_base, tmp_path, lora, plain)
    trainer.train()
    assert plain.steps == [1] * 6
    records = trainer.server.store.records()
    assert plain.metrics == [record["metrics"]["proxy"] for record in records[1:]]
    trainer.evaluate()
    assert len(plain.metrics) == 3


@pytest.mark.parametrize("event", ["on_client_end", "on_round_end", "on_evaluate"])
def test_a_callback_ends_the_federation_after_its_round(llama_base, lora, tmp_path, event):
    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = True

    stops = type("Stops", (FederatedCallback,), {event: stop})()
    trainer = make(llama_base, tmp_path, lora, stops, num_rounds=4)
    result = trainer.train()
    assert RoundStore(tmp_path).latest() == 1 == result.global_step
    assert (tmp_path / "report.md").is_file() and (tmp_path / "adapter_model.safetensors").is_file()


def judged(losses):
    """A trainer whose evaluations give these losses, round after round."""

    class Judged(FederatedTrainer):
        def evaluate_proxy(self, adapter):
            latest = RoundStore(self.args.output_dir).latest()
            return {"eval_loss": losses[0 if latest is None else latest + 1]}

    return Judged


LOSSES = [9.0, 5.0, 4.0, 4.5, 4.2, 4.1, 3.0, 3.5]


def test_early_stopping_counts_rounds(llama_base, lora, tmp_path):
    options = {"num_rounds": 7, "metric_for_best_model": "loss", "load_best_model_at_end": True, "cls": judged(LOSSES)}
    trainer = make(llama_base, tmp_path, lora, EarlyStoppingCallback(2), **options)
    trainer.train()
    assert RoundStore(tmp_path).latest() == 4  # rounds 3 and 4 are worse than 2
    state = trainer.state
    assert (state.best_metric, state.best_global_step, state.global_step) == (4.0, 2, 4)
    assert state.best_model_checkpoint == str(trainer.server.store.round_dir(2))
    assert_equal(dict(trainer.server.adapter), trainer.server.store.load(2)[0])
    assert "Round 2 is published" in (tmp_path / "report.md").read_text()
    # Who resumes wants to go on: one more round, and it stops again, unless that one is better.
    again = make(llama_base, tmp_path, lora, EarlyStoppingCallback(2), **options)
    again.train(resume_from_checkpoint=True)
    assert RoundStore(tmp_path).latest() == 5
    without = make(llama_base, tmp_path, lora, **options)
    without.train(resume_from_checkpoint=True)
    assert RoundStore(tmp_path).latest() == 7 and without.state.best_global_step == 6


def test_resumed_early_stopping_is_uninterrupted(llama_base, lora, tmp_path):
    class Dies(judged(LOSSES)):
        def train_client(self, task):
            if task.round == 4:
                raise KeyboardInterrupt
            return super().train_client(task)

    options = {"num_rounds": 7, "metric_for_best_model": "loss"}
    with pytest.raises(KeyboardInterrupt):
        make(llama_base, tmp_path, lora, EarlyStoppingCallback(2), cls=Dies, **options).train()
    trainer = make(llama_base, tmp_path, lora, EarlyStoppingCallback(2), cls=judged(LOSSES), **options)
    trainer.train(resume_from_checkpoint=True)
    assert RoundStore(tmp_path).latest() == 4
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "metric_for_best_model=None on eval_dataset; pass metric_for_best_model"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model='f1'.*no number `eval_f1`.*eval_loss"),
    ],
)
def test_early_stopping_that_could_never_stop_is_refused(llama_base, lora, tmp_path, options, message):
    trainer = make(llama_base, tmp_path, lora, EarlyStoppingCallback(1), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert RoundStore(tmp_path).latest() is None


def test_early_stopping_without_evaluation_is_refused(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, metric_for_best_model="loss")
    trainer.add_callback(EarlyStoppingCallback(1))
    with pytest.raises(ValueError, match="pass eval_dataset"):
        trainer.train()


@pytest.mark.slow
def test_best_round_by_the_servers_metric_is_merged(full_bert, tmp_path):
    """Accuracy of the server's model, which the owner's process measures, and not of the proxy."""
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers import BertForSequenceClassification

    from fedlpp_hf.tensors.adapters import read_adapter

    rows = make_labelled_rows()

    class Judged(FederatedTrainer):
        def evaluate_metrics(self, eval_dataset=None):
            metrics = super().evaluate_metrics(eval_dataset)
            if (
                metrics and self.args.full_model is None
            ):  # in the owner's process: worse with every step away from zero
                moved = sum(float(p.abs().sum()) for key, p in self.guard.parameters.items() if "lora_B" in key)
                return metrics | {"eval_closeness": -moved}
            return metrics | {"eval_closeness": 0.0}

    trainer = Judged(
        str(full_bert), make_args(tmp_path, metric_for_best_model="closeness", load_best_model_at_end=True, num_rounds=3),
        train_dataset=rows, eval_dataset=rows, model_class=BertForSequenceClassification,
        peft_config=LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    )  # fmt: skip
    trainer.train()
    values = [record["metrics"]["server"]["eval_closeness"] for record in trainer.server.store.records()]
    assert values == sorted(values, reverse=True) and values[1] < 0
    assert trainer.evaluate_server()["eval_closeness"] == values[1]
    assert_equal(read_adapter(tmp_path)[0], trainer.server.store.load(1)[0])
    merged = load_file(tmp_path / MERGED_DIR / "model.safetensors")
    head = next(key for key in merged if key.endswith("classifier.weight"))
    trained = next(value for key, value in trainer.server.adapter.items() if key.endswith("classifier.weight"))
    assert torch.equal(merged[head], trained)
    trainer.owner.close()
