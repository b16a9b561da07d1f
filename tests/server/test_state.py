# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The server's state is a value: as tensors and back, and nothing foreign."""

import dataclasses

import pytest
import torch

from fedlpp_hf.server.state import ServerState


ADAPTER = {"q.lora_A.weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("optimizer", "residual"),
    [
        ({}, {}),
        ({"momentum.q.lora_A.weight": torch.randn(2, 3)}, {}),
        ({}, {"q.lora_A.weight": torch.randn(5, 3), "q.lora_B.weight": torch.randn(4, 5)}),
        ({"second_moment.a:b": torch.ones(1)}, {"optimizer:q": torch.zeros(0)}),  # names that look like groups
    ],
)
def test_state_comes_back_from_its_tensors(optimizer, residual):
    state = ServerState(ADAPTER, optimizer, residual)
    again = ServerState.from_tensors(ADAPTER, state.to_tensors())
    for name in ("adapter", "optimizer", "residual"):
        one, other = getattr(state, name), getattr(again, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_adapter_is_not_among_its_tensors():
    assert ServerState(ADAPTER).to_tensors() == {}


@pytest.mark.parametrize("name", ["window_rounds", "control:q", "optimizer", "residual:", ":q", ""])
def test_foreign_tensor_is_refused_by_its_name(name):
    tensors = ServerState(ADAPTER, {"momentum.q": torch.ones(1)}).to_tensors()
    with pytest.raises(ValueError, match=f"state has `{name}`; expected"):
        ServerState.from_tensors(ADAPTER, tensors | {name: torch.ones(1)})


def test_state_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerState(ADAPTER).adapter = {}
