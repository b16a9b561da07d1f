# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a trainer refuses, before any client has trained."""

import shutil

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from fedlpp_hf import FederatedTrainer, RoundStore, load_base
from fedlpp_hf.base.manifest import base_fingerprint
from fedlpp_hf.server.store import FEDERATION_DIR
from tests.helpers import make_args, make_rows, make_trainer, task_of


def test_unknown_client(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    task = task_of(trainer)
    del trainer.client_datasets["site-0"]
    with pytest.raises(ValueError, match="site-0"):
        trainer.train_client(task)


def test_existing_output_dir(llama_base, lora, tmp_path):
    make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
    with pytest.raises(ValueError, match="--resume_from_checkpoint.*--overwrite"):
        make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
    make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1, overwrite=True).train()


def test_base_of_a_federation_that_another_process_runs(full_llama, llama_base, lora, tmp_path):
    """The second one is refused when it is made: it would put its own base in the place of the first one's."""
    base = tmp_path / FEDERATION_DIR / "base"
    shutil.copytree(llama_base, base)
    with RoundStore(tmp_path).lock(), pytest.raises(ValueError, match="Another process is running a federation in"):
        make_trainer(str(full_llama), tmp_path, lora, base_bits=2, overwrite=True)
    assert base_fingerprint(base) == base_fingerprint(llama_base)


def test_resuming_with_other_arguments(llama_base, lora, tmp_path):
    make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
    with pytest.raises(ValueError, match="learning_rate=0.01.*0.5"):
        make_trainer(load_base(llama_base), tmp_path, lora, learning_rate=0.5).train(resume_from_checkpoint=True)


def test_resuming_nothing(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="no federation to resume"):
        make_trainer(load_base(llama_base), tmp_path, lora).train(resume_from_checkpoint=True)


def test_empty_client(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="'b' has 0 rows"):
        make_trainer(
            load_base(llama_base), tmp_path, lora, train_dataset={"a": make_rows(), "b": make_rows().select([])}
        )


def test_less_than_a_batch_where_short_batches_are_dropped(llama_base, lora, tmp_path):
    data = {"a": make_rows(), "b": make_rows(3)}
    make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data, num_rounds=1).train()
    with pytest.raises(ValueError, match=r"'b' has 3 rows; at least 4.*dataloader_drop_last=False"):
        make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data, dataloader_drop_last=True)


def test_too_many_clients_per_round(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="clients_per_round=4, but there are only 3"):
        make_trainer(load_base(llama_base), tmp_path, lora, clients_per_round=4)


def test_optimizer_and_model_init_are_refused(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="optimizers"):
        FederatedTrainer(
            load_base(llama_base),
            make_args(tmp_path),
            train_dataset=make_rows(),
            peft_config=lora,
            optimizers=(1, None),
        )
    with pytest.raises(ValueError, match="model_init"):
        FederatedTrainer(
            load_base(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora, model_init=1
        )


def test_plain_training_arguments(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="expected a FederatedConfig"):
        FederatedTrainer(
            load_base(llama_base), TrainingArguments(str(tmp_path)), train_dataset=make_rows(), peft_config=lora
        )


def test_unsupported_targets(llama_base, tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        make_trainer(load_base(llama_base), tmp_path, LoraConfig(target_modules=["nonsense"]))
