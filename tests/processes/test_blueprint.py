# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers in other processes: what they inherit of this one's options, and what they must not."""

import pytest
import torch

from tests.helpers import make_rows, make_trainer, task_of


OPTIONS = {"update_bits": 2, "update_density": 0.5, "robust": "median", "weighting": "uniform", "base_bits": 3}


@pytest.fixture
def trainer(full_llama, lora, tmp_path):
    trainer = make_trainer(
        str(full_llama), tmp_path / "out", lora, eval_dataset=make_rows(6), audit=True, compare_full_precision=True,
        adapter_bits=2, min_clients=2, **OPTIONS,
    )  # fmt: skip
    yield trainer
    trainer.owner.close()


def test_reference_neither_compresses_nor_keeps_a_robust_rule(trainer, tmp_path):
    reference = trainer.blueprint.build(trainer.raw_datasets, tmp_path / "reference", reference=True)
    args = reference.args
    assert (args.base_bits, args.adapter_bits, args.update_bits, args.update_density) == (32, 32, 32, 1.0)
    assert (args.robust, args.num_attackers) == ("none", 0)
    task = task_of(reference)
    assert all(isinstance(value, torch.Tensor) for value in task.proxy.values())
    delta = reference.train_client(task).delta
    assert delta.keys() == reference.guard.parameters.keys()
    assert all(isinstance(value, torch.Tensor) for value in delta.values())
    assert not (tmp_path / "reference" / "_clients").exists()  # nothing was left of an update


@pytest.mark.parametrize("reference", [True, False])
def test_trainers_beside_this_one_have_no_owner_and_no_audit(trainer, tmp_path, reference):
    before = {name: getattr(trainer.args, name) for name in (*OPTIONS, "audit", "full_model", "min_clients")}
    one = dict([next(iter(trainer.raw_datasets.items()))])
    beside = trainer.blueprint.build(
        one, tmp_path / "beside", "" if reference else trainer.blueprint.base_dir, reference
    )
    args = beside.args
    assert beside.owner is None and args.full_model is None
    assert (args.audit, args.compare_full_precision, args.merge, args.client_workers) == (False, False, False, 1)
    assert args.report_to == [] and args.disable_tqdm
    assert args.min_clients == 1  # it holds one client
    assert {name: getattr(trainer.args, name) for name in before} == before
    if not reference:
        assert {name: getattr(args, name) for name in OPTIONS} == OPTIONS
