# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Bounds on the norm of an update: clipping at the client, a limit at the server."""

from collections.abc import Mapping

import torch

from ..tensors.adapters import global_norm


def clip_update(update: Mapping[str, torch.Tensor], max_norm: float) -> tuple[dict[str, torch.Tensor], float]:
    """`update` scaled down to the norm `max_norm` if it is longer, and the norm that it had.

    Raises:
        ValueError: if `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}; expected a positive number.")
    norm = global_norm(update)
    if norm <= max_norm:
        return dict(update), norm
    return {key: tensor * (max_norm / norm) for key, tensor in update.items()}, norm


def check_norm(update: Mapping[str, torch.Tensor], max_norm: float) -> None:
    """Reject an update that is longer than the server accepts.

    Raises:
        ValueError: naming both norms.
    """
    norm = global_norm(update)
    if not norm <= max_norm:
        raise ValueError(f"its norm is {norm:.4g}; at most {max_norm:.4g} is accepted")
