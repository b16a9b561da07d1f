# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""W − λE in the owner's process: a model between the owner's and the clients', and the one that is merged in the end."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedlpp_hf import FederatedTrainer, export_base
from fedlpp_hf.processes.between import moved_towards_base, open_base
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.helpers import build_model, make_args, make_rows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_way_from_w_to_the_base_and_back(tmp_path, architecture):
    build_model(architecture).save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base", bits=3)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), lora)
    base = open_base(model, str(tmp_path / "base"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with moved_towards_base(model, base, 1.0):
        at_base = {name: value.clone() for name, value in model.state_dict().items()}
    with moved_towards_base(model, base, 0.25):
        between = {name: value.clone() for name, value in model.state_dict().items()}
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], at_base[name])}
    assert {name for name in before if ".lora_" in name or "norm" in name or "ln_" in name}.isdisjoint(moved)
    assert len(moved) >= 8 and any("embed" in name or "wte" in name for name in moved)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        torch.testing.assert_close(between[name], value + 0.25 * (at_base[name] - value), rtol=1e-5, atol=1e-7)


def test_w_comes_back_after_an_error(tmp_path, full_llama):
    export_base(full_llama, tmp_path / "base", bits=2)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(full_llama),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        moved_towards_base(model, open_base(model, str(tmp_path / "base")), 0.5),
    ):
        raise RuntimeError("out of memory")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_was_measured_is_what_is_merged(full_llama, lora, tmp_path):
    """The owner chooses λ; metrics, merged model, report and a second evaluation know it."""
    rows = make_rows()
    args = make_args(
        tmp_path / "out", base_bits=2, adapter_bits=32, num_rounds=1, base_weights=[0.5, 0.75], max_steps=4
    )
    trainer = FederatedTrainer(
        str(full_llama), args, train_dataset=rows, eval_dataset=rows, selection_dataset=rows, peft_config=lora
    )
    trainer.train()
    records = trainer.server.store.records()
    assert "selection_loss" in records[0] and records[1]["base_weight"] in (0.5, 0.75)
    state = trainer.server.state
    for weight in (0.0, 0.5, 0.75):  # the selection rows are those of the evaluation here
        (loss,) = trainer.owner.measure_selection(state.adapter, {}, [weight])
        assert loss == pytest.approx(trainer.owner.evaluate(state.adapter, None, weight)["eval_loss"], rel=1e-6)
    client = trainer.evaluate_proxy(state.adapter)["eval_loss"]
    assert trainer.owner.evaluate(state.adapter, None, 1.0)["eval_loss"] == pytest.approx(client, rel=1e-4)
    assert trainer.owner.evaluate(state.adapter)["eval_loss"] != pytest.approx(client, rel=1e-3)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / MERGED_DIR)
    plain = TrainingArguments(tmp_path / "plain", use_cpu=True, report_to=[], per_device_eval_batch_size=8)
    measured = Trainer(merged, plain, eval_dataset=rows).evaluate()["eval_loss"]
    assert measured == pytest.approx(trainer.evaluate_server()["eval_loss"], rel=1e-5)
    if state.base_weight:
        assert f"server's model without its adapter (λ = {state.base_weight:g})" in (
            tmp_path / "out" / "report.md"
        ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_choices_together_are_measured_and_merged(full_llama, lora, tmp_path):
    """Products are averaged, and what the rank can't hold is part of the scaled step; the references know none of the choices."""
    rows = make_rows()
    args = make_args(
        tmp_path / "out", base_bits=2, adapter_bits=32, broadcast="never", aggregation="exact", control_variate=1.0,
        base_weights=[0.0, 0.5], update_scales=[1.0, 0.5, 1.5, 3.0], compare_full_precision=True, max_steps=4, num_rounds=2,
    )  # fmt: skip
    trainer = FederatedTrainer(
        str(full_llama), args, train_dataset=rows, eval_dataset=rows, selection_dataset=rows, owner_dataset=rows, peft_config=lora
    )  # fmt: skip
    trainer.train()
    record = trainer.server.store.records()[find_published_round(args, trainer.server.store.records())]
    assert record["round"] and record["update_scale"] in args.update_scales and "variate_weight" in record
    assert trainer.server.state.residual
    assert record["metrics"]["server"]["eval_loss"] == pytest.approx(record["selection_loss"], rel=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / MERGED_DIR)
    plain = TrainingArguments(tmp_path / "plain", use_cpu=True, report_to=[], per_device_eval_batch_size=8)
    measured = Trainer(merged, plain, eval_dataset=rows).evaluate()["eval_loss"]
    assert measured == pytest.approx(record["selection_loss"], rel=1e-5)
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "full precision" in report and "owner's own rows alone" in report


def test_a_choice_needs_a_base_and_rows(full_llama, lora, tmp_path):
    rows = make_rows()
    with pytest.raises(ValueError, match=r"base_weights=\[0.5\]: the owner needs the base, too"):
        FederatedTrainer(
            str(full_llama),
            make_args(tmp_path, base_bits=32, base_weights=[0.5]),
            train_dataset=rows,
            peft_config=lora,
        )
    with pytest.raises(ValueError, match=r"base_weights=\[1.0\]; expected one or more numbers"):
        make_args(tmp_path, base_weights=[1.0])
