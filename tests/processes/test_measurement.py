# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The loss of each row is the trainer's own, whatever the batches."""

import numpy as np
import pytest

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.processes.measurement import choose_rows, measure_rows
from tests.helpers import make_rows, make_trainer


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
