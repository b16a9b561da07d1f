# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters that are made to leak, and honest ones, which must pass."""

import math
from dataclasses import replace

import pytest
import torch

from fedlpp_hf.client.proxy_check import EarlierRound, check_proxy, is_rank_one
from fedlpp_hf.tensors.quantization import quantize_tensors
from fedlpp_hf.wire.messages import ClientTask, LocalOptions


A, B, HEAD = (f"base_model.model.layer.{name}.weight" for name in ("q.lora_A", "q.lora_B", "head"))
RANK, INPUTS, OUTPUTS = 4, 64, 48


def draw(*shape, size=1.0, seed=0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INITIAL = {A: draw(RANK, INPUTS, size=0.1), B: torch.zeros(OUTPUTS, RANK), HEAD: draw(3, OUTPUTS, size=0.1)}
TRAINED = {A: INITIAL[A] + draw(RANK, INPUTS, size=0.01, seed=1), B: draw(OUTPUTS, RANK, size=0.01, seed=2)}
TRAINED[HEAD] = INITIAL[HEAD] + draw(3, OUTPUTS, size=0.01, seed=3)
STEPS = {key: float((TRAINED[key] - INITIAL[key]).norm()) for key in TRAINED}


def task_of(proxy, number=1, rule="fedavg"):
    return ClientTask("f", number, 9, "site", 1, "a" * 64, proxy, LocalOptions(rule=rule))


def check(proxy, number=1, earlier=None, rule="fedavg", max_change=10.0):
    check_proxy(task_of(proxy, number, rule), INITIAL, earlier, max_change)


def one_hot(rows, columns):
    matrix = torch.zeros(rows, columns)
    matrix[torch.arange(rows), torch.arange(rows) * 3] = math.sqrt(columns) * 0.1
    return matrix


@pytest.mark.parametrize("bits", [32, 8, 4, 3, 2, 1])
def test_honest_rounds_pass(bits):
    """Round 1 with B = 0, the next, one that was missed, and the first that a client is asked in."""

    def send(adapter):
        return adapter if bits == 32 else quantize_tensors(adapter, bits, 64)

    check(send(INITIAL))
    earlier = EarlierRound(1, task_of(send(INITIAL)).proxy_tensors(), STEPS)
    check(send(TRAINED), 2, earlier)
    further = {key: INITIAL[key] + 3 * (TRAINED[key] - INITIAL[key]) for key in INITIAL}
    check(send(further), 4, replace(earlier, round=2, proxy=task_of(send(TRAINED)).proxy_tensors()))
    check(send(further), 4)


def test_adapter_that_was_trained_before_may_start_so():
    trained = INITIAL | {B: TRAINED[B]}
    check_proxy(task_of(trained), trained, None, 10.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({A: torch.zeros(RANK, INPUTS)}, "lora_A.weight` is all zero"),
        ({HEAD: torch.zeros(3, OUTPUTS)}, "head.weight` is all zero"),
        ({B: TRAINED[B]}, "lora_B.weight` is not zero in round 1"),
        ({A: one_hot(RANK, INPUTS)}, r"reads 1.0 of its 64 inputs"),
        ({A: INITIAL[A][:1].repeat(RANK, 1)}, "rows that depend on each other"),
        ({A: INITIAL[A] * 1000}, "lora_A.weight` has moved"),
        ({HEAD: INITIAL[HEAD] * 1000}, "head.weight` has moved"),
        ({A: INITIAL[A].clone().fill_(math.nan)}, "NaN or infinite"),
        ({A: draw(RANK + 1, INPUTS)}, r"has shape \(5, 64\); expected \(4, 64\)"),
        ({"base_model.model.layer.v.lora_A.weight": draw(RANK, INPUTS)}, "unknown: .*layer.v.lora_A"),
    ],
)
def test_first_round_that_is_made_to_leak(changed, message):
    with pytest.raises(ValueError, match=message):
        check(INITIAL | changed)


def test_missing_target():
    with pytest.raises(ValueError, match="missing: .*lora_B"):
        check({key: value for key, value in INITIAL.items() if key != B})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({B: torch.zeros(OUTPUTS, RANK)}, "lora_B.weight` is all zero, but was trained"),
        ({B: draw(OUTPUTS, 1, size=0.02) @ draw(1, RANK, size=0.5)}, "lora_B.weight` has rank one"),
        ({B: TRAINED[B] * 100}, "lora_B.weight` has moved"),
        ({A: one_hot(RANK, INPUTS)}, "reads 1.0 of its 64 inputs"),
        ({A: draw(RANK, INPUTS, size=0.5, seed=7)}, "lora_A.weight` has moved"),
    ],
)
def test_later_round_that_is_made_to_leak(changed, message):
    with pytest.raises(ValueError, match=message):
        check(TRAINED | changed, 2, EarlierRound(1, INITIAL, STEPS))


def test_first_task_of_a_later_round():
    """Without an earlier adapter to compare with, the client's own untouched one still says what training can't do."""
    with pytest.raises(ValueError, match="B is zero everywhere in round 7"):
        check(INITIAL, 7)
    with pytest.raises(ValueError, match="lora_B.weight` has moved"):
        check(TRAINED | {B: TRAINED[B] * 1000}, 7)


def test_factor_that_is_frozen_must_stay():
    earlier = EarlierRound(1, INITIAL, {B: STEPS[B]})
    check(INITIAL | {B: TRAINED[B]}, 2, earlier, "freeze_a")
    with pytest.raises(ValueError, match="lora_A.weight` has moved"):
        check(INITIAL | {A: TRAINED[A], B: TRAINED[B]}, 2, earlier, "freeze_a")


def test_products_may_have_other_factors():
    """`exact` makes new factors of the mean product, so that A turns."""
    turn = torch.linalg.qr(draw(INPUTS, INPUTS, seed=5))[0]
    turned = TRAINED | {A: INITIAL[A] @ turn}
    check(turned, 2, EarlierRound(1, INITIAL, STEPS), "exact")
    with pytest.raises(ValueError, match="has moved"):
        check(turned, 2, EarlierRound(1, INITIAL, STEPS))


def test_rank_one_passes_where_the_clients_own_change_has_it():
    """One row of a layer that sees one token: an honest update of rank one."""
    changed = TRAINED | {B: draw(OUTPUTS, 1, size=0.02) @ draw(1, RANK, size=0.5)}
    assert is_rank_one(changed[B]) and not is_rank_one(TRAINED[B])
    check(changed, 2, EarlierRound(1, INITIAL, STEPS, frozenset({B})))


def test_another_limit():
    changed = TRAINED | {B: TRAINED[B] * 4}
    check(changed, 2, EarlierRound(1, INITIAL, STEPS))
    with pytest.raises(ValueError, match="has moved"):
        check(changed, 2, EarlierRound(1, INITIAL, STEPS), max_change=2.0)
