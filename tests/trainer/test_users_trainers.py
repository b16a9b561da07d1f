# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ways in which users make their own trainer federated."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from fedlpp_hf import FederatedConfig, FederatedMixin, FederatedTrainer, load_base
from tests.helpers import make_args, make_rows, make_sft_classes, make_tokenizer, make_trainer


class DoubledLoss(FederatedTrainer):
    def compute_loss(self, model, inputs, *args, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def test_overridden_compute_loss_counts_on_clients_and_for_the_owner(full_llama, lora, tmp_path):
    rows = make_rows()
    doubled = make_trainer(
        str(full_llama), tmp_path / "doubled", lora, cls=DoubledLoss, eval_dataset=rows, num_rounds=1, merge=False
    )
    doubled.train()
    full = make_trainer(
        AutoModelForCausalLM.from_pretrained(full_llama), tmp_path / "full", lora, eval_dataset=rows, base_bits=32
    )
    base = make_trainer(tmp_path / "doubled" / "_federation" / "base", tmp_path / "base", lora, eval_dataset=rows)
    before = doubled.server.store.records()[0]["metrics"]
    for view, plain in (("server", full), ("proxy", base)):
        assert before[view]["eval_loss"] == pytest.approx(2 * plain.evaluate_metrics()["eval_loss"], rel=1e-6)


def test_seq2seq(llama_base, lora, tmp_path):
    @dataclass
    class FederatedSeq2SeqConfig(Seq2SeqTrainingArguments, FederatedConfig):
        pass

    class FederatedSeq2SeqTrainer(FederatedMixin, Seq2SeqTrainer):
        pass

    rows = make_rows()
    trainer = FederatedSeq2SeqTrainer(
        load_base(llama_base),
        make_args(tmp_path, FederatedSeq2SeqConfig),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora,
    )
    trainer.train()
    records = trainer.server.store.records()
    assert records[-1]["metrics"]["proxy"]["eval_loss"] < records[0]["metrics"]["proxy"]["eval_loss"]


def test_sft_trainer(full_llama, llama_base, lora, tmp_path):
    FederatedSFTConfig, FederatedSFTTrainer = make_sft_classes()
    rows = make_rows().remove_columns(["attention_mask"])
    trainer = FederatedSFTTrainer(
        load_base(llama_base), make_args(tmp_path, FederatedSFTConfig, bf16=False, max_length=12), train_dataset=rows,
        eval_dataset=rows, processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip
    assert all(p.dtype == torch.float32 for p in trainer.guard.parameters.values())
    trainer.train()
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in trainer.server.store.records()]
    assert losses[-1] < losses[0]
