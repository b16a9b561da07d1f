# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the clients' process never sees, and what the owner's process does when asked."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from fedlpp_hf import FederatedTrainer
from fedlpp_hf.aggregation.variate import average_variates
from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.processes.owner_handler import OwnerHandler
from fedlpp_hf.tensors import scratch
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.faults import KILLED
from tests.helpers import ROOT, assert_equal, make_args, make_labelled_rows, make_pair, make_rows, read_files


@pytest.fixture(scope="module")
def private_run(full_llama, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("private") / "out"
    subprocess.run(
        [sys.executable, "-m", "tests.processes.private_run", str(full_llama), str(output_dir)], check=True, cwd=ROOT
    )
    return output_dir


def test_clients_process_never_opens_the_full_model(private_run, full_llama):
    opened = json.loads((private_run / "opened.json").read_text())
    weights = [path for path in opened if path.startswith(str(full_llama)) and not path.endswith(".json")]
    assert weights == []
    # The watch itself works: it saw the base being read.
    assert any(path.endswith("_federation/base/model.safetensors") for path in opened)


def test_clients_process_holds_no_full_precision_matrix(private_run, full_llama):
    held = load_file(private_run / "held.safetensors").values()
    full = {name: tensor for name, tensor in load_file(full_llama / "model.safetensors").items() if tensor.dim() >= 2}
    compared = 0
    for name, weight in full.items():
        for tensor in held:
            for candidate in (tensor, tensor.T) if tensor.dim() == 2 else (tensor,):
                if candidate.shape == weight.shape:
                    compared += 1
                    distance = (candidate - weight).norm() / weight.norm()
                    assert distance > 0.05, f"a tensor within {distance:.1%} of {name}"
    assert compared >= 2  # the embeddings and the head at least are floats, of reduced information


def test_nothing_of_the_owners_is_written_where_clients_read(private_run, full_llama):
    for path in (private_run / "_federation").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(full_llama).encode() not in content, path
            assert b"hf_secret_token" not in content, path
    config = json.loads((private_run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_owner_evaluates_and_merges_the_full_model(private_run, full_llama):
    """The server's metric is that of W + θ, and the merged model is W + θ, too."""
    record = json.loads((private_run / "_federation/rounds/round-00001/round.json").read_text())
    full = AutoModelForCausalLM.from_pretrained(full_llama)
    served = PeftModel.from_pretrained(full, private_run).eval()
    merged = AutoModelForCausalLM.from_pretrained(private_run / MERGED_DIR).eval()
    rows = make_rows().remove_columns("client").with_format("torch")[:]
    with torch.no_grad():
        outputs, expected = merged(**rows), served(**rows)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert float(expected.loss) == pytest.approx(record["metrics"]["server"]["eval_loss"], rel=1e-4)


def test_the_owners_head_is_where_the_server_starts(full_bert, tmp_path):
    """A classifier's head is trained by clients; the server starts from the owner's own, clients from a reduced one."""
    data = make_labelled_rows()
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = FederatedTrainer(
        str(full_bert), make_args(tmp_path, num_rounds=1, broadcast="never"), train_dataset=data, eval_dataset=data,
        owner_dataset=data.select(range(6)), peft_config=lora, model_class=AutoModelForSequenceClassification,
    )  # fmt: skip
    trainer.train()
    key = "base_model.model.classifier.weight"
    own = load_file(full_bert / "model.safetensors")["classifier.weight"]
    start = read_adapter(trainer.server.store.round_dir(0))[0]
    assert torch.equal(start[key], own)
    assert not torch.equal(trainer.guard.initial[key], own)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / MERGED_DIR)
    torch.testing.assert_close(merged.classifier.weight.detach(), read_adapter(tmp_path)[0][key])


def test_owner_that_dies_is_reported(full_llama, llama_base, lora, tmp_path):
    rows = make_rows()
    args = make_args(tmp_path, num_rounds=1, full_model=str(full_llama))
    trainer = FederatedTrainer(str(llama_base), args, train_dataset=rows, eval_dataset=rows, peft_config=lora)
    trainer.owner._service._process.kill()
    with pytest.raises(RuntimeError, match="owner's process died"):
        trainer.train()


def test_what_cannot_cross_to_the_owner_is_explained(full_llama, lora, tmp_path):
    lock = threading.Lock()
    with pytest.raises(ValueError, match="The owner's process can't be given what it needs .*lock"):
        FederatedTrainer(
            str(full_llama),
            make_args(tmp_path),
            train_dataset=make_rows(),
            peft_config=lora,
            compute_metrics=lambda prediction: {"locked": lock.locked()},
        )


def federate_alone(full_llama, lora, output_dir, **options):
    """A federation whose only client has the owner's rows and, by its name, the owner's seeds."""
    rows = make_rows().remove_columns("client")
    args = make_args(output_dir, full_model=str(full_llama), adapter_bits=32, base_bits=2, merge=False, **options)
    trainer = FederatedTrainer(
        str(full_llama), args, train_dataset={"owner": rows}, eval_dataset=rows, owner_dataset=rows, peft_config=lora
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"aggregation": "exact", "num_rounds": 1}], ids=["factors", "products"])
def test_control_variate_takes_the_quantizers_part_out_of_the_update(full_llama, lora, tmp_path, options):
    """Where the owner's estimate is exact, Δ(Q(W)) − (Δ(Q(W)) − Δ(W)), the server's adapter is that of full precision."""
    lora.lora_dropout = 0.1  # the same masks on both sides, or the difference is noise
    corrected = federate_alone(full_llama, lora, tmp_path / "corrected", control_variate=1.0, **options)
    naive = federate_alone(full_llama, lora, tmp_path / "naive", **options)
    reference = corrected.owner.run_reference(own_rows=True)["eval_loss"]
    records = corrected.server.store.records()
    assert records[-1]["metrics"]["server"]["eval_loss"] == pytest.approx(reference, rel=1e-5)
    assert naive.server.store.records()[-1]["metrics"]["server"]["eval_loss"] != pytest.approx(reference, rel=1e-3)
    assert records[1]["variate_norm"] > 0.0 and records[1]["update_norm" if not options else "product_norm"] > 0.0


