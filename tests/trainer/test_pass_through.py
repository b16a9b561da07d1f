# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The Trainer's own ways to save memory and time count on clients: what they leave unchanged stays bit-identical."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from fedlpp_hf import FederatedTrainer, load_base
from tests.helpers import assert_equal, make_args, make_rows, make_sft_classes, make_tokenizer, make_trainer, task_of


def train(base, output_dir, lora, **options):
    trainer = make_trainer(base, output_dir, lora, **options)
    return trainer.train_client(task_of(trainer)).delta, trainer


def test_gradient_checkpointing_computes_again_what_it_drops(llama_base, lora, tmp_path):
    updates, calls = [], []
    for on in (False, True):
        model = load_base(llama_base)
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, on=on: calls.append(on))
        updates.append(train(model, tmp_path / str(on), lora, gradient_checkpointing=on)[0])
    assert (calls.count(False), calls.count(True)) == (2, 4)  # two steps
    assert_equal(*updates)


@pytest.mark.slow
def test_compiled_model_trains_to_the_same_bits(llama_base, lora, tmp_path):
    """The compiler's front end alone, which needs no C++ compiler."""
    plain, _ = train(llama_base, tmp_path / "plain", lora)
    compiled, trainer = train(
        load_base(llama_base), tmp_path / "compiled", lora, torch_compile=True, torch_compile_backend="eager"
    )
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert_equal(plain, compiled)


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch"])
def test_optimizers_are_the_users_choice(llama_base, lora, tmp_path, optim):
    names = {"adafactor": "Adafactor", "sgd": "SGD", "adamw_torch": "AdamW"}
    delta, trainer = train(llama_base, tmp_path, lora, optim=optim)
    assert type(trainer.optimizer.optimizer).__name__ == names[optim]
    assert any(value.abs().max() > 0 for value in delta.values())


def test_packing_of_trl(llama_base, lora, tmp_path):
    FederatedSFTConfig, FederatedSFTTrainer = make_sft_classes()
    rows = make_rows(length=6).remove_columns(["attention_mask", "labels"])
    args = make_args(
        tmp_path, FederatedSFTConfig, bf16=False, max_length=24, packing=True, per_device_train_batch_size=1
    )
    trainer = FederatedSFTTrainer(
        load_base(llama_base), args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora
    )
    # Eight rows of six tokens each, in two of 24.
    assert {len(data) for data in trainer.client_datasets.values()} == {2}
    trainer.train()
    assert all(client["steps"] == 2 for client in trainer.server.store.records()[2]["clients"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options",
    [
        {"optim": "paged_adamw_8bit"},
        {"optim": "adamw_bnb_8bit", "gradient_checkpointing": True},
        {"torch_compile": True},
        pytest.param(
            {"attention": "flash_attention_2"},
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn"),
        ),
    ],
    ids=str,
)
def test_on_a_gpu(llama_base, lora, tmp_path, options):
    attention = options.get("attention")
    kwargs = {"attn_implementation": attention, "dtype": torch.bfloat16} if attention else {}
    arguments = {key: value for key, value in options.items() if key != "attention"}
    trainer = make_trainer(
        load_base(llama_base, **kwargs), tmp_path, lora, FederatedTrainer, use_cpu=False, bf16=True, **arguments
    )
    trainer.train()
    assert any(value.abs().max() > 0 for key, value in trainer.server.adapter.items() if "lora_B" in key)
