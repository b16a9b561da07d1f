# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole federations with an audit at their end: what clients hold of the owner's gain."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorForSeq2Seq

from fedlpp_hf import AuditReport, FederatedConfig, FederatedTrainer, audit_federation, load_base
from fedlpp_hf.audit.audit import _Scale
from fedlpp_hf.audit.requirements import check_auditable
from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.cli.main import main
from fedlpp_hf.processes import measurement
from fedlpp_hf.processes.measurement import choose_rows, measure_rows
from tests.helpers import SHARED, make_args, make_labelled_rows, make_rows, make_trainer


def test_attacker_that_diverges_is_named_and_not_counted(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(6))
    broken = {key: value * np.inf for key, value in trainer.guard.initial.items()}
    diverged = []
    found = _Scale(trainer, make_rows(6)).measure_all({"fine": dict(trainer.guard.initial), "bad": broken}, diverged)
    assert list(found) == ["fine"] and diverged == ["bad"]


def test_equal_adapters_are_evaluated_once(llama_base, lora, tmp_path, monkeypatch):
    """Coalitions may have the same best attacker."""
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(6))
    start = dict(trainer.guard.initial)
    other = {key: value + 1 for key, value in start.items()}
    expected = [trainer.evaluate_proxy(adapter) for adapter in (start, other)]
    evaluated = []
    evaluate_proxy = trainer.evaluate_proxy
    monkeypatch.setattr(
        trainer, "evaluate_proxy", lambda adapter: evaluated.append(adapter) or evaluate_proxy(adapter)
    )
    scale = _Scale(trainer, make_rows(6))
    again = {key: value.clone() for key, value in start.items()}
    assert [scale.evaluate(adapter) for adapter in (start, other, again)] == [*expected, expected[0]]
    assert len(evaluated) == 2


def audited(full_llama, tmp_path, lora, **options):
    """A federation with an audit at its end; the report, and the trainer."""
    options = {"audit": True, "audit_steps": 2, "audit_rows": 16, "merge": False, **options}
    trainer = make_trainer(str(full_llama), tmp_path, lora, eval_dataset=make_rows(24, seed=1), **options)
    trainer.train()
    return AuditReport.read(tmp_path), trainer


