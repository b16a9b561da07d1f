# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""After the last round there is a report, whatever fails, and metrics may be anything."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlpp_hf import FederatedCallback, FederatedTrainer, RoundStore, load_base
from fedlpp_hf.report.metrics import keep_values
from tests.helpers import make_args, make_rows, make_trainer


class Owner:
    """Plays the owner's process: the parts that are named fail."""

    has_rows, selects = True, False

    def __init__(self, *fails):
        self.fails, self.calls = fails, []

    def do(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise RuntimeError(f"{name} failed")

    def initial_adapter(self):
        return {}

    def evaluate(self, adapter, residual=None, base_weight=0.0):
        return {"eval_loss": 1.0}

    def merge(self, adapter_dir, output_dir, base_weight):
        self.do("merge")

    def run_reference(self, own_rows=False):
        self.do("own rows" if own_rows else "reference")
        return {"eval_loss": 0.5}


@pytest.mark.parametrize(
    "fails", [(), ("merge",), ("audit",), ("reference",), ("own rows",), ("merge", "audit", "reference")], ids=str
)
def test_report_is_written_whatever_fails(llama_base, lora, tmp_path, monkeypatch, caplog, fails):
    owner = Owner(*fails)

    def audit(trainer):
        owner.do("audit")
        return SimpleNamespace(
            write=lambda directory: None, summarize=list, check_threshold=lambda: owner.do("threshold")
        )

    monkeypatch.setattr("fedlpp_hf.trainer.finish.audit_federation", audit)
    options = {"num_rounds": 1, "max_steps": 1, "merge": True, "audit": True, "compare_full_precision": True}
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(), **options)
    trainer.owner = owner
    if fails:
        with pytest.raises(RuntimeError, match=f"{fails[0]} failed"):
            trainer.train()
        assert all(f"{name} failed" in caplog.text for name in fails[1:])
    else:
        trainer.train()
    # References last: they take longest. One part that fails keeps no other from running.
    expected = ["merge", "audit", "reference", "own rows", "threshold"]
    expected = expected[: expected.index("reference") + 1] if "reference" in fails else expected
    assert owner.calls == (expected[:4] if fails else expected)
    report = (tmp_path / "report.md").read_text()
    assert "server's model after" in report
    assert ("federation in full precision" in report) == ("reference" not in fails)
    assert trainer.state.global_step == 1 and RoundStore(tmp_path).latest() == 1


class Raises(FederatedCallback):
    """A user's callback that fails when the rounds are over."""

    def on_federation_end(self, args, state, control, **kwargs):
        raise RuntimeError("their tracker failed")


def test_a_callback_that_fails_after_the_rounds_costs_neither_report_nor_merge(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1, max_steps=1, merge=True)
    trainer.owner = Owner()
    trainer.add_callback(Raises())
    with pytest.raises(RuntimeError, match="their tracker failed"):
        trainer.train()
    assert "# Federation report" in (tmp_path / "report.md").read_text() and trainer.owner.calls == ["merge"]
    assert trainer.state.global_step == 1


def test_report_is_there_though_the_merge_is_killed(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1, max_steps=1)
    trainer.owner = Owner()
    trainer.owner.merge = lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "# Federation report" in (tmp_path / "report.md").read_text()


METRICS = {
    "per_class": {"0": 1.0, 1: 0.5},
    "none": None,
    "note": "text",
    "list": [1.0, 2.0],
    "array": np.arange(3),
    "matrix": torch.eye(2),
    "flag": True,
    "number": np.float32(0.5),
    "nan": float("nan"),
}
LOST = {"a set": {1}, "bytes": b"1", "an object": object(), "deep": [{"x": {1}}], "objects": np.array([object()])}


def test_metrics_of_any_kind_reach_the_report(llama_base, lora, tmp_path, caplog):
    rows = make_rows()
    trainer = FederatedTrainer(
        load_base(llama_base), make_args(tmp_path, max_steps=1), train_dataset=rows, eval_dataset=rows, peft_config=lora,
        compute_metrics=lambda prediction: {"accuracy": 0.25, **METRICS, **LOST},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "fedlpp_hf"):
        trainer.train()
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]["proxy"]
    assert metrics["eval_per_class"] == {"0": 1.0, "1": 0.5} and metrics["eval_matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    assert metrics["eval_array"] == [0, 1, 2] and metrics["eval_none"] is None and metrics["eval_note"] == "text"
    assert not [name for name in LOST if f"eval_{name}" in metrics]
    header = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")[3:-1]] == ["loss", "accuracy", "number", "nan"]
    warned = [record for record in caplog.records if "JSON can't hold" in record.message]
    assert len(warned) == 1 and all(f"eval_{name}" in warned[0].message for name in LOST)
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][1]["eval_per_class"] == {
        "0": 1.0,
        "1": 0.5,
    }


def test_values_are_those_of_json():
    kept = keep_values(METRICS | LOST)
    assert kept.keys() == METRICS.keys()
    assert json.loads(json.dumps(kept, allow_nan=True)).keys() == kept.keys()
    assert type(kept["number"]) is float and type(keep_values({"x": np.int64(3)})["x"]) is int
    assert keep_values({"x": np.str_("a"), "y": torch.tensor(2)}) == {"x": "a", "y": 2}
