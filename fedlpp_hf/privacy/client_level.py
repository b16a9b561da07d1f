# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The mechanism of client-level differential privacy: clipped updates, their sum, noise, and the expected number of clients.

DP-FedAvg (arXiv 1710.06963) with the fixed-denominator estimator, and its adaptive clip (arXiv 1905.03871). Pure functions.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..aggregation.mean import sum_updates
from ..tensors.adapters import global_norm
from .noise import ReadBytes, draw_gaussian


Tensors = Mapping[str, torch.Tensor]

CLIP_RATE = 0.2  # η_C of arXiv 1905.03871
BITS_SHARE = 0.05  # of the budget, where the clip adapts: for how many updates are shorter than the clip


@dataclass(frozen=True, slots=True)
class Release:
    """What a round's clients tell, with noise: all that may leave the server.

    Args:
        mean: The mean update, float32.
        next_clip: The clip of the next round.
        noise_std: Of the noise on each value of the sum.
        below_clip: Noisy share of updates shorter than the clip; None where the clip stays.
    """

    mean: dict[str, torch.Tensor]
    next_clip: float
    noise_std: float
    below_clip: float | None = None


@dataclass(frozen=True, slots=True)
class ClientMechanism:
    """Releases a round's mean update such that it is (ε, δ)-differentially private in each client's whole contribution.

    One client moves the sum by at most the clip, and noise of `noise_multiplier` clips is on it. The mean is that sum divided
    by a constant: divided by how many came, it would tell their number.

    Args:
        noise_multiplier: Of the whole release, z; with an adaptive clip two noisy answers share it.
        expected_clients: What the sum is divided by: qN, or how many a round draws.
        clip_quantile: γ of the adaptive clip, or None.
    """

    noise_multiplier: float
    expected_clients: float
    clip_quantile: float | None = None

    def release(
        self,
        deltas: Sequence[Tensors],
        clipped: Sequence[float],
        clip: float,
        shapes: Mapping[str, torch.Size],
        read_bytes: ReadBytes = secrets.token_bytes,
    ) -> Release:
        """Clip, add up, add noise, and divide. Each call spends the budget of one release.

        Args:
            deltas: The updates of the clients that answered; there may be none.
            clipped: Of each, what its client says: whether it was longer than the clip, 1 or 0. Only for an adaptive clip.
            clip: Of this round.
            shapes: Of the values that clients train.
            read_bytes: Source of randomness, for tests.
        """
        sum_multiplier, bits_std = self.split_noise()
        std = sum_multiplier * clip
        total = sum_clipped(deltas, clip, shapes)
        mean = {}
        for key, value in total.items():
            noise = torch.from_numpy(draw_gaussian(value.numel(), read_bytes)).view(value.shape)
            mean[key] = ((value + std * noise) / self.expected_clients).float()
        if self.clip_quantile is None:
            return Release(mean, clip, std)
        # In [−½, ½], whatever a client says, so that one client moves the sum by at most ½.
        halves = [0.5 - min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0 for value in clipped]
        noisy = math.fsum(halves) + bits_std * float(draw_gaussian(1, read_bytes)[0])
        below = 0.5 + noisy / self.expected_clients
        return Release(mean, adapt_clip(clip, below, self.clip_quantile), std, below)

    def split_noise(self) -> tuple[float, float]:
        """The multiplier of the noise on the sum of updates, and the standard deviation of that on the sum of halves.

        The two sums, each in units of its sensitivity, are one Gaussian mechanism of multiplier z where 1/z² = 1/z_Δ² + 1/(2σ_b)²
        (arXiv 1905.03871, Theorem 1).
        """
        if self.clip_quantile is None:
            return self.noise_multiplier, 0.0
        return self.noise_multiplier / math.sqrt(1 - BITS_SHARE), self.noise_multiplier / math.sqrt(BITS_SHARE) / 2


def sum_clipped(deltas: Sequence[Tensors], clip: float, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Σ Δ_i · min(1, clip/‖Δ_i‖), float64: the norm is that of all tensors of an update together, `modules_to_save` included.

    It stays float64 until the noise is on it: the rounding of a large sum to float32 could tell more than the clip allows.
    """
    if not deltas:
        return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    norms = [global_norm(delta) for delta in deltas]
    factors = [min(1.0, clip / norm) if norm else 1.0 for norm in norms]
    return sum_updates(deltas, factors, list(shapes), dtype=torch.float64)


def adapt_clip(clip: float, below: float, quantile: float) -> float:
    """The next clip, C·exp(−η(b̃ − γ)): smaller where more updates than wanted are shorter than it (arXiv 1905.03871, §2.1)."""
    return clip * math.exp(-CLIP_RATE * (below - quantile))
