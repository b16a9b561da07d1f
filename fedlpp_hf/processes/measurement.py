# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Row by row: the loss of a trainer's model on evaluation rows, and whether a classifier is right."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy


# Else a row is dropped, or is in another's place, or a loader that persists has the rows of an evaluation before.
_ALL_IN_ORDER = {
    "dataloader_drop_last": False,
    "dataloader_persistent_workers": False,
    "train_sampling_strategy": "random",
}


@dataclass(frozen=True, slots=True)
class RowMeasures:
    """What a model achieves on each evaluation row.

    `loss` `(rows,)`, in nats; for a language model the mean over the row's tokens. `accuracy` `(rows,)`, 1 where a
    classifier is right, None for other models. `num_outputs` is the number of classes or tokens to choose from.
    """

    loss: np.ndarray
    accuracy: np.ndarray | None
    num_outputs: int

    @property
    def measures(self) -> dict[str, np.ndarray]:
        return {"loss": self.loss} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


def read_loss(metrics: Mapping[str, Any]) -> float:
    """The loss among the metrics of an evaluation; infinite where it is no number.

    Raises:
        ValueError: if there is none.
    """
    loss = metrics.get("eval_loss")
    if not isinstance(loss, int | float):
        raise ValueError(
            f"The selection rows have no loss to choose by; their evaluation gives {', '.join(metrics) or 'nothing'}. They need "
            "labels, as rows to train on do."
        )
    return float(loss) if loss == loss else math.inf


def choose_rows(dataset: Any, count: int, seed: int) -> Any:
    """`count` rows of `dataset` (all, if it has fewer), a function of its length and `seed` alone, in their order.

    Raises:
        ValueError: if there is no evaluation dataset, or one of several parts, or of no length.
    """
    if dataset is None or isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"The audit compares models row by row; eval_dataset is a {type(dataset).__name__}, expected one Dataset."
        )
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return _take_rows(dataset, sorted(int(index) for index in chosen))


def _take_rows(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, indices)


def _order_by_length(rows: Any) -> list[int]:
    """The places of `rows`, the shortest first, so that a batch has little padding; as they are if no table tells lengths."""
    if "input_ids" not in (getattr(rows, "column_names", None) or ()):
        return list(range(len(rows)))
    return np.argsort([len(tokens) for tokens in rows["input_ids"]], kind="stable").tolist()


@contextmanager
def replaced_options(args: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """`args` with other values for a while."""
    before = {name: getattr(args, name) for name in options}
    try:
        for name, value in options.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


@torch.no_grad()
def measure_rows(trainer: Any, rows: Any) -> RowMeasures:
    """The trainer's own loss on each of `rows`, so that an overridden `compute_loss` counts.

    Rows are batched by length, and found in their own order. The losses of a batch are read off its logits where their mean
    proves to be the batch's loss, else the rows go through the model one by one.

    Raises:
        ValueError: if the rows have no labels.
    """
    model = trainer.model
    model.eval()
    losses: list[torch.Tensor] = []
    correct: list[torch.Tensor] = []
    outputs = 0
    order = _order_by_length(rows)
    with replaced_options(trainer.args, _ALL_IN_ORDER):
        batches = trainer.get_eval_dataloader(_take_rows(rows, order))
    for inputs in batches:
        loss, logits, labels = trainer.prediction_step(model, inputs, prediction_loss_only=False)
        if loss is None or labels is None:
            raise ValueError(
                "The evaluation rows have no labels; the audit needs a loss on each of them. Add labels to "
                "eval_dataset, or set audit=False."
            )
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        outputs = logits.shape[-1]
        parts = _split_loss(loss, logits, labels)
        if parts is None:
            count = len(labels)
            parts = torch.stack(
                [trainer.prediction_step(model, _take_row(inputs, row, count), True)[0] for row in range(count)]
            )
        losses.append(parts.float().cpu())
        if logits.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point():
            correct.append((logits.argmax(-1) == labels).float().cpu())
    loss = torch.cat(losses).numpy()
    # Where a collator makes one row of several, the losses are of batches.
    places = np.argsort(order) if len(loss) == len(order) else slice(None)
    accuracy = torch.cat(correct).numpy()[places] if correct else None
    return RowMeasures(loss[places], accuracy, outputs)


def _split_loss(loss: torch.Tensor, logits: torch.Tensor, labels: Any) -> torch.Tensor | None:
    """Each row's part of a cross-entropy `loss`, or None if `loss` proves to be something else."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or logits.dim() != labels.dim() + 1:
        return None
    views = [(logits, labels)]
    if labels.dim() == 2:  # a causal model predicts the next token
        views.insert(0, (logits[:, :-1], labels[:, 1:]))
    for scores, targets in views:
        if scores.shape[:-1] != targets.shape:
            continue
        parts = cross_entropy(scores.flatten(0, -2).float(), targets.flatten().long(), reduction="none")
        parts, counted = parts.view(len(targets), -1), (targets != -100).view(len(targets), -1)
        counts = counted.sum(1)
        if counts.min() > 0 and torch.isclose(parts.sum() / counts.sum(), loss.float(), rtol=1e-5, atol=1e-6):
            return parts.sum(1) / counts
    return None


def _take_row(inputs: Mapping[str, Any], row: int, count: int) -> dict[str, Any]:
    return {
        key: value[row : row + 1] if isinstance(value, torch.Tensor) and value.dim() and len(value) == count else value
        for key, value in inputs.items()
    }
