# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The audit on cases with known answers: attackers, stolen value and its interval, and whole federations."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorForSeq2Seq

from fedlpp_hf import AuditReport, FederatedConfig, FederatedTrainer, audit_federation, load_base
from fedlpp_hf.audit.attacks import (
    MOST_PROXIES,
    average_proxies,
    combine_proxies,
    find_broadcasts,
    fine_tune,
    restore_proxies,
    smooth_proxies,
)
from fedlpp_hf.audit.audit import _Scale
from fedlpp_hf.audit.stolen_value import estimate_stolen_value
from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.cli.main import main
from fedlpp_hf.processes.measurement import choose_rows, measure_rows
from fedlpp_hf.tensors.quantization import dequantize, quantize
from fedlpp_hf.wire.messages import restore_tensors

from .conftest import SHARED, make_rows
from .test_trainer import assert_equal, make_args, make_trainer


def rows(mean: float, count: int = 200, seed: int = 0, spread: float = 0.1) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal(count)


class TestStolenValue:
    def test_is_the_share_of_the_gain(self):
        noise = rows(0.0)
        for measure, sign in (("loss", -1), ("accuracy", 1)):
            stolen = estimate_stolen_value(
                {"weak": noise + sign * 0.1, "strong": noise + sign * 0.75}, {"base": noise}, noise + sign, measure
            )
            assert stolen.best_attack == "strong" and stolen.best_local == "base"
            # What all models find hard alike cancels.
            assert (stolen.value, stolen.low, stolen.high) == pytest.approx((0.75, 0.75, 0.75))
            assert stolen.server - stolen.local_only == pytest.approx(sign)

    @pytest.mark.parametrize("attacker, share", [(0.5, 1.5), (2.5, -0.5)])
    def test_is_clipped_nowhere(self, attacker, share):
        noise = rows(0.0)
        stolen = estimate_stolen_value({"a": noise + attacker}, {"base": noise + 2}, noise + 1)
        assert stolen.value == pytest.approx(share)

    def test_without_anything_sent_it_is_zero(self):
        stolen = estimate_stolen_value({}, {"base": rows(2.0), "trained": rows(1.5)}, rows(1.0, seed=1))
        assert (stolen.value, stolen.low, stolen.high, stolen.best_attack) == (0, 0, 0, "trained")

    @pytest.mark.parametrize("server, words", [(3.0, "is worse than"), (2.0, "can't be told from")])
    def test_without_a_gain_it_says_so_instead_of_a_number(self, server, words):
        stolen = estimate_stolen_value({"a": rows(1.0)}, {"base": rows(2.0, seed=1)}, rows(server, seed=2))
        assert stolen.value is stolen.low is stolen.high is None
        assert words in stolen.reason and "no value that could be stolen" in stolen.reason

    def test_draws_without_a_gain_do_not_spoil_the_interval(self):
        """Of 40 answers the server has five more right: one draw in 200 has none of these, and its share would be 0/0."""
        local, server = np.zeros(40), np.arange(40) < 5
        stolen = estimate_stolen_value({"a": server}, {"base": local}, server, "accuracy", resamples=2000)
        assert (stolen.value, stolen.low, stolen.high) == (1, 1, 1)

    def test_a_server_that_diverged_has_nothing_to_steal(self):
        server = rows(1.0)
        server[3] = np.nan
        stolen = estimate_stolen_value({"a": rows(1.5)}, {"base": rows(2.0)}, server)
        assert stolen.value is None and "NaN" in stolen.reason and np.isnan(stolen.server)

    def test_interval_contains_the_truth(self):
        """95 % of intervals should; of 60, fewer than 50 would be a fault (p < 1e-4)."""
        found = 0
        for seed in range(60):
            noise = rows(0.0, seed=seed, spread=0.5)
            attacker, local, server = (
                noise + rows(m, seed=1000 * k + seed) for k, m in ((1, 1.4), (2, 2.0), (3, 1.0))
            )
            stolen = estimate_stolen_value({"a": attacker}, {"base": local}, server, seed=seed, resamples=300)
            found += stolen.low <= 0.6 <= stolen.high
            assert 0 < stolen.high - stolen.low < 0.2
        assert found >= 50

    @pytest.mark.parametrize(
        "attack, local, words",
        [
            ({}, {}, "no local-only reference"),
            ({"a": rows(1.0, 3)}, {"base": rows(1.0)}, "one for each of 200 rows"),
            ({"a": rows(np.nan)}, {"base": rows(1.0)}, "`a` has a loss that is NaN"),
        ],
    )
    def test_bad_input_is_refused(self, attack, local, words):
        with pytest.raises(ValueError, match=words):
            estimate_stolen_value(attack, local, rows(1.0))