@pytest.mark.slow
def test_an_estimate_that_was_begun_ahead_has_the_same_bits(full_llama, lora, tmp_path):
    trainer = federate_alone(full_llama, lora, tmp_path, control_variate=1.0, num_rounds=1, max_steps=1)
    owner, (start, _) = trainer.owner, trainer.server.store.load(0)
    owner.works_ahead = True
    expected, share = owner.estimate_variate(start, 1, [3])
    owner.begin_variate(start, 1, [3])
    assert owner._begun is not None
    variate, same = owner.estimate_variate(start, 1, [3])
    assert_equal(variate, expected)
    assert share == same and owner._begun is None
    # Another question in between waits for it, and gets its own answer.
    owner.begin_variate(start, 1, [3])
    assert "eval_loss" in owner.evaluate(start)
    owner._service.send = None  # it was computed once
    assert_equal(owner.estimate_variate(start, 1, [3])[0], expected)
    del owner._service.send
    # A round that failed leaves an answer behind that nobody wants.
    owner.begin_variate(start, 1, [4])
    assert_equal(owner.estimate_variate(start, 1, [3])[0], expected)
    owner.begin_variate(start, 2, [4])
    owner.begin_variate(start, 1, [3])
    assert_equal(owner.estimate_variate(start, 1, [3])[0], expected)
    owner.works_ahead = False
    owner.begin_variate(start, 1, [3])
    assert owner._begun is None


@pytest.mark.slow
def test_control_variate_of_several_runs(full_llama, lora, tmp_path):
    """More runs of other batches: the server asks for as many, and gets their mean."""
    trainer = federate_alone(
        full_llama, lora, tmp_path, control_variate=1.0, control_variate_runs=3, num_rounds=1, max_steps=1
    )
    start, _ = trainer.server.store.load(0)
    alone = [trainer.owner.estimate_variate(start, 1, [seed]) for seed in (3, 4, 5)]
    assert {share for _, share in alone} == {1.0}
    together, share = trainer.owner.estimate_variate(start, 1, [3, 4, 5])
    expected, expected_share = average_variates([variate for variate, _ in alone])
    assert share == pytest.approx(expected_share, rel=1e-4) and 0 < share < 1
    for key, value in together.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-7)
    asked = []
    trainer.server.owner.estimate_variate = lambda start, number, seeds: asked.append(seeds) or (together, share)
    trainer.args.overwrite = True
    records = trainer.server.run(lambda tasks: map(trainer.train_client, tasks))
    assert len(asked) == 1 and len(set(asked[0])) == 3
    assert records[1]["variate_share"] == share


