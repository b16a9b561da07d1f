# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Client-level differential privacy in a real federation: clients clip and say so, and only what has noise is published."""

import pytest
import torch

from fedlpp_hf import load_base
from fedlpp_hf.privacy.clipping import clip_update
from fedlpp_hf.tensors.adapters import global_norm
from tests.helpers import make_rows, make_trainer, task_of


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")


@pytest.fixture
def trainer(llama_base, lora, tmp_path):
    lora.modules_to_save = ["lm_head"]
    rows = make_rows(clients=4)
    return make_trainer(
        load_base(llama_base), tmp_path, lora, train_dataset=rows, eval_dataset=make_rows(8, seed=1).remove_columns("client"),
        noise_multiplier=3.0, target_delta=0.01, clip_update_norm=0.01, clip_quantile=0.5, weighting="uniform",
        aggregation="freeze_a", overwrite=True,
    )  # fmt: skip


def test_clients_clip_their_whole_update_and_say_whether_it_was_longer(trainer):
    task = task_of(trainer)
    update = trainer.train_client(task)
    assert any("lm_head" in key for key in update.delta) and not any("lora_A" in key for key in update.delta)
    assert global_norm(update.delta) == pytest.approx(0.01, rel=1e-5) and update.metrics["clipped"] == 1.0
    trainer.args.clip_update_norm = 100.0
    longer = trainer.train_client(task_of(trainer))
    assert 0.01 < global_norm(longer.delta) < 100.0 and longer.metrics["clipped"] == 0.0
    for key, value in clip_update(longer.delta, 0.01)[0].items():
        torch.testing.assert_close(update.delta[key], value)


def test_report_has_epsilon_and_the_card_nothing_that_has_no_noise(trainer, tmp_path):
    trainer.train()
    records = trainer.server.store.records()
    assert records[2]["privacy"]["releases"] == 2 and "below_clip" in records[2]["privacy"]
    assert "Client-level differential privacy: ε = " in (tmp_path / "report.md").read_text()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Client-level differential privacy: ε = " in card and "eval" not in card and "| base before" in card
    for hidden in ("client runs", "examples of all clients", "from clients, ", "site-"):
        assert hidden not in card
    assert "client runs" in (tmp_path / "report.md").read_text()  # the owner's own report has them