class TestAttacks:
    def test_mean_of_proxies_of_one_adapter_is_the_proxy(self):
        """A deterministic quantizer makes the same error in each round: averaging gains nothing."""
        adapter = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        proxies = [{"x": dequantize(quantize(adapter, 2))} for _ in range(7)]
        for attack in (average_proxies, smooth_proxies):
            torch.testing.assert_close(attack(proxies)["x"], proxies[0]["x"])
        error = (proxies[0]["x"] - adapter).norm()
        assert (average_proxies(proxies)["x"] - adapter).norm() == pytest.approx(float(error))

    def test_mean_of_proxies_with_independent_errors_comes_close(self):
        """√n closer: what an adapter that moves from round to round, or a random rounding, gives away."""
        generator = torch.Generator().manual_seed(0)
        adapter = torch.randn(4000, generator=generator)
        proxies = [{"x": adapter + torch.randn(4000, generator=generator)} for _ in range(16)]
        errors = [(found["x"] - adapter).norm() for found in (proxies[-1], average_proxies(proxies))]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)

    def test_moving_average_weighs_later_proxies_more(self):
        proxies = [{"x": torch.tensor([float(value)])} for value in (0, 0, 8)]
        assert smooth_proxies(proxies)["x"].item() == 4
        assert smooth_proxies(proxies, decay=0.75)["x"].item() == 2

    def test_choice_of_proxies_is_bounded_and_has_the_last(self):
        proxies = [{"x": torch.tensor([float(value)])} for value in range(40)]
        found = combine_proxies(proxies)
        assert found["last proxy"] is proxies[-1] and found["proxy 1 of 40"] is proxies[0]
        assert len(found) == MOST_PROXIES + 3
        assert found["mean of later half"]["x"].item() == 29.5
        assert combine_proxies([]) == {} and list(combine_proxies(proxies[:1])) == ["last proxy"]

    @pytest.mark.parametrize(
        "interval, anchors", [(1, [0, 1, 3]), (2, [0, 0, 2]), (3, [0, 0, 3]), (None, [])], ids=str
    )
    def test_broadcasts_are_those_of_the_rounds_a_client_was_asked_in(self, interval, anchors):
        asked = [[], ["a"], ["a", "b"], ["b"], ["a"]]
        records = [{"round": number, "asked": clients} for number, clients in enumerate(asked)]
        assert [anchor for _, _, anchor in find_broadcasts(records, ["a"], interval)] == anchors


@pytest.mark.parametrize(
    "options",
    [
        {"clients_per_round": 2, "adapter_bits": 2},
        {"broadcast": "2", "server_momentum": 0.5},
        {"client_ranks": {"site-1": 2}, "aggregation": "fedavg"},
        {"broadcast": "never"},
    ],
    ids=["sampled", "every-2", "ranks", "never"],
)
def test_restored_proxies_are_those_that_were_sent(llama_base, lora, tmp_path, options):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=4, max_steps=1, **options)
    sent = {client: [] for client in trainer.client_datasets}
    train_client = trainer.train_client

    def spy(task):
        sent[task.client_id].append(task.proxy)
        update = train_client(task)
        if task.round == 2 and task.client_id == "site-0":  # whoever is rejected has the proxy nevertheless
            object.__setattr__(update, "num_examples", 10**6)
        return update

    trainer.train_client = spy
    trainer.train()
    for client, proxies in sent.items():
        expected = []
        for proxy in proxies:
            if proxy is not None:
                tensors = restore_tensors(proxy)
                if not expected or any(not torch.equal(tensors[key], expected[-1][key]) for key in tensors):
                    expected.append(tensors)
        found = restore_proxies(trainer.server, [client])
        assert len(found) == len(expected) == (0 if options.get("broadcast") == "never" else len(expected))
        for left, right in zip(found, expected, strict=True):
            if client == "site-1" and "client_ranks" in options:
                continue  # in the server's shapes, compared below
            assert_equal(left, right)
    if "client_ranks" in options:
        key = next(key for key in found[-1] if "lora_A" in key)
        low = restore_proxies(trainer.server, ["site-1"])[-1][key]
        assert low[:2].any() and not low[2:].any()
        # Together they have what the highest rank was sent.
        assert_equal(restore_proxies(trainer.server, ["site-0", "site-1"])[-1], found[-1])


