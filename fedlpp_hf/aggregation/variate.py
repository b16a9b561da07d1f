# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's estimates of what the quantizer adds to an update, put together. Pure functions of tensors."""

from collections.abc import Mapping, Sequence

import torch

from ..tensors.adapters import global_norm
from .mean import average_updates


def average_variates(estimates: Sequence[Mapping[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], float]:
    """The mean of independent estimates of one variate, and the share of it that is not chance.

    For estimates r_i = R + noise_i of m runs, the mean of ⟨r_i, r_j⟩ over pairs is expected to be ‖R‖², and ‖r̄‖² that plus
    an m-th of the noise. Their quotient, in [0, 1], is the share; where it is low, more runs help. (It is also the Wiener
    filter's coefficient, for which r̄ is expected to be nearest to R. Server models were no better for it:
    docs/threat-model.md.) One estimate alone can't tell, and has the share 1.

    Raises:
        ValueError: if there are none.
    """
    if not estimates:
        raise ValueError("There are no estimates of the control variate; expected at least one.")
    count, share = len(estimates), 1.0
    mean = average_updates(estimates, [1.0] * count)
    if count > 1:
        norm, norms = global_norm(mean) ** 2, sum(global_norm(estimate) ** 2 for estimate in estimates)
        pairs = (count**2 * norm - norms) / (count * (count - 1))  # |Σ r|² has each pair twice, and the squares
        share = max(pairs, 0.0) / norm if norm else 0.0
    return mean, share
