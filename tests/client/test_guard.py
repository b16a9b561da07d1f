# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The guard: what it refuses to train, and an unmodified Trainer script that it turns into a client."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import logging

from fedlpp_hf import FederatedServer, FederatedTrainer, QuantizedBaseCallback, load_base
from fedlpp_hf.client.guard import TASK_FILE, UPDATE_FILE
from fedlpp_hf.wire.messages import ClientUpdate, LocalOptions
from tests.helpers import make_rows, make_trainer, run_client_script, task_of


def test_full_precision_model(full_llama, lora, tmp_path):
    with pytest.raises(ValueError, match="full-precision checkpoint.*fedlpp-hf quantize"):
        make_trainer(AutoModelForCausalLM.from_pretrained(full_llama), tmp_path, lora)


def test_model_without_adapter(llama_base, tmp_path):
    with pytest.raises(ValueError, match="peft_config"):
        make_trainer(load_base(llama_base), tmp_path, None)


def test_trainable_base(llama_base, lora, tmp_path):
    model = get_peft_model(load_base(llama_base), lora)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight` is trainable"):
        make_trainer(model, tmp_path, lora)


def test_full_precision_layers_are_named(full_llama, lora, tmp_path, caplog):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(full_llama, quantization_config=quantization)
    logging.enable_propagation()
    try:
        make_trainer(model, tmp_path, lora)
    finally:
        logging.disable_propagation()
    assert "lm_head" in caplog.text


def test_other_base(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    task = task_of(trainer)
    trainer.guard.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="The task is for the base"):
        trainer.train_client(task)


def test_base_that_moves(llama_base, lora, tmp_path):
    class Moves(FederatedTrainer):
        def compute_loss(self, model, *args, **kwargs):
            with torch.no_grad():
                model.get_base_model().model.norm.weight.add_(1e-3)
            return super().compute_loss(model, *args, **kwargs)

    with pytest.raises(RuntimeError, match="norm.weight.*frozen"):
        make_trainer(load_base(llama_base), tmp_path, lora, cls=Moves).train()


def test_base_that_moves_behind_autograd(llama_base, lora, tmp_path):
    class Moves(FederatedTrainer):
        def compute_loss(self, model, *args, **kwargs):
            model.get_base_model().model.norm.weight.data.add_(1e-3)
            return super().compute_loss(model, *args, **kwargs)

    with pytest.raises(RuntimeError, match="base differs"):
        make_trainer(load_base(llama_base), tmp_path, lora, cls=Moves).train()


def test_pushing_a_clients_files(llama_base, lora, tmp_path):
    callback = QuantizedBaseCallback(task_dir=tmp_path, update_dir=tmp_path)
    model = get_peft_model(load_base(llama_base), lora)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = Trainer(model, args, train_dataset=make_rows(), callbacks=[callback])
    with pytest.raises(RuntimeError, match="do not leave the client"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="There is no task at"):
        trainer.train()


def test_task_of_a_noisy_sum_is_not_answered_with_a_file_in_the_clear(llama_base, lora, tmp_path):
    task = replace(task_of(make_trainer(str(llama_base), tmp_path, lora)), options=LocalOptions(share_noise=1.0))
    (tmp_path / TASK_FILE).write_bytes(task.to_bytes())
    with pytest.raises(ValueError, match="leaves the noise to the clients of a secure sum, and this callback writes"):
        run_client_script(llama_base, lora, tmp_path, tmp_path, make_rows())
    assert not (tmp_path / UPDATE_FILE).exists()


def test_unmodified_trainer_with_the_callback_is_a_client(llama_base, lora, tmp_path):
    """Two rounds in which every client is a plain Trainer script with the callback, and files between them."""
    rows = make_rows()
    reference = make_trainer(load_base(llama_base), tmp_path / "server", lora, eval_dataset=rows)

    def train_clients(tasks):
        for task in tasks:
            task_dir, update_dir = tmp_path / "in", tmp_path / "out"
            task_dir.mkdir(exist_ok=True)
            (task_dir / TASK_FILE).write_bytes(task.to_bytes())
            run_client_script(llama_base, lora, task_dir, update_dir, reference.raw_datasets[task.client_id])
            yield ClientUpdate.from_bytes((update_dir / UPDATE_FILE).read_bytes())

    server = FederatedServer(
        reference.args, reference.guard.initial, reference.model.peft_config["default"],
        {client: len(data) for client, data in reference.client_datasets.items()}, reference.guard.fingerprint,
        evaluate_proxy=reference.evaluate_proxy,
    )  # fmt: skip
    records = server.run(train_clients)
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in records]
    assert losses[2] < losses[1] < losses[0]
    assert all(client["steps"] == 2 for client in records[2]["clients"].values())
