# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole federations with an audit of the data side at their end, and what becomes of it in files."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlpp_hf import AuditReport, FederatedTrainer
from fedlpp_hf.audit.data_audit import audit_noise
from fedlpp_hf.audit.data_report import DataAudit, read_data_audit
from fedlpp_hf.privacy import client_level
from fedlpp_hf.privacy.accounting import ClientSampling, compute_epsilon
from tests.helpers import VOCABULARY, make_args, make_labelled_rows, make_rows, make_trainer


@pytest.mark.slow
def test_updates_are_attacked_and_the_federation_stays_as_it_is(tmp_path):
    # Weights of 0.2, as of a trained model: with the others' 0.02 attention adds next to nothing, and order can't be told.
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        str(tmp_path / "full"), tmp_path / "out", lora, eval_dataset=make_rows(32, seed=1), audit=True, audit_data=True, audit_steps=1,
        audit_rows=32, merge=False, optim="sgd", learning_rate=0.1, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    report = AuditReport.read(tmp_path / "out")
    one_step = next(found for found in report.data.inversions if found.run == "one step")
    noise = next(found for found in report.data.inversions if found.run == "noise")
    assert (one_step.rows, one_step.exact, one_step.rouge_l) == (2, 100, 100)
    assert (noise.exact, noise.tokens) == (0, 0) and {found.run for found in report.data.inversions} > {
        "whole local run"
    }
    assert {(entry.figures.num_members, entry.figures.num_others) for entry in report.data.membership} == {(16, 16)}
    assert len(report.data.membership) == 4 and "of 3 clients" in report.data.membership[-1].model
    assert trainer.server.store.latest() == 2 and "audit" not in trainer.server.num_examples

    text = (tmp_path / "out" / "audit.md").read_text()
    assert "## What updates tell about rows" in text and "likelihood ratio" in text and "no noise on updates" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "what updates tell about rows" in page and "exact rows" in page and "likelihood ratio" in page
    # JSON and back, and what is damaged.
    values = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert read_data_audit(values["data"]) == report.data
    values["data"]["inversions"][0]["rouge_l"] = "all"
    (tmp_path / "out" / "audit.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no audit of this version"):
        AuditReport.read(tmp_path / "out")


@pytest.mark.slow
def test_classifier_is_attacked_too(full_bert, tmp_path):
    data = make_labelled_rows(32)
    lora = LoraConfig(r=32, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = FederatedTrainer(
        str(full_bert), make_args(tmp_path, num_rounds=1, audit=True, audit_data=True, audit_steps=1, merge=False),
        train_dataset=data, eval_dataset=data, peft_config=lora, model_class=AutoModelForSequenceClassification,
    )  # fmt: skip
    trainer.train()
    data = AuditReport.read(tmp_path).data
    assert [found.run for found in data.inversions] == ["one step", "noise", "whole local run"]
    assert data.inversions[1].exact == 0


def test_what_could_not_be_attacked_is_said():
    audit = DataAudit([], [], notes=["Updates were not inverted: it is a picture."])
    assert audit.list_tables() == [] and "it is a picture" in "\n".join(audit.render())
    assert read_data_audit(json.loads(json.dumps(dataclasses.asdict(audit)))) == audit


# --- The noise of a federation, by canary clients.
SAMPLINGS = [ClientSampling("poisson", 40, 10), ClientSampling("fixed", 40, 10)]


@pytest.fixture
def seeded(monkeypatch):
    """Noise that is the same in each run of the tests; a sound mechanism is refuted by chance in one of 1,000."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr(client_level, "draw_gaussian", lambda count, read_bytes: draw.standard_normal(count))


def make_dp(sampling, clip_quantile=None):
    pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
    options = SimpleNamespace(clip_quantile=clip_quantile)
    return SimpleNamespace(sampling=sampling, noise_multiplier=2.0, args=options, clip=0.5, delta=1e-3)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["poisson", "fixed"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_noise_of_a_federation_is_not_refuted(seeded, sampling, quantile):
    found = audit_noise(make_dp(sampling, quantile), [{}, {"privacy": {"releases": 4}}], seed=0)
    accounted = ClientSampling("poisson", 1, 1) if sampling.kind == "fixed" else sampling
    assert found.accounted == compute_epsilon(2.0, accounted, 4, 1e-3)
    assert not found.refuted and found.epsilon_high > 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["poisson", "fixed"])
def test_server_that_does_not_clip_is_refuted(seeded, sampling, monkeypatch):
    clip = client_level.sum_clipped
    monkeypatch.setattr(client_level, "sum_clipped", lambda deltas, _, shapes: clip(deltas, math.inf, shapes))
    assert audit_noise(make_dp(sampling), [{"privacy": {"releases": 4}}], seed=0).refuted
