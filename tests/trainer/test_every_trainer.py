# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Every trainer of transformers, TRL and sentence-transformers trains a federation, on every kind of model."""

import math

import pytest
import torch
import transformers
from transformers import AutoConfig

from fedlpp_hf import export_base
from fedlpp_hf.client.checks import find_peft_model
from fedlpp_hf.config.metrics import MetricChoice
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.lora import PREFIX
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.helpers import ROOT, assert_equal, make_args, make_tokenizer
from tests.trainer.cases import find_trainer, list_cases, make_rows, render_table


CASES = {case.name: case for case in list_cases()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Finds the full model and the base of a case, each made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(case):
        full, base = folder / case.stored, folder / f"{case.stored}-base"
        if not full.exists():
            case.build_model().save_pretrained(full)
            make_tokenizer().save_pretrained(full)
            export_base(full, base)
        return full, base

    return find


def make_case_trainer(case, model, output_dir, selection_dataset=None, **options):
    """The trainer of a case, of two clients and two rounds."""
    config_class, trainer_class = find_trainer(case.trainer)
    options = {"num_clients": 2, "partition": "iid", "max_steps": 4, "bf16": False, **case.options, **options}
    return trainer_class(
        str(model),
        make_args(output_dir, config_class, **options),
        train_dataset=make_rows(case.rows, 0),
        eval_dataset=make_rows(case.rows, 1),
        peft_config=case.peft_config,
        selection_dataset=selection_dataset,
        **case.make_arguments(),
    )


@pytest.mark.parametrize("name", CASES)
def test_trains_a_federation(name, checkpoints, tmp_path):
    case = CASES[name]
    full, base = checkpoints(case)
    trainer = make_case_trainer(case, base, tmp_path / "out")
    trained = find_peft_model(trainer.model).get_base_model()
    assert type(trained).__name__ == (case.loaded or case.stored)
    trainer.train()
    assert [len(rows) > 1 for rows in trainer.client_datasets.values()] == [True, True]
    start, end = trainer.guard.initial, trainer.server.adapter
    assert {key for key in end if torch.equal(start[key], end[key])} == set()
    records = trainer.server.store.records()
    assert all(client["steps"] == 4 for client in records[-1]["clients"].values())
    before, after = (record["metrics"]["proxy"] for record in (records[0], records[-1]))
    assert all(math.isfinite(value) for value in (*before.values(), *after.values()))
    assert not case.learns or after["eval_loss"] < before["eval_loss"]
    assert MetricChoice().main(after) == case.headline
    assert f"| {case.headline.removeprefix('eval_')} " in (tmp_path / "out" / "report.md").read_text()
    # The result is a plain PEFT repository, and fits the full model.
    merge_adapter(full, tmp_path / "out", tmp_path / "merged", model_class=type(trained))
    merged, info = type(trained).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert info["missing_keys"] == set() == info["mismatched_keys"]
    for key, value in end.items():
        if ".lora_" not in key:
            name = key.removeprefix(PREFIX)
            assert torch.equal(merged.get_parameter(name), value), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.with_owner])
def test_with_the_full_model(name, checkpoints, tmp_path):
    """The owner's process loads the same class, starts at the same head, evaluates and merges."""
    case = CASES[name]
    full, _ = checkpoints(case)
    trainer = make_case_trainer(case, full, tmp_path, num_rounds=1, max_steps=2, adapter_bits=32, embedding_bits=32)
    trainer.train()
    assert type(find_peft_model(trainer.model).get_base_model()).__name__ == (case.loaded or case.stored)
    start, _ = trainer.server.store.load(0)
    assert_equal(start, trainer.guard.initial)
    for record in trainer.server.store.records():
        server, proxy = record["metrics"]["server"], record["metrics"]["proxy"]
        assert server.keys() == proxy.keys()
        assert server["eval_loss"] == pytest.approx(
            proxy["eval_loss"], rel=0.2, abs=0.05
        )  # they differ by a quantizer
    merged = tmp_path / MERGED_DIR
    _, info = getattr(transformers, case.loaded or case.stored).from_pretrained(merged, output_loading_info=True)
    assert info["missing_keys"] == set()
    config = AutoConfig.from_pretrained(merged)
    for option, value in case.make_arguments().get("model_init_kwargs", {}).items():
        assert getattr(config, option) == value
    trainer.owner.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "DPOTrainer-LlamaForCausalLM-reference_computed_before",
        "SentenceTransformerTrainer-BertModel",
        "Seq2SeqTrainer-T5ForConditionalGeneration",
        "ViTForImageClassification",
    ],
)
def test_the_owner_chooses_by_its_selection_rows(name, checkpoints, tmp_path):
    """On the trainer's own loss, with the full model moved towards the base."""
    case = next(case for label, case in CASES.items() if label.endswith(name))
    full, _ = checkpoints(case)
    options = {"num_rounds": 1, "max_steps": 2, "broadcast": "never", "base_bits": 3, "base_weights": [0.25, 0.75]}
    trainer = make_case_trainer(case, full, tmp_path, selection_dataset=make_rows(case.rows, 2), **options)
    trainer.train()
    first, last = trainer.server.store.records()
    assert math.isfinite(first["selection_loss"]) and math.isfinite(last["selection_loss"])
    assert last["base_weight"] in (0.25, 0.75)
    losses = trainer.owner.measure_selection(trainer.server.store.load(1)[0], {}, [0.25, 0.75])
    assert last["selection_loss"] == pytest.approx(min(losses), rel=1e-4) and losses[0] != losses[1]
    trainer.owner.close()


def test_the_docs_have_this_table():
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert render_table() in page, (
        "replace the table in docs/trainers.md by what `python -m tests.trainer.cases` prints"
    )
