# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Was a row trained on? Tests on a model's losses, by threshold and by likelihood ratio. Pure functions on scores of rows."""

from dataclasses import dataclass

import numpy as np


FALSE_POSITIVES = 0.01
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Membership:
    """How well one `attack` tells `num_members` rows that were trained on from `num_others` that were not.

    `auc` is the probability that a member has the higher score, a half for chance. `tpr` is the share of members found by the lowest
    threshold that at most 1 % of the others pass: the figure to look at, as a few certain rows are the damage (Carlini et al.,
    arXiv 2112.03570, §3). With fewer than 100 others, none passes. Intervals are of 95 %, by the bootstrap over both sides.
    """

    attack: str
    num_members: int
    num_others: int
    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


def score_loss(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The threshold on the loss (Yeom et al., arXiv 1709.01604): a low loss `after` training speaks for a member."""
    return -after


def score_ratio(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The logarithm of the likelihood ratio of the two models: how much lower the loss is than `before`.

    The reference is the same model without the update, which takes out how hard the row is. LiRA's many shadow models (arXiv
    2112.03570) would do so without that model; the owner has it.
    """
    return before - after


ATTACKS = {"loss threshold": score_loss, "likelihood ratio": score_ratio}


def compare_scores(
    attack: str, members: np.ndarray, others: np.ndarray, seed: int = 0, resamples: int = _RESAMPLES
) -> Membership:
    """Compare the scores of `members` with those of `others`, rows of the same distribution that were not trained on.

    Args:
        attack: Its name.
        members, others: Scores, higher for a member.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Raises:
        ValueError: if a side is empty or has a score that is not finite.
    """
    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if not (len(members) and len(others) and np.isfinite(members).all() and np.isfinite(others).all()):
        raise ValueError(
            f"Membership needs finite scores on both sides; got {np.isfinite(members).sum()} of {len(members)} members and "
            f"{np.isfinite(others).sum()} of {len(others)} others. Drop rows without a loss."
        )
    generator = np.random.default_rng(seed)
    draws = [
        (generator.choice(members, len(members)), generator.choice(others, len(others))) for _ in range(resamples)
    ]
    auc_low, auc_high = np.percentile([measure_auc(*draw) for draw in draws], _INTERVAL)
    tpr_low, tpr_high = np.percentile([measure_tpr(*draw) for draw in draws], _INTERVAL)
    return Membership(
        attack, len(members), len(others), measure_auc(members, others), float(auc_low), float(auc_high),
        measure_tpr(members, others), float(tpr_low), float(tpr_high),
    )  # fmt: skip


def measure_auc(members: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve: P(member's score > other's), ties counting half (Mann and Whitney)."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    upto = np.searchsorted(ordered, members, "right")
    return float((below + upto).mean() / (2 * len(others)))


def measure_tpr(members: np.ndarray, others: np.ndarray, false_positives: float = FALSE_POSITIVES) -> float:
    """The share of members above the lowest threshold that at most the share `false_positives` of the others exceeds."""
    allowed = int(false_positives * len(others))
    return float((members > np.sort(others)[::-1][allowed]).mean())
