# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What in an update repairs the base: the owner's estimates of it, put together. Pure tensor functions."""

from collections.abc import Mapping, Sequence

import torch

from ..privacy.clipping import update_norm
from .rules import average_updates


def average_repairs(repairs: Sequence[Mapping[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], float]:
    """The mean of estimates of one repair, and the share of it that is no chance.

    Estimates r_i = R + noise_i of m independent runs: the mean of ⟨r_i, r_j⟩ over pairs is what ‖R‖² is expected to be, and
    ‖r̄‖² is that and an m-th of the noise. Their quotient, in [0, 1], is the share; where it is low, more runs help. (It is
    also the coefficient for which r̄ is expected to be nearest to R, the Wiener filter. Server models were no better for
    it: docs/threat-model.md.) One estimate alone can't tell, and has the share 1.

    Raises:
        ValueError: if there are none.
    """
    if not repairs:
        raise ValueError("There are no estimates of the repair; expected at least one.")
    count, share = len(repairs), 1.0
    mean = average_updates(repairs, [1.0] * count)
    if count > 1:
        norm, norms = update_norm(mean) ** 2, sum(update_norm(repair) ** 2 for repair in repairs)
        pairs = (count**2 * norm - norms) / (count * (count - 1))  # |Σ r|² has each pair twice, and the squares
        share = max(pairs, 0.0) / norm if norm else 0.0
    return mean, share
