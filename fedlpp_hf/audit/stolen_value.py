# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Stolen value: how much of what the owner gained an attacker holds, with its uncertainty. Pure functions on rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from ..processes.measurement import RowMeasures


RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class StolenValue:
    """(attacker − local_only) / (server − local_only) in one `measure`, which is `loss` or `accuracy`, as means over rows.

    `attacker` and `local_only` are the best of their kind, named by `best_attack` and `best_local`. `value` and its 95 %
    interval `low` to `high` are clipped nowhere; they are None where the server is not better than `local_only` beyond
    doubt, or has diverged, and `reason` says so.
    """

    measure: str
    attacker: float
    local_only: float
    server: float
    best_attack: str
    best_local: str
    value: float | None
    low: float | None
    high: float | None
    reason: str = ""


def format_stolen(stolen: StolenValue) -> str:
    """A stolen value with its interval, in percent."""
    if stolen.value is None or stolen.low is None or stolen.high is None:
        return "undetermined"
    return f"{stolen.value:.0%} ({stolen.low:.0%} to {stolen.high:.0%})"


def read_stolen(values: Mapping[str, Any]) -> StolenValue:
    """A stolen value from JSON.

    Raises:
        ValueError: if a value is of the wrong type.
        TypeError: if it is not a stolen value's.
    """
    stolen = StolenValue(**values)
    for entry in fields(stolen):
        value = getattr(stolen, entry.name)
        if not isinstance(value, entry.type if isinstance(entry.type, type) else (int, float, type(None))):
            raise ValueError(f"`{entry.name}` is {value!r}")
    return stolen


def estimate_exposure(models: Mapping[str, "RowMeasures"], owner: "RowMeasures", seed: int = 0) -> StolenValue:
    """What the best of `models` is worth: (model − guessing) / (owner's model − guessing), in loss.

    Guessing is the uniform distribution over classes or tokens. Of the untouched base this is its exposure; of the base after
    training, its healed exposure: training repairs what the quantizer broke, and teaches the rows.
    """
    guess = np.full(len(owner.loss), math.log(owner.num_outputs))
    losses = {name: found.loss for name, found in models.items()}
    return estimate_stolen_value(losses, {"guessing": guess}, owner.loss, seed=seed)


def estimate_stolen_value(
    attacks: Mapping[str, np.ndarray],
    local_only: Mapping[str, np.ndarray],
    server: np.ndarray,
    measure: str = "loss",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> StolenValue:
    """The stolen value of the best attack, with a bootstrap interval over evaluation rows.

    Without attacks (nothing was sent) an attacker is left with `local_only`, and the stolen value is 0. The interval is the percentile bootstrap (Efron and Tibshirani,
    An Introduction to the Bootstrap, §13.3); the rows are drawn for all models together, and the best attack is
    chosen anew in every draw, as it was chosen on these rows.

    Args:
        attacks: By name, the `measure` of each attacker's model on each row, `(rows,)`.
        local_only: The same of what clients could have without the federation.
        server: The same of the server's model.
        measure: `loss`, or `accuracy`.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.

    Raises:
        ValueError: if there is no local-only reference, the rows are not the same, or a value is not finite.
    """
    if not local_only:
        raise ValueError("There is no local-only reference; pass at least the untouched base.")
    count = len(server)
    for name, rows in {**attacks, **local_only, "server": server}.items():
        if rows.shape != (count,) or not count:
            raise ValueError(f"`{name}` has values of shape {rows.shape}; expected one for each of {count} rows.")
        if rows is not server and not np.isfinite(rows).all():
            raise ValueError(
                f"`{name}` has a {measure} that is NaN or infinite on some row; did its training diverge?"
            )
    sign = -1.0 if measure == "loss" else 1.0
    candidates = sign * np.stack([*(attacks or local_only).values()]).astype(np.float64)
    references = sign * np.stack([*local_only.values()]).astype(np.float64)
    owner = sign * server.astype(np.float64)

    weights = _draw_weights(count, seed, resamples)
    attacker, local = (weights @ rows.T for rows in (candidates, references))
    diverged = not np.isfinite(owner).all()
    gained = weights @ np.where(np.isfinite(owner), owner, 0) - local.max(1)
    stolen = attacker.max(1) - local.max(1)

    low, high = np.percentile(gained[1:], _INTERVAL)
    value: float | None = None
    interval: tuple[float, float] | tuple[None, None] = (None, None)
    reason = ""
    if not attacks:
        value, interval = 0.0, (0.0, 0.0)
    elif low > 0 and not diverged:
        value = float(stolen[0] / gained[0])
        # A draw without a gain, of which there are fewer than the interval leaves out, counts as all being stolen and more.
        shares = np.divide(stolen[1:], gained[1:], out=np.full(resamples, np.inf), where=gained[1:] > 0)
        bounds = np.percentile(shares, _INTERVAL)
        interval = float(bounds[0]), float(bounds[1])
    if diverged:
        reason = f"The server's model has a {measure} that is NaN or infinite: there is no value that could be stolen."
    elif low <= 0:
        doubt = "is worse than" if high < 0 else "can't be told from"
        reason = (
            f"The owner's model {doubt} what there is without it, `{list(local_only)[int(local[0].argmax())]}` ({measure} "
            f"{sign * (gained[0] + local[0].max()):.4f} against {sign * local[0].max():.4f}, 95 % interval of the gain "
            f"{low:+.4f} to {high:+.4f}): there is no value that could be stolen."
        )
    return StolenValue(
        measure=measure,
        attacker=float(sign * attacker[0].max()),
        local_only=float(sign * local[0].max()),
        server=float(sign * (weights[0] @ owner)),
        best_attack=list(attacks or local_only)[int(attacker[0].argmax())],
        best_local=list(local_only)[int(local[0].argmax())],
        value=value,
        low=interval[0],
        high=interval[1],
        reason=reason,
    )


def estimate_interval(
    models: Mapping[str, "RowMeasures"], server: "RowMeasures", seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % interval of the mean loss of the best of `models`, as seen from the server's; None if a loss is not finite.

    It is the server's mean loss plus the interval of the difference, by the bootstrap of [`estimate_stolen_value`]: rows are
    drawn for all models together, and the best is chosen anew in every draw. If the server's mean is inside, these rows can't
    tell the two apart. Rows that are hard for both count for neither.
    """
    losses = np.stack([found.loss for found in models.values()]).astype(np.float64)
    owner = server.loss.astype(np.float64)
    if not (np.isfinite(losses).all() and np.isfinite(owner).all()):
        return None
    weights = _draw_weights(len(owner), seed, resamples)
    difference = (weights @ losses.T).min(1) - weights @ owner
    low, high = np.percentile(difference[1:], _INTERVAL) + owner.mean()
    return float(low), float(high)


def _draw_weights(count: int, seed: int, resamples: int) -> np.ndarray:
    """Weights of rows `(1 + resamples, count)`: first the sample itself, then the draws from it."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), draws]) / count
