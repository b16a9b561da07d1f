# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Logit adjustment: a classifier trains as if its client had as many rows of each label."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from .partition import is_stream


logger = logging.get_logger(__name__)

_COLUMNS = ("labels", "label", "label_ids")  # what the Trainer's collators take
_IGNORED = -100
_LOOKED_AT = 32  # clients; a message needs no more
_DIFFERS = 0.25  # mean total variation; Dirichlet partitions have about 0.1 with α = 10, 0.4 with 0.5


def find_head(model: Any) -> torch.nn.Module:
    """The linear layer whose outputs are a classifier's logits.

    Args:
        model: With its adapter, as it trains.

    Raises:
        ValueError: if the model is no classifier of one label out of several.
    """
    config = getattr(model, "config", None)
    classes, problem = getattr(config, "num_labels", 0), getattr(config, "problem_type", None)
    heads = [
        module
        for name, module in model.named_modules()
        if getattr(module, "out_features", None) == classes
        and not any(part.startswith("lora_") or part in ("base_layer", "original_module") for part in name.split("."))
    ]
    if classes < 2 or not heads or problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"logit_adjustment needs a classifier that gives each row one of several labels; the model is a "
            f"{type(model).__name__} with num_labels={classes} and problem_type={problem!r}. Set logit_adjustment=0."
        )
    return heads[-1]  # what pools or projects comes before it


def count_labels(rows: Any, num_labels: int) -> np.ndarray:
    """How many rows, or tokens, have each label, `(num_labels,)`. Ignored tokens (-100) do not count.

    Raises:
        ValueError: if `rows` is a stream, has no labels, or one that is no class.
    """
    if is_stream(rows):
        raise ValueError(
            "logit_adjustment counts labels before it trains, and a stream's are not known. Pass a dataset."
        )
    labels = _read_labels(rows)
    labels = labels[labels != _IGNORED]
    if labels.size and not (
        np.issubdtype(labels.dtype, np.integer) and 0 <= labels.min() <= labels.max() < num_labels
    ):
        raise ValueError(
            f"logit_adjustment: labels run from {labels.min()} to {labels.max()} as {labels.dtype}; expected classes from 0 "
            f"to {num_labels - 1}."
        )
    return np.bincount(labels.astype(np.int64), minlength=num_labels)


def adjust_logits(model: Any, rows: Any, strength: float) -> RemovableHandle:
    """Add τ·log π to a classifier's logits wherever it trains; evaluation and what is saved stay as they are.

    A client's loss is then that of softmax(f(x) + τ·log π), so f learns what tells labels apart, not how often this client has
    them, and f means the same on every client (arXiv 2007.07314, eq. 10; for federations 2209.00189).

    Args:
        model: With its adapter, as it trains.
        rows: The client's rows; π are their labels' frequencies, each counted once more than it occurs.
        strength: τ; 1 is the loss that is consistent for balanced error.

    Returns:
        The hook, to be removed after the run.

    Raises:
        ValueError: as [`find_head`] and [`count_labels`].
    """
    head = find_head(model)
    counts = count_labels(rows, model.config.num_labels) + 1.0
    prior = torch.from_numpy(np.log(counts / counts.sum()) * strength)

    def add_prior(module: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor | None:
        return logits + prior.to(logits) if module.training else None

    return head.register_forward_hook(add_prior)


def check_labels(model: Any, clients: Mapping[str, Any], strength: float) -> None:
    """Refuse an adjustment that some client could not make; without one, say where clients' labels call for it.

    It is for simulations: over a network nobody sees all clients' labels.

    Args:
        model: With its adapter.
        clients: Rows of each client, prepared.
        strength: τ.

    Raises:
        ValueError: as [`find_head`] and [`count_labels`], if τ is above 0.
    """
    if strength:
        find_head(model)
        for rows in clients.values():
            count_labels(rows, model.config.num_labels)
        return
    try:
        find_head(model)
        counts = [count_labels(rows, model.config.num_labels) for rows in list(clients.values())[:_LOOKED_AT]]
    except ValueError:
        return  # no classifier, or rows that can't be counted
    if (distance := label_distance(counts)) > _DIFFERS:
        logger.warning(
            f"Clients have different labels (total variation from their mean: {distance:.2f}, of at most 1), which makes "
            "averaged classifiers worse. Try logit_adjustment=1: each client then trains as if its labels were balanced."
        )


def label_distance(counts: Iterable[np.ndarray]) -> float:
    """The mean total variation between each client's label frequencies and the mean of them all, from 0 to 1."""
    shares = [count / count.sum() for count in counts if count.sum()]
    if len(shares) < 2:
        return 0.0
    return float(np.abs(np.stack(shares) - np.mean(shares, axis=0)).sum(axis=1).mean() / 2)


def _read_labels(rows: Any) -> np.ndarray:
    names = getattr(rows, "column_names", None)
    column: Any = None
    if names is not None:
        column = next((rows[name] for name in _COLUMNS if name in names), None)
    else:
        values = [next((row[name] for name in _COLUMNS if name in row), None) for row in map(dict, rows)]
        column = values if all(value is not None for value in values) else None
    if column is None:
        raise ValueError(f"logit_adjustment: the rows have no column {', '.join(_COLUMNS)}.")
    parts = [np.ravel(value) for value in column]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