def test_the_owner_calibrates_the_base_on_its_rows(full_llama, llama_base, lora, tmp_path):
    rows = make_rows().remove_columns("client")
    given = {"train_dataset": {"site": rows}, "peft_config": lora}
    args = make_args(
        tmp_path / "run", base_bits=3, calibration_rows=7, control_variate=1.0, num_rounds=1, max_steps=1, merge=False
    )
    trainer = FederatedTrainer(str(full_llama), args, owner_dataset=rows, **given)
    manifest = read_manifest(trainer.blueprint.base_dir)
    assert manifest["calibration"] == {"rows": 7, "not_reached": []}
    assert trainer.guard.fingerprint == manifest["fingerprint"]
    trainer.train()
    assert trainer.server.store.records()[1]["variate_norm"] > 0  # the owner has trained on that base, too
    trainer.owner.close()
    with pytest.raises(ValueError, match="calibration_rows=7 needs rows of the owner; `owner_dataset` is none"):
        FederatedTrainer(str(full_llama), make_args(tmp_path / "none", calibration_rows=7), **given)
    with pytest.raises(ValueError, match="calibration_rows=7, but model=.* is a base already"):
        FederatedTrainer(
            str(llama_base), make_args(tmp_path / "base", calibration_rows=7), owner_dataset=rows, **given
        )


def test_control_variate_without_what_it_needs_is_refused(full_llama, llama_base, lora, tmp_path):
    rows = make_rows()
    with pytest.raises(ValueError, match="control_variate=1.0 needs rows of the owner; pass `owner_dataset`"):
        FederatedTrainer(
            str(full_llama), make_args(tmp_path, control_variate=1.0), train_dataset=rows, peft_config=lora
        )
    trainer = FederatedTrainer(
        str(llama_base), make_args(tmp_path, control_variate=1.0), train_dataset=rows, peft_config=lora
    )
    with pytest.raises(ValueError, match="set `full_model`"):
        trainer.train()


@pytest.mark.slow
def test_what_could_not_be_merged_is_refused_when_the_trainer_is_made(full_llama, llama_base, lora, tmp_path):
    """The base was exported before; transformers loads this full model, and a merge does not."""
    LlamaForCausalLM.from_pretrained(full_llama).save_pretrained(tmp_path / "full", max_shard_size="60KB")
    index = tmp_path / "full" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    args = make_args(tmp_path / "out", full_model=str(tmp_path / "full"))
    with pytest.raises(ValueError, match=r"has `model\.norm\.weight`, which .* does not place there"):
        FederatedTrainer(str(llama_base), args, train_dataset=make_rows(), peft_config=lora)
    assert not list((tmp_path / "out").rglob("round.json"))


@pytest.mark.parametrize("killed_at", ["old aside", "new in", "old removed"])
def test_a_merge_that_is_killed_loses_no_model(tmp_path, monkeypatch, killed_at):
    """Killed before a step of the exchange: a whole model is there, and the next merge leaves one directory."""
    full, adapter, _ = make_pair(tmp_path / "pair")
    out, aside = tmp_path / "out" / MERGED_DIR, tmp_path / "out" / f".{MERGED_DIR}.replaced"
    blueprint = SimpleNamespace(full_model=str(full), init_kwargs={}, choose_class=lambda config: AutoModelForCausalLM)
    handler = OwnerHandler(blueprint, tmp_path / "scratch")
    handler.merge({}, str(adapter), str(out), 0.0)
    whole = read_files(out)
    (out / "earlier").touch()  # tells the old one from the new one
    rename, remove = os.rename, scratch.shutil.rmtree

    def die_in_rename(source, target):
        if Path(target) == {"old aside": aside, "new in": out}.get(killed_at):
            os._exit(KILLED)
        rename(source, target)

    def die_in_remove(path, *args, **kwargs):
        if killed_at == "old removed" and path == aside and aside.exists():
            os._exit(KILLED)
        remove(path, *args, **kwargs)

    pid = os.fork()
    if not pid:
        try:
            os.rename, scratch.shutil.rmtree = die_in_rename, die_in_remove
            handler.merge({}, str(adapter), str(out), 0.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
    left = {path.name for path in out.parent.iterdir()}
    there = {"old aside": {out.name}, "new in": {aside.name}, "old removed": {out.name, aside.name}}[killed_at]
    assert left == there | {f".{MERGED_DIR}.merging"}
    with monkeypatch.context() as patch:  # one that fails gives back the model of the run before
        patch.setattr("fedlpp_hf.processes.owner_handler.merge_adapter", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handler.merge({}, str(adapter), str(out), 0.0)
    assert [path.name for path in out.parent.iterdir()] == [MERGED_DIR]
    assert (out / "earlier").exists() == (killed_at != "old removed")
    handler.merge({}, str(adapter), str(out), 0.0)
    assert [path.name for path in out.parent.iterdir()] == [MERGED_DIR] and read_files(out) == whole
