# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Noise in shares in a real federation: clients add it, and the server's records have nothing without it."""

import math

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import make_trainer


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
pytest.importorskip("Crypto", reason="needs the extra [privacy]")

OPTIONS = {
    "num_rounds": 2, "weighting": "uniform", "clip_update_norm": 0.05, "adapter_bits": 32, "aggregation": "freeze_a",
    "secure_aggregation": True, "secure_threshold": 0.5, "target_epsilon": 8.0, "target_delta": 0.01,
}  # fmt: skip


def test_federation_ends_with_noise_of_the_length_that_is_accounted(llama_base, lora, tmp_path):
    trainer = make_trainer(str(llama_base), tmp_path, lora, **OPTIONS)
    trainer.train()
    records = RoundStore(tmp_path).records()
    spent, found = records[2]["privacy"], records[2]["sum"]
    assert 7.9 < spent["epsilon"] <= 8.0 and spent["releases"] == 2 and spent["colluders"] == 1
    assert (found["members"], found["threshold"], found["losses"], found["steps"]) == (3, 2, 0, 0)
    assert math.isnan(found["loss"])
    assert records[2]["clients"] == {f"site-{number}": {"num_examples": None} for number in range(3)}
    # Of the noise of three clients that of one counts: in the mean of three, √3/3 of it, in each of two rounds.
    before = read_adapter(RoundStore(tmp_path).round_dir(0))[0]
    after = read_adapter(tmp_path)[0]
    moved = [after[key] - before[key] for key in after if "lora_B" in key]
    count = sum(part.numel() for part in moved)
    square = sum(float(part.double().square().sum()) for part in moved)
    std = spent["noise_multiplier"] * 0.05 * math.sqrt(3) / 3
    assert square / (2 * std**2 * count) == pytest.approx(1, abs=5 * math.sqrt(2 / count) + 0.01)
    assert all((after[key] == before[key]).all() for key in after if "lora_A" in key)
    report = (tmp_path / "report.md").read_text()
    assert "against the server, too, while at most 1 of a round's clients help it" in report
    assert "Skellam RDP accountant" in report
    trainer.create_model_card()
    assert "Client-level differential privacy: ε = " in (tmp_path / "README.md").read_text()
