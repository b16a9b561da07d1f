# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""After the last round there is a report, whatever fails, and metrics may be anything."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedlpp_hf import FederatedCallback, FederatedTrainer, RoundStore, load_base
from fedlpp_hf.report.metrics import keep_values
from fedlpp_hf.report.parties import Party
from fedlpp_hf.report.text import AuditSummary
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
        parties = [Party("guessing", "nobody", 2.0), Party("the server's model after", "owner", 1.0)]
        summary = AuditSummary([], parties, [["who"]], [["base"]], ["The audit was here."], "no rows")
        return SimpleNamespace(
            write=lambda directory: None, summarize=lambda: summary, check_threshold=lambda: owner.do("threshold")
        )

    monkeypatch.setattr("fedlpp_hf.audit.audit.audit_federation", audit)
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
    page = (tmp_path / "report.html").read_text()
    assert ("federation in full precision" in page) == ("reference" not in fails)
    assert ("The audit was here." in page) == ("audit" not in fails)
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


class Reads(FederatedCallback):
    """Fails on one client, and says where."""

    def __init__(self, path):
        self.path, self.client = path, ""

    def on_client_begin(self, args, state, control, *, client_id, **kwargs):
        self.client = client_id

    def on_train_begin(self, args, state, control, **kwargs):
        if self.client == "site-1":
            raise OSError(f"no {self.path}/rows.csv on gpu-node-17 for hf_0123456789")


def test_page_has_clients_and_bytes_but_no_path_host_or_token(llama_base, lora, tmp_path):
    output_dir = tmp_path / "at_the_owners"
    options = {"num_rounds": 2, "max_steps": 1, "hub_token": "hf_9876543210", "run_name": str(tmp_path)}
    trainer = make_trainer(str(llama_base), output_dir, lora, eval_dataset=make_rows(), **options)
    trainer.add_callback(Reads(output_dir))
    trainer.train()
    records = RoundStore(output_dir).records()
    assert "gpu-node-17" in records[1]["rejected"]["site-1"]
    page = (output_dir / "report.html").read_text()
    assert "its run failed: OSError" in page and "0 of 2" in page and "linear4bit" in page
    private = (
        "at_the_owners",
        str(tmp_path),
        str(llama_base),
        "gpu-node-17",
        "hf_",
        "rows.csv",
        str(Path.home()) + "/",
    )
    assert [word for word in private if word in page] == []
    # Every byte is some client's, and clients are timed one by one.
    for record in records[1:]:
        costs = record["traffic"]
        assert sorted(costs) == record["asked"] and costs["site-1"]["bytes_up"] == 0
        for way in ("bytes_down", "bytes_up"):
            assert sum(cost[way] for cost in costs.values()) == record[way] > 0
        seconds = [cost["seconds"] for cost in costs.values()]
        assert min(seconds) > 0 and sum(seconds) < record["seconds"]


def test_resuming_writes_the_page_anew(llama_base, lora, tmp_path):
    for rounds in (1, 2):
        trainer = make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=rounds, max_steps=1)
        trainer.train(resume_from_checkpoint=rounds > 1)
        page = (tmp_path / "report.html").read_text()
        assert f"{rounds} of {rounds}" in page and f"{rounds} rounds, " in page
        assert RoundStore(tmp_path).read()["federation_id"] in page


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


class Moving(FederatedCallback):
    def on_round_end(self, args, state, control, **kwargs):
        os.chdir("elsewhere")


def test_a_script_that_changes_its_directory_writes_to_one_place(llama_base, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    trainer = make_trainer(llama_base, "out", lora, num_rounds=1, update_bits=2)
    trainer.add_callback(Moving())
    trainer.train()
    assert Path.cwd() == tmp_path / "elsewhere" and not list(Path.cwd().iterdir())
    assert {"_federation", "_clients", "adapter_model.safetensors", "report.html"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
