# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Updates as integers modulo 2^32, and their sum as a mean. A value that could overflow is an error, never clipped; where clients
add noise, they clip first, and nothing can overflow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...wire.compression import decompress_update
from ...wire.messages import ClientUpdate
from .terms import SumTerms


MOST_LOSS = 1000.0  # a loss that is larger, or no number, is left out of the mean, and the count says so
EXTRA_WORDS = 3  # loss, whether there is one, steps
_SLACK = 1e-6  # of rounding in float32
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a client adds to a sum: the values of its update `(n,)` float32, its loss, which may be NaN, and its steps."""

    values: np.ndarray
    loss: float
    steps: int


@dataclass(frozen=True, slots=True)
class OpenedSum:
    """What a sum says: the mean update `(n,)` float32, the mean loss of `losses` clients (NaN of none), and all steps."""

    mean: np.ndarray
    loss: float
    losses: int
    steps: int


def make_contribution(update: ClientUpdate, shapes: Mapping[str, torch.Tensor]) -> Contribution:
    """What an update adds, once its compression is undone.

    Args:
        update: Of the client.
        shapes: Tensors of the shapes that an update has, by key.

    Raises:
        ValueError: if it has other tensors, or values that are not finite.
    """
    delta = decompress_update(update.delta, shapes)
    return Contribution(flatten_update(delta), update.metrics["loss"], int(update.metrics["steps"]))


def flatten_update(delta: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The values of an update, float32, in the order of its keys."""
    if not delta:
        return np.empty(0, np.float32)
    return torch.cat([delta[key].detach().cpu().float().reshape(-1) for key in sorted(delta)]).numpy()


def unflatten_update(values: np.ndarray, shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of [`flatten_update`]."""
    sizes = {key: shapes[key].numel() for key in sorted(shapes)}
    parts = torch.from_numpy(values).split(list(sizes.values()))
    return {key: part.reshape(shapes[key].shape).clone() for key, part in zip(sizes, parts, strict=True)}


def check_contribution(contribution: Contribution, terms: SumTerms) -> None:
    """Refuse what can't be added without overflow, for any number of members.

    Raises:
        ValueError: naming what is too large.
    """
    values = contribution.values
    if len(values) != terms.size:
        raise ValueError(f"the update has {len(values)} values; the sum has {terms.size}")
    if not np.isfinite(values).all():
        raise ValueError("the update has values that are NaN or infinite")
    if terms.noise is not None:
        return
    largest = float(np.abs(values).max(initial=0.0))
    if largest > terms.bound * (1 + _SLACK):
        raise ValueError(
            f"the update has a value of magnitude {largest:.4g}; the sum holds up to {terms.bound:.4g}, which "
            "clip_update_norm sets, or max_update_norm"
        )
    if terms.max_norm is not None:
        norm = float(np.linalg.norm(values.astype(np.float64)))
        if norm > terms.max_norm * (1 + _SLACK):
            raise ValueError(f"the update's norm is {norm:.4g}; at most {terms.max_norm:.4g} may be added to the sum")


def encode_contribution(contribution: Contribution, terms: SumTerms, members: int) -> np.ndarray:
    """A contribution as words `(size + 3,)` uint32: rounded to the nearest step, negative numbers as their complement.

    Raises:
        ValueError: if something is too large.
    """
    check_contribution(contribution, terms)
    if terms.noise is not None:
        return _encode_with_noise(contribution, terms, members)
    levels = terms.levels(members)
    if not 0 <= contribution.steps <= levels:
        raise ValueError(f"the client took {contribution.steps} steps; the sum of {members} holds up to {levels} each")
    words = np.empty(terms.size + EXTRA_WORDS, np.uint32)
    numbers = words.view(np.int32)
    for start in range(0, terms.size, _CHUNK):
        values = contribution.values[start : start + _CHUNK].astype(np.float64)
        numbers[start : start + len(values)] = np.rint(values * (levels / terms.bound))
    counts = math.isfinite(contribution.loss) and abs(contribution.loss) <= MOST_LOSS
    numbers[terms.size] = round(contribution.loss / MOST_LOSS * levels) if counts else 0
    numbers[terms.size + 1 :] = int(counts), contribution.steps
    return words


def _encode_with_noise(contribution: Contribution, terms: SumTerms, members: int) -> np.ndarray:
    """Loss and steps stay with the client: they have no noise."""
    assert terms.noise is not None
    words = np.zeros(terms.size + EXTRA_WORDS, np.uint32)
    words.view(np.int32)[: terms.size] = terms.noise.encode(contribution.values, terms.bound, terms.threshold(members))
    return words


def decode_sum(words: np.ndarray, terms: SumTerms, members: int, survivors: int) -> OpenedSum:
    """What the sum of `survivors` contributions says, which were encoded for `members`.

    Raises:
        ValueError: if no such contributions have that sum: a member masked with something else than it shared.
    """
    numbers, levels = words.view(np.int32), terms.levels(members)
    most = survivors * (terms.largest(members) * (1 + _SLACK) + 1)
    loss, losses, steps = map(int, numbers[terms.size :])
    largest = max(int(numbers.max()), -int(numbers.min()))
    if largest > most or not 0 <= losses <= survivors or steps < 0:
        raise ValueError("the sum is out of range: a client masked its update with other keys than it shared")
    mean = np.empty(terms.size, np.float32)
    for start in range(0, terms.size, _CHUNK):
        mean[start : start + _CHUNK] = numbers[start : min(start + _CHUNK, terms.size)] * (
            terms.bound / levels / survivors
        )
    return OpenedSum(mean, loss / levels * MOST_LOSS / losses if losses else math.nan, losses, steps)
