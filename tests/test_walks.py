# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A model that remembers what it lists: the same lists, the same modes, and no trace afterwards."""

import copy

import pytest
import torch
from torch import nn

from fedlpp_hf.client.walks import remember_walks_


@pytest.fixture
def model():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    return nn.Sequential(inner, nn.Linear(3, 2), inner).eval()  # a module that is there twice is listed once


def lists(model):
    walks = [
        list(model.parameters()),
        list(model.modules()),
        list(model.named_parameters()),
        list(model.named_modules()),
    ]
    walks += [list(model.parameters(recurse=False)), list(model.named_parameters("a"))]
    return [*walks, list(model.named_modules(remove_duplicate=False)), list(model.named_modules(prefix="b"))]


def test_lists_are_the_same_and_not_walked_again(model, monkeypatch):
    before = lists(model)
    with remember_walks_(model):
        assert lists(model) == before
        model[1].bias.grad = torch.ones(2)
        monkeypatch.setattr(nn.Module, "named_modules", None)  # whoever walks now fails
        assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before[0]]
        model.zero_grad()
        assert model[1].bias.grad is None
        monkeypatch.undo()
    assert lists(model) == before


def test_modes(model):
    with remember_walks_(model):
        assert all(module.training for module in model.modules())
        model[0][1].eval()
        assert model.train() is model
        assert not model[0][1].training  # as the docstring says
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())


def test_nothing_is_left_behind_even_after_an_error(model):
    attributes = set(vars(model))
    with pytest.raises(KeyError), remember_walks_(model):
        raise KeyError
    assert set(vars(model)) == attributes
    model.append(nn.Linear(2, 2))
    assert len(list(model.parameters())) == 6


def test_a_deep_copy_lists_its_own(model):
    with remember_walks_(model):
        teacher = copy.deepcopy(model)
        assert {id(parameter) for parameter in teacher.parameters()}.isdisjoint(map(id, model.parameters()))
        assert next(iter(teacher.parameters())) is teacher[0][0].weight
        teacher.eval()
        assert not teacher[1].training and model[1].training
