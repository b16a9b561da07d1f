# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The loss of each row is the trainer's own, whatever the batches."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.processes.measurement import choose_rows, measure_rows
from tests.helpers import make_rows, make_tokenizer, make_trainer


def test_rows_of_a_batch_are_those_one_by_one(llama_base, lora, tmp_path):
    data = make_rows(9)
    labels = [[-100] * (index % 4) + row[index % 4 :] for index, row in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels)
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=data)
    together = measure_rows(trainer, data)
    trainer.args.per_device_eval_batch_size = 1
    alone = measure_rows(trainer, data)
    np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-5)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(alone.loss.mean(), rel=1e-5)
    assert together.accuracy is None and together.num_outputs == 64


def make_ragged_rows(count):
    """Rows of 4 to 12 tokens, of all lengths in turn."""
    rows = [
        {key: value[: 4 + place * 5 % 9] if isinstance(value, list) else value for key, value in row.items()}
        for place, row in enumerate(make_rows(count))
    ]
    return Dataset.from_list(rows)


def test_rows_are_batched_by_length_and_found_in_their_order(llama_base, lora, tmp_path):
    data = make_ragged_rows(13)
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=data, per_device_eval_batch_size=4)
    trainer.data_collator = DataCollatorForSeq2Seq(make_tokenizer())
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = measure_rows(trainer, data)
    lengths = sorted(map(len, data["input_ids"]))
    assert shapes == [(len(part), part[-1]) for part in (lengths[place : place + 4] for place in range(0, 13, 4))]
    trainer.args.per_device_eval_batch_size = 1
    for place in range(13):
        alone = measure_rows(trainer, data.select([place]))
        np.testing.assert_allclose(found.loss[place : place + 1], alone.loss, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_how_the_trainer_loads_rows_moves_none(llama_base, lora, tmp_path, options):
    """A row was dropped, stood in another's place, or all evaluation rows were measured instead."""
    data = make_rows(13)
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=data, per_device_eval_batch_size=4)
    rows = choose_rows(data, 10, 0)
    expected = measure_rows(trainer, rows)
    for name, value in options.items():
        setattr(trainer.args, name, value)
    trainer.evaluate()
    np.testing.assert_allclose(measure_rows(trainer, rows).loss, expected.loss, rtol=1e-5)
    assert all(getattr(trainer.args, name) == value for name, value in options.items())


def test_an_overridden_loss_counts(llama_base, lora, tmp_path):
    class Squared(FederatedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = outputs.logits.float().pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    data = make_rows(5)
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, cls=Squared, eval_dataset=data)
    found = measure_rows(trainer, data)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(found.loss.mean(), rel=1e-5)
    assert found.loss.std() > 0


def test_chosen_rows_depend_on_seed_and_length_alone():
    data = make_rows(20)
    chosen = choose_rows(data, 6, 3)
    assert len(chosen) == 6 and chosen[:] == choose_rows(data, 6, 3)[:]
    assert chosen[:] != choose_rows(data, 6, 4)[:]
    assert len(choose_rows(data, 50, 0)) == 20
    for bad in (None, {"a": data}):
        with pytest.raises(ValueError, match="expected one Dataset"):
            choose_rows(bad, 1, 0)
