# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The arguments of a Trainer's constructor: those that a federation can't have, and those the parent must not see."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config.federated import FederatedConfig


# A client's run would open and close trackers each time. For a model that is loaded already, some of TRL's trainers refuse
# its arguments, and others warn.
_HIDDEN: dict[str, Any] = {"report_to": [], "model_init_kwargs": None}


@contextmanager
def hidden_arguments(args: Any) -> Iterator[None]:
    """Take from `args` what the parent's constructor must not see, and give it back."""
    shown = {name: getattr(args, name) for name in _HIDDEN if hasattr(args, name)}
    for name in shown:
        setattr(args, name, _HIDDEN[name])
    try:
        yield
    finally:
        for name, value in shown.items():
            setattr(args, name, value)


def check_arguments(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a Trainer that a federation can't have.

    Args:
        args: The options.
        kwargs: What the parent's constructor would get.

    Raises:
        ValueError: naming the argument, and what to use.
    """
    if not isinstance(args, FederatedConfig):
        raise ValueError(f"args is a {type(args).__name__}; expected a FederatedConfig (or a subclass of it).")
    if kwargs.get("model_init") is not None:
        raise ValueError("model_init makes a new model for each run, but a client's base is fixed; pass `model`.")
    if kwargs.get("optimizers", (None, None)) != (None, None):
        raise ValueError(
            "`optimizers` would carry one optimizer's state from client to client; each starts cold. Set "
            "args.optim, or `optimizer_cls_and_kwargs`."
        )
    if kwargs.get("ref_model") is not None:
        raise ValueError(
            "`ref_model` would be one more model on every client. Leave it out: the reference is the base with the adapter "
            "as it starts."
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "`quantization_config` does not go with a federation: the owner quantizes the base once, for all clients. Set "
            "args.base_bits."
        )
