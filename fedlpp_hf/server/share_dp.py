# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Client-level differential privacy whose noise clients add in shares: the server gets the noisy sum alone, and keeps the account."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..aggregation.round import AggregationResult
from ..config.client_dp import LARGEST_SHARED_NOISE
from ..config.federated import FederatedConfig
from ..privacy.accounting import solve_multiplier
from ..privacy.noise_shares import NoiseShares, compute_share_epsilon
from ..privacy.secure_sums.terms import compute_threshold
from .admission import AcceptedUpdate
from .client_dp import ClientDP
from .sampling import sample_clients
from .store import RoundStore
from .sums import is_on_disk


class ShareDP(ClientDP):
    """[`ClientDP`] against the server, too. It adds no noise: what it is given is the mean of a secure sum, which has it.

    Noise counts from the moment in which the server asks for what opens a round's sum: a sum that is opened again has other noise.

    Args:
        args, clients, adapter, store: As [`ClientDP`] has them.

    Raises:
        ValueError: as [`ClientDP`], or if nobody's noise would count.
    """

    def __init__(
        self, args: FederatedConfig, clients: Sequence[str], adapter: Mapping[str, torch.Tensor], store: RoundStore
    ):
        self._updates_dir = store.updates_dir
        self._draws: dict[int, list[str]] = {}
        super().__init__(args, clients, adapter, store)

    def affords_round(self, number: int) -> bool:
        """[`ClientDP.affords_round`]; a sum that was opened before the server was stopped is paid for."""
        opened = is_on_disk(self._updates_dir, self._ledger.federation_id, number) and number in self._ledger.releases
        return opened or super().affords_round(number)

    def begin_round(self, number: int) -> None:
        """Count a round's noise, before its sum is opened."""
        self._ledger = self._file.add(self._ledger, number)

    def local_options(self) -> dict[str, Any]:
        return {
            "clip_norm": self.clip,
            "share_noise": self.noise_multiplier,
            "share_colluders": self.args.colluding_clients,
            "share_delta": self.delta,
        }

    def release(self, number: int, updates: Mapping[str, AcceptedUpdate]) -> AggregationResult:
        """The round's mean as it was opened, and `privacy` for the round's record."""
        if number not in self._ledger.releases:  # what opens sums here did not say so before
            self.begin_round(number)
        delta = next(iter(updates.values())).delta  # each client is taken to have sent the mean
        report = self._describe(self.noise_multiplier * self.clip, len(updates))
        report["colluders"] = self.args.colluding_clients
        return AggregationResult({key: delta[key] for key in self.shapes}, report={"privacy": report})

    def _compute(self, noise_multiplier: float, releases: int) -> float:
        # Of more than can be added, the ε of the most is a bound; then none is enough.
        noise = self._make_noise(min(noise_multiplier, LARGEST_SHARED_NOISE))
        return compute_share_epsilon({noise: releases}, self.delta)

    def _solve(self, target: float, releases: int) -> float:
        return solve_multiplier(target, lambda noise: self._compute(noise, releases), f"{releases} rounds", self.delta)

    def _count(self, rounds: Sequence[int]) -> int:
        """Draws follow from the seed, which is no secret: of the client that was drawn most often, how often that was."""
        for number in rounds:
            if number not in self._draws:
                self._draws[number] = sample_clients(self.args, self.clients, number)
        counts = Counter(client for number in rounds for client in self._draws[number])
        return max(counts.values(), default=0)

    def _describe_analysis(self) -> str:
        most = self._count(self._ledger.releases)
        limit = f"; each client was drawn for {most} of them at most" if most < len(self._ledger.releases) else ""
        return self._make_noise(self.noise_multiplier).describe() + limit

    def _check_clients(self) -> None:
        self._check_delta()
        self._make_noise(1.0).share_variance(self._threshold)

    def _count_noise(self) -> tuple[float, str]:
        """All members add their share, and no more than the threshold's, without the colluders', count."""
        counted = self._threshold - self.args.colluding_clients
        return math.sqrt(self.sampling.per_round / counted), f", of which the noise of {counted} counts"

    @property
    def _threshold(self) -> int:
        return compute_threshold(self.args.secure_threshold, self.sampling.per_round)

    def _make_noise(self, noise_multiplier: float) -> NoiseShares:
        values = sum(math.prod(shape) for shape in self.shapes.values())
        return NoiseShares(noise_multiplier, self.args.colluding_clients, values)


def make_dp(
    args: FederatedConfig, clients: Sequence[str], adapter: Mapping[str, torch.Tensor], store: RoundStore
) -> ClientDP | None:
    """Client-level differential privacy of a federation; None where it has none.

    Args:
        args, clients, adapter, store: As [`ClientDP`] has them.
    """
    if not args.adds_noise:
        return None
    return (ShareDP if args.secure_aggregation else ClientDP)(args, clients, adapter, store)
