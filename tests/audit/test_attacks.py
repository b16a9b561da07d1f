# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Attackers hold what clients were sent, and make of it what they can."""

import pytest
import torch

from fedlpp_hf import load_base
from fedlpp_hf.audit.attacks import (
    MOST_PROXIES,
    average_proxies,
    combine_proxies,
    find_broadcasts,
    fine_tune,
    restore_proxies,
    smooth_proxies,
)
from fedlpp_hf.tensors.quantization import dequantize, quantize
from fedlpp_hf.wire.encoding import restore_tensors
from tests.helpers import assert_equal, make_trainer


def test_mean_of_proxies_of_one_adapter_is_the_proxy():
    """A deterministic quantizer makes the same error in each round: averaging gains nothing."""
    adapter = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    proxies = [{"x": dequantize(quantize(adapter, 2))} for _ in range(7)]
    for attack in (average_proxies, smooth_proxies):
        torch.testing.assert_close(attack(proxies)["x"], proxies[0]["x"])
    error = (proxies[0]["x"] - adapter).norm()
    assert (average_proxies(proxies)["x"] - adapter).norm() == pytest.approx(float(error))


def test_mean_of_proxies_with_independent_errors_comes_close():
    """√n closer: what an adapter that moves from round to round, or a random rounding, gives away."""
    generator = torch.Generator().manual_seed(0)
    adapter = torch.randn(4000, generator=generator)
    proxies = [{"x": adapter + torch.randn(4000, generator=generator)} for _ in range(16)]
    errors = [(found["x"] - adapter).norm() for found in (proxies[-1], average_proxies(proxies))]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_moving_average_weighs_later_proxies_more():
    proxies = [{"x": torch.tensor([float(value)])} for value in (0, 0, 8)]
    assert smooth_proxies(proxies)["x"].item() == 4
    assert smooth_proxies(proxies, decay=0.75)["x"].item() == 2


def test_choice_of_proxies_is_bounded_and_has_the_last():
    proxies = [{"x": torch.tensor([float(value)])} for value in range(40)]
    found = combine_proxies(proxies)
    assert found["last proxy"] is proxies[-1] and found["proxy 1 of 40"] is proxies[0]
    assert len(found) == MOST_PROXIES + 3
    assert found["mean of later half"]["x"].item() == 29.5
    assert combine_proxies([]) == {} and list(combine_proxies(proxies[:1])) == ["last proxy"]


@pytest.mark.parametrize(("broadcasts", "rounds"), [(True, [1, 2, 4]), (False, [])])
def test_broadcasts_are_those_of_the_rounds_a_client_was_asked_in(broadcasts, rounds):
    asked = [[], ["a"], ["a", "b"], ["b"], ["a"]]
    records = [{"round": number, "asked": clients} for number, clients in enumerate(asked)]
    assert find_broadcasts(records, ["a"], broadcasts) == rounds


@pytest.mark.parametrize(
    "options",
    [
        {"clients_per_round": 2, "adapter_bits": 2},
        {"aggregation": "exact"},
        {"broadcast": "never", "num_rounds": 1},
    ],
    ids=["sampled", "exact", "never"],
)
def test_restored_proxies_are_those_that_were_sent(llama_base, lora, tmp_path, options):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, **{"num_rounds": 4, "max_steps": 1, **options})
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
        found = restore_proxies(trainer.server, [client])
        if options.get("broadcast") == "never":
            assert found == [] and proxies == [None]
            continue
        assert len(found) == len(proxies) > 0
        for restored, proxy in zip(found, proxies, strict=True):
            assert_equal(restored, restore_tensors(proxy))
    together = restore_proxies(trainer.server, list(sent))
    assert len(together) == (0 if options.get("broadcast") == "never" else 4)


def test_fine_tuning_leaves_the_trainer_as_it_was(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    before = dict(vars(trainer.args)), list(trainer.client_datasets), list(trainer.callback_handler.callbacks)
    start = dict(trainer.guard.initial)
    found = fine_tune(trainer, trainer.client_datasets["site-0"], start, (2, 4), 1e-2, 0)
    assert list(found) == [2, 4] and not torch.equal(*(next(iter(adapter.values())) for adapter in found.values()))
    after = dict(vars(trainer.args)), list(trainer.client_datasets), list(trainer.callback_handler.callbacks)
    assert before == after
    trainer.guard.prove_base_unmoved()
    # A longer run begins as a shorter one, beyond an epoch too: eight rows are four steps.
    again = fine_tune(trainer, trainer.client_datasets["site-0"], start, (4, 10), 1e-2, 0)
    assert list(again) == [4, 10]
    assert_equal(found[4], again[4])
    shorter = fine_tune(trainer, trainer.client_datasets["site-0"], start, (10,), 1e-2, 0)
    longer = fine_tune(trainer, trainer.client_datasets["site-0"], start, (10, 24), 1e-2, 0)
    assert_equal(shorter[10], longer[10])