def test_keyed_proxies_are_each_clients_own_and_the_same_in_each_round(llama_base, lora, tmp_path):
    """Neither client can make its error smaller over the rounds; together they can: the audit's coalition does so."""
    options = {"keyed_rounding": True, "adapter_bits": 2, "num_rounds": 4, "learning_rate": 1e-4, "max_steps": 1}
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, **options)
    sent = {client: [] for client in trainer.client_datasets}
    train_client = trainer.train_client

    def spy(task):
        sent[task.client_id].append(restore_tensors(task.proxy))
        return train_client(task)

    trainer.train_client = spy
    trainer.train()
    adapters = [trainer.server.store.load(number)[0] for number in range(4)]
    alone = {client: restore_proxies(trainer.server, [client]) for client in sent}
    together = restore_proxies(trainer.server, list(sent))
    for client, proxies in sent.items():
        for mine, restored in zip(proxies, alone[client], strict=True):
            assert_equal(mine, restored)
    key = next(key for key in adapters[0] if "lora_A" in key)
    assert not torch.equal(sent["site-0"][0][key], sent["site-1"][0][key])

    def error(proxies):
        return float((torch.stack([proxy[key] for proxy in proxies]).mean(0) - adapters[-1][key]).norm())

    one = error(alone["site-0"][-1:])
    assert error(alone["site-0"]) == pytest.approx(one, rel=0.1)  # the adapter moves little, and so does its rounding
    assert one / error(together[-1:]) == pytest.approx(len(sent) ** 0.5, rel=0.15)
    # The key is the owner's: nothing that goes to a client has it, and a resumed federation goes on with it.
    record = json.loads((tmp_path / "_federation" / "federation.json").read_text())
    assert (
        bytes.fromhex(record["rounding_key"]) == trainer.server.rounding_key and len(trainer.server.rounding_key) == 32
    )


class TestMeasurement:
    def test_rows_of_a_batch_are_those_one_by_one(self, llama_base, lora, tmp_path):
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

    def test_an_overridden_loss_counts(self, llama_base, lora, tmp_path):
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

    def test_chosen_rows_depend_on_seed_and_length_alone(self):
        data = make_rows(20)
        chosen = choose_rows(data, 6, 3)
        assert len(chosen) == 6 and chosen[:] == choose_rows(data, 6, 3)[:]
        assert chosen[:] != choose_rows(data, 6, 4)[:]
        assert len(choose_rows(data, 50, 0)) == 20
        for bad in (None, {"a": data}):
            with pytest.raises(ValueError, match="expected one Dataset"):
                choose_rows(bad, 1, 0)