def list_figures(value, path=""):
    """The numbers and texts of a report, by their place in it."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: found for key, entry in items for place, found in list_figures(entry, f"{path}/{key}").items()}


@pytest.mark.slow
def test_batches_of_the_measurement_change_no_figure(full_llama, lora, tmp_path, monkeypatch):
    report, trainer = audited(full_llama, tmp_path, lora, audit_data=True, per_device_eval_batch_size=4)
    monkeypatch.setattr(measurement, "_order_by_length", lambda rows: list(reversed(range(len(rows)))))
    again = audit_federation(trainer)
    figures, others = (list_figures(dataclasses.asdict(found)) for found in (report, again))
    assert len(figures) > 100 and figures.keys() == others.keys()
    for place, figure in figures.items():
        if place != "/seconds":
            assert others[place] == (pytest.approx(figure, rel=1e-5) if isinstance(figure, float) else figure), place


@pytest.mark.slow
def test_full_precision_federation_gives_all_away(full_llama, lora, tmp_path):
    report, trainer = audited(
        full_llama, tmp_path, lora, base_bits=32, adapter_bits=32, num_rounds=8, max_steps=4, audit_longer=4
    )
    assert [coalition.clients for coalition in report.coalitions] == [["site-0"]]
    for coalition in report.coalitions:
        stolen = coalition.stolen["loss"]
        assert coalition.num_proxies == 8 and 0.8 < stolen.value < 1.3 and stolen.low < 1.2
        assert set(coalition.attacks) >= {"last proxy", "mean of proxies", "moving average of proxies"}
        assert any("last proxy + 2 steps" in name for name in coalition.attacks)
        assert coalition.healed.attacker == pytest.approx(
            min(found["loss"] for found in coalition.local_only.values())
        )
    for found in (report.coalitions[0].attacks, report.coalitions[0].local_only):
        assert report.steps == 8 and sum(" + 8 steps at " in name for name in found) == 1
    # The base is the full model; but that is untrained, and no better than guessing.
    assert report.exposure.attacker == pytest.approx(report.exposure.server)
    assert report.exposure.value is None and "the owner's model" in report.exposure.reason.lower()
    # All that is needed to steal it left the owner.
    assert {(entry.part, entry.kind, entry.bits) for entry in report.sent} == {
        (part, "full_precision", 32.0) for part in ("base", "proxy")
    }
    text = (tmp_path / "report.md").read_text()
    assert "best attacker (one client)" in text and "stolen value" in text and "coalition of half" not in text
    # Measured the same way on both sides of the pipe.
    rows = choose_rows(trainer.eval_dataset, 16, trainer.args.seed)
    trainer.evaluate_proxy(trainer.server.adapter)
    assert measure_rows(trainer, rows).loss.mean() == pytest.approx(report.server["loss"], rel=1e-5)


@pytest.mark.slow
def test_cold_coarse_base_is_reported_as_such(tmp_path):
    """The negative control on real weights and text: without a remedy, training on a 2-bit base that does not know the
    task repairs the base, the clients' copy is the better model, and report and audit say so."""
    source = SHARED / "models" / "stories260K"
    if not source.is_dir():
        pytest.skip("the shared data folder is not beside the checkout")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in (SHARED / "data" / "rnnlg" / "train.jsonl").read_text().splitlines()]
    clients = {}
    for domain in ("hotel", "laptop", "restaurant", "tv"):
        texts = [f"{row['act']}\n{row['text']}" for row in rows if row["domain"] == domain][:128]
        ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        clients[domain] = Dataset.from_dict({"input_ids": ids, "labels": ids})
    held_out = concatenate_datasets([rows.select(range(120, 128)) for rows in clients.values()])
    args = FederatedConfig(
        str(tmp_path), num_rounds=3, max_steps=15, learning_rate=5e-3, base_bits=2, per_device_train_batch_size=8,
        audit=True, audit_steps=4, audit_rows=32, merge=False, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(
        str(source), args, train_dataset={name: rows.select(range(120)) for name, rows in clients.items()},
        eval_dataset=held_out, processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    last = trainer.server.store.records()[-1]["metrics"]
    assert last["proxy"]["eval_loss"] < last["server"]["eval_loss"]
    assert "repair the quantized base" in (tmp_path / "report.md").read_text()
    assert "The attacker's model is better than the server's" in (tmp_path / "audit.md").read_text()
    report = AuditReport.read(tmp_path)  # a base that looks worthless heals
    assert report.coalitions[0].healed.attacker < report.exposure.attacker - 0.5


@pytest.mark.slow
def test_what_is_never_broadcast_is_not_stolen(full_llama, lora, tmp_path):
    report, trainer = audited(
        full_llama, tmp_path, lora, broadcast="never", num_rounds=1, max_steps=8, audit_threshold=0.1,
        train_dataset={name: make_rows(8, seed=index) for index, name in enumerate("abcd")},
    )  # fmt: skip
    assert [len(coalition.clients) for coalition in report.coalitions] == [1, 2]
    for coalition in report.coalitions:
        assert coalition.num_proxies == 0 and coalition.attacks == {} and coalition.stolen["loss"].value == 0
        assert coalition.metrics["eval_loss"] > 0
    assert "Nothing was broadcast" in report.notes[0]
    # The manifest of what left: the base alone, whose bytes are those of its export.
    totals = read_manifest(tmp_path / "_federation" / "base")["totals"]
    assert {entry.part for entry in report.sent} == {"base"}
    assert sum(entry.bytes for entry in report.sent) == totals["information_bytes"]
    table = (tmp_path / "audit.md").read_text()
    assert "what clients hold" in table and "linear4bit" in table and "| proxy" not in table
    assert "best coalition of half (2 clients)" in (tmp_path / "report.md").read_text()

    # Coalitions of up to half of the clients count for the threshold, larger ones are shown.
    chosen = audit_federation(trainer, ["a", "ab", "abc", "abcd"])
    assert [coalition.clients for coalition in chosen.coalitions] == [
        list(names) for names in ("a", "ab", "abc", "abcd")
    ]
    assert chosen.worst_single.clients == ["a"] and chosen.worst_half.clients == ["a", "b"]

    broken = {key: value + 1 for key, value in trainer.server.adapter.items()}
    trainer.server.state = dataclasses.replace(trainer.server.state, adapter=broken)
    everyone = audit_federation(trainer, [list("abcd")])
    assert any("no better than the owner's was before" in note for note in everyone.notes)
    assert "is worse than" in everyone.coalitions[0].stolen["loss"].reason
    assert everyone.coalitions[0].clients == list("abcd") and everyone.worst_half is None
    assert everyone.summarize().attackers == []
    with pytest.raises(ValueError, match="'e' is unknown"):
        audit_federation(trainer, [["e"]])


@pytest.mark.slow
def test_threshold_fails_the_run_after_everything_is_written(full_llama, lora, tmp_path, capsys):
    with pytest.raises(RuntimeError, match=r"The audit fails: site-\d with `.*`: stolen value \d.*audit_threshold=5%"):
        audited(full_llama, tmp_path, lora, num_rounds=3, max_steps=4, audit_threshold=0.05, merge=True)
    for name in ("audit.md", "audit.json", "report.md", "adapter_model.safetensors", "_merged/config.json"):
        assert (tmp_path / name).is_file(), name
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path)])
    shown = capsys.readouterr()
    assert "# Model-privacy audit" in shown.out and "The audit fails" in shown.err
    main(["audit", str(tmp_path), "--threshold", "10"])

    damaged = json.loads((tmp_path / "audit.json").read_text())
    (tmp_path / "audit.json").write_text(json.dumps({**damaged, "federation_id": "another"}))
    with pytest.raises(ValueError, match="of another federation"):
        AuditReport.read(tmp_path)
    damaged["exposure"]["value"] = "1"
    (tmp_path / "audit.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="no audit of this version"):
        AuditReport.read(tmp_path)
    with pytest.raises(ValueError, match="--audit True"):
        AuditReport.read(tmp_path / "elsewhere")


@pytest.mark.slow
def test_classifiers_are_compared_by_accuracy_too(full_bert, tmp_path):
    data = make_labelled_rows()
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = FederatedTrainer(
        str(full_bert), make_args(tmp_path, num_rounds=1, audit=True, audit_steps=1, merge=False), train_dataset=data,
        eval_dataset=data, peft_config=lora, model_class=AutoModelForSequenceClassification,
    )  # fmt: skip
    trainer.train()
    report = AuditReport.read(tmp_path)
    assert set(report.coalitions[0].stolen) == set(report.server) == {"loss", "accuracy"}
    assert 24 * report.server["accuracy"] == pytest.approx(round(24 * report.server["accuracy"]))
    assert report.exposure.local_only == report.coalitions[0].healed.local_only == pytest.approx(np.log(3))
    assert (
        "| untouched " in (tmp_path / "audit.md").read_text()
        and "healed on one client's rows" in (tmp_path / "audit.md").read_text()
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"owner": None}, "set `full_model`"),
        ({"client_datasets": {}}, "they are elsewhere"),
        ({"args": {"world_size": 2}}, "2 processes; expected one"),
        ({"args": {"save_total_limit": 2}}, "save_total_limit=2: the audit rebuilds the proxy of each of 3 rounds"),
        ({"eval_dataset": None}, "expected one Dataset"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_the_rounds(change, words):
    options = {"world_size": 1, "broadcasts": True, "save_total_limit": None, "num_rounds": 3}
    fine = {"owner": object(), "client_datasets": {"a": []}, "eval_dataset": make_rows(3)}
    for harmless in ({}, {"save_total_limit": 3}, {"save_total_limit": 1, "broadcasts": False}):
        check_auditable(SimpleNamespace(**fine, args=SimpleNamespace(**options | harmless)))
    args = SimpleNamespace(**options | change.get("args", {}))
    with pytest.raises(ValueError, match=words):
        check_auditable(SimpleNamespace(**fine | change | {"args": args}))
