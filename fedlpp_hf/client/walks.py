# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Walks over a whole model that a training loop makes in every step, made once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


_NAMES = ("train", "named_modules", "named_parameters")


@contextmanager
def remember_walks_(model: Any) -> Iterator[None]:
    """Within the block, `model` is not walked again to list its modules or its parameters, or to set the mode that it has.

    A Trainer does that in every step, to set the mode and to clear gradients, and as often again before the first.
    The block begins in training mode, in which `train()` does nothing: a submodule that somebody puts into eval mode
    meanwhile stays in it. Modules and parameters must not be replaced in the block. A deep copy lists its own.
    """
    model.train()
    model._remembered = {name: list(getattr(model, name)()) for name in _NAMES[1:]}
    # Bound methods, since a deep copy binds them to the copy.
    methods: tuple[Callable[..., Any], ...] = (_train, _named_modules, _named_parameters)
    for name, method in zip(_NAMES, methods, strict=True):
        setattr(model, name, MethodType(method, model))
    try:
        yield
    finally:
        for name in (*_NAMES, "_remembered"):
            delattr(model, name)


def _train(model: Any, mode: bool = True) -> Any:
    return model if model.training is mode else type(model).train(model, mode)


def _named_modules(
    model: Any, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    if memo is not None or prefix or not remove_duplicate:
        return type(model).named_modules(model, memo, prefix, remove_duplicate)
    return iter(model._remembered["named_modules"])


def _named_parameters(
    model: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    if prefix or not (recurse and remove_duplicate):
        return type(model).named_parameters(model, prefix, recurse, remove_duplicate)
    return iter(model._remembered["named_parameters"])
