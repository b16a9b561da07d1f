# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers in other processes: what they inherit of this one's options, and what they must not."""

import pytest
import torch

from fedlpp_hf import FederatedTrainer
from fedlpp_hf.processes.blueprint import TrainerBlueprint
from tests.helpers import make_args, make_rows, task_of


OPTIONS = {"update_bits": 2, "update_density": 0.5, "robust": "median", "weighting": "uniform", "base_bits": 3}
DATASETS = {f"site-{number}": make_rows(8, seed=number) for number in range(3)}


@pytest.fixture
def blueprint(full_llama, llama_base, lora, tmp_path) -> TrainerBlueprint:
    options = {"audit": True, "compare_full_precision": True, "full_model": str(full_llama), "client_workers": 2}
    args = make_args(tmp_path / "out", adapter_bits=2, min_clients=2, **OPTIONS, **options)
    return TrainerBlueprint(str(full_llama), args, FederatedTrainer, None, lora, str(llama_base))


def test_reference_neither_compresses_nor_keeps_a_robust_rule(blueprint, tmp_path):
    reference = blueprint.build(DATASETS, tmp_path / "reference", reference=True)
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
def test_trainers_beside_this_one_have_no_owner_and_no_audit(blueprint, tmp_path, reference):
    before = {name: getattr(blueprint.args, name) for name in (*OPTIONS, "audit", "full_model", "min_clients")}
    beside = blueprint.build(
        {"site-0": make_rows(8)}, tmp_path / "beside", "" if reference else blueprint.base_dir, reference
    )
    args = beside.args
    assert beside.owner is None and args.full_model is None
    assert (args.audit, args.compare_full_precision, args.merge, args.client_workers) == (False, False, False, 1)
    assert args.report_to == [] and args.disable_tqdm
    assert args.min_clients == 1  # it holds one client
    assert {name: getattr(blueprint.args, name) for name in before} == before
    if not reference:
        assert {name: getattr(args, name) for name in OPTIONS} == OPTIONS