def test_fine_tuning_leaves_the_trainer_as_it_was(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    before = dict(vars(trainer.args)), list(trainer.client_datasets), list(trainer.callback_handler.callbacks)
    start = dict(trainer.guard.initial)
    found = fine_tune(trainer, trainer.client_datasets["site-0"], start, 4, 1e-2, 0)
    assert list(found) == [2, 4] and not torch.equal(*(next(iter(adapter.values())) for adapter in found.values()))
    after = dict(vars(trainer.args)), list(trainer.client_datasets), list(trainer.callback_handler.callbacks)
    assert before == after
    trainer.guard.prove_base_unmoved()
    again = fine_tune(trainer, trainer.client_datasets["site-0"], start, 4, 1e-2, 0)
    assert_equal(found[4], again[4])


def test_attacker_that_diverges_is_named_and_not_counted(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(6))
    broken = {key: value * np.inf for key, value in trainer.guard.initial.items()}
    diverged = []
    found = _Scale(trainer, make_rows(6)).measure_all({"fine": dict(trainer.guard.initial), "bad": broken}, diverged)
    assert list(found) == ["fine"] and diverged == ["bad"]


def audited(full_llama, tmp_path, lora, **options):
    """A federation with an audit at its end; the report, and the trainer."""
    options = {"audit": True, "audit_steps": 2, "audit_rows": 16, "merge": False, **options}
    trainer = make_trainer(str(full_llama), tmp_path, lora, eval_dataset=make_rows(24, seed=1), **options)
    trainer.train()
    return AuditReport.read(tmp_path), trainer


def test_full_precision_federation_gives_all_away(full_llama, lora, tmp_path):
    report, trainer = audited(
        full_llama, tmp_path, lora, base_bits=32, adapter_bits=32, num_rounds=8, max_steps=4, audit_clients=2
    )
    assert [coalition.clients for coalition in report.coalitions] == [["site-0"], ["site-1"]]
    for coalition in report.coalitions:
        stolen = coalition.stolen["loss"]
        assert coalition.num_proxies == 8 and 0.8 < stolen.value < 1.3 and stolen.low < 1.2
        assert set(coalition.attacks) >= {"last proxy", "mean of proxies", "moving average of proxies"}
        assert any("last proxy + 2 steps" in name for name in coalition.attacks)
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


def test_coalitions_of_every_size(full_llama, lora, tmp_path):
    """Those of up to half of the clients count for the threshold, larger ones are shown."""
    report, _ = audited(
        full_llama, tmp_path, lora, num_rounds=1, max_steps=4, audit_steps=1, audit_coalitions="all",
        train_dataset={name: make_rows(8, seed=index) for index, name in enumerate("abcd")},
    )  # fmt: skip
    assert [len(coalition.clients) for coalition in report.coalitions] == [1, 2, 3, 4]
    assert len(report.worst_half.clients) == 2


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

    trainer.server.adapter = {key: value + 1 for key, value in trainer.server.adapter.items()}  # a broken server
    everyone = audit_federation(trainer, [list("abcd")])
    assert any("no better than the owner's was before" in note for note in everyone.notes)
    assert "is worse than" in everyone.coalitions[0].stolen["loss"].reason
    assert everyone.coalitions[0].clients == list("abcd") and everyone.worst_half is None
    assert everyone.summarize() == []
    with pytest.raises(ValueError, match="'e' is unknown"):
        audit_federation(trainer, [["e"]])


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


def test_classifiers_are_compared_by_accuracy_too(full_bert, tmp_path):
    data = make_rows(24)
    labels = [row["input_ids"][0] % 3 for row in data]
    data = data.remove_columns("labels").add_column("labels", labels)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = FederatedTrainer(
        str(full_bert), make_args(tmp_path, num_rounds=1, audit=True, audit_steps=1, merge=False), train_dataset=data,
        eval_dataset=data, peft_config=lora, model_class=AutoModelForSequenceClassification,
    )  # fmt: skip
    trainer.train()
    report = AuditReport.read(tmp_path)
    assert set(report.coalitions[0].stolen) == set(report.server) == {"loss", "accuracy"}
    assert 24 * report.server["accuracy"] == pytest.approx(round(24 * report.server["accuracy"]))
    assert report.exposure.local_only == pytest.approx(np.log(3))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"owner": None}, "set `full_model`"),
        ({"client_datasets": {}}, "they are elsewhere"),
        ({"args": SimpleNamespace(world_size=2)}, "runs in one process"),
        ({"eval_dataset": None}, "expected one Dataset"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_the_rounds(change, words):
    from fedlpp_hf.audit.audit import check_auditable

    fine = {"owner": object(), "client_datasets": {"a": []}, "args": SimpleNamespace(world_size=1)}
    check_auditable(SimpleNamespace(**fine, eval_dataset=make_rows(3)))
    with pytest.raises(ValueError, match=words):
        check_auditable(SimpleNamespace(**{**fine, "eval_dataset": make_rows(3), **change}))


def test_threshold_without_audit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set audit=True"):
        make_args(tmp_path, audit_threshold=0.1)
