# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The server's part of client-level differential privacy: who is drawn, the noise, what is spent, and when the budget ends."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..aggregation.round import AggregationResult
from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.accounting import ClientSampling, compute_epsilon, solve_noise
from ..privacy.client_level import ClientMechanism
from ..privacy.draws import draw_clients
from ..tensors.codebooks import FULL_PRECISION
from .admission import AcceptedUpdate
from .ledger import Ledger, LedgerFile
from .store import RoundStore


logger = logging.getLogger(__name__)


class ClientDP:
    """Client-level differential privacy of one federation. Its noise is solved for before any client is asked.

    It holds for all that leaves the server: the proxies, and the model. It does not hold against the server, which has each
    update, each client's metrics and who was drawn.

    Args:
        args: The federation's options.
        clients: All clients, in a fixed order.
        adapter: The server's, for the shapes.
        store: Of the federation.

    Raises:
        ValueError: for options that this federation's clients do not allow.
    """

    def __init__(
        self,
        args: FederatedConfig,
        clients: Sequence[str],
        adapter: Mapping[str, torch.Tensor],
        store: RoundStore,
    ):
        assert args.target_delta is not None and args.clip_update_norm is not None  # the options' check
        self.args, self.clients, self.delta = args, list(clients), args.target_delta
        self.sampling = ClientSampling(
            args.client_sampling, len(clients), min(args.clients_per_round or len(clients), len(clients))
        )
        self.shapes = {key: adapter[key].shape for key in trainable_keys(args.aggregation, adapter)}
        self.clip: float = args.clip_update_norm
        self._file = LedgerFile(store.root)
        self._check_clients()
        self._ledger = Ledger("", self._solve_noise(), "")
        self._warn()

    @property
    def noise_multiplier(self) -> float:
        """Of the whole release of a round."""
        return self._ledger.noise_multiplier

    def begin(self, federation_id: str) -> None:
        """Begin the ledger.

        Raises:
            ValueError: as [`LedgerFile.begin`].
        """
        self._ledger = self._file.begin(federation_id, self.noise_multiplier, self.args.overwrite)

    def resume(self, federation_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the last of the `records` and the ledger ended.

        Raises:
            ValueError: as [`LedgerFile.resume`].
        """
        self._ledger = self._file.resume(federation_id, records)
        if "privacy" in records[-1]:
            self.clip = records[-1]["privacy"]["next_clip_norm"]

    def affords_round(self, number: int) -> bool:
        """Whether the budget is enough for another round; if not, say so."""
        target, after = self.args.target_epsilon, self._spent(number)
        if target is None or after <= target:
            return True
        logger.warning(
            f"Round {number} does not start: it would bring ε to {after:.3f} at δ = {self.delta:g}, and target_epsilon is "
            f"{target:g}. {self._spent():.3f} is spent. The federation ends here."
        )
        return False

    def begin_round(self, number: int) -> None:
        """Told before the sum of a round is opened, where clients add the noise."""

    def local_options(self) -> dict[str, Any]:
        """What a round's tasks say of clip and noise, as [`LocalOptions`] has it."""
        return {"clip_norm": self.clip}

    def draw_clients(self) -> list[str]:
        """The clients of the next round. After its noise was drawn, others are drawn, be it for the same round again."""
        secret = bytes.fromhex(self._ledger.secret)
        return draw_clients(secret, len(self._ledger.releases), self.clients, self.sampling)

    def release(self, number: int, updates: Mapping[str, AcceptedUpdate]) -> AggregationResult:
        """The round's mean update with noise, and `privacy` for the round's record. Nothing else of the updates is used."""
        if not updates:
            logger.warning(f"Round {number} has no update; its noise is drawn and paid for all the same.")
        self._ledger = self._file.add(self._ledger, number)
        mechanism = ClientMechanism(self.noise_multiplier, self.sampling.per_round, self.args.clip_quantile)
        clip = self.clip
        release = mechanism.release(
            [update.delta for update in updates.values()],
            [update.metrics.get("clipped", 0.5) for update in updates.values()],
            clip,
            self.shapes,
        )
        report = self._describe(release.noise_std, self.sampling.per_round)
        self.clip = report["next_clip_norm"] = release.next_clip
        if release.below_clip is not None:
            report["below_clip"] = release.below_clip
        return AggregationResult(release.mean, report={"privacy": report})

    def _describe(self, noise_std: float, divisor: int) -> dict[str, Any]:
        """`privacy` of a round's record.

        Args:
            noise_std: Of the noise on each value of its sum, as far as it counts.
            divisor: What the sum was divided by.
        """
        return {
            "epsilon": self._spent(),
            "epsilon_of_another_round": self._spent(self._ledger.releases[-1] + 1),
            "delta": self.delta,
            "releases": len(self._ledger.releases),
            "noise_multiplier": self.noise_multiplier,
            "noise_std": noise_std,
            "clip_norm": self.clip,
            "next_clip_norm": self.clip,
            "divisor": divisor,
            "analysis": self._describe_analysis(),
        }

    def _spent(self, *more: int) -> float:
        """ε so far, and with `more` rounds."""
        return self._compute(self.noise_multiplier, self._count([*self._ledger.releases, *more]))

    def _count(self, rounds: Sequence[int]) -> int:
        """Of the releases of these rounds, those in which a client's data may be."""
        return len(rounds)

    def _compute(self, noise_multiplier: float, releases: int) -> float:
        return compute_epsilon(noise_multiplier, self.sampling, releases, self.delta)

    def _solve(self, target: float, releases: int) -> float:
        return solve_noise(target, self.delta, self.sampling, releases)

    def _describe_analysis(self) -> str:
        return self.sampling.describe()

    def _solve_noise(self) -> float:
        given, target = self.args.noise_multiplier, self.args.target_epsilon
        if given is None:
            assert target is not None
            return self._solve(target, self._count(range(1, self.args.num_rounds + 1)))
        first = self._compute(given, 1)
        if target is not None and first > target:
            raise ValueError(
                f"noise_multiplier={given}: the first round alone spends ε = {first:.3f}, and target_epsilon={target}. Leave "
                "noise_multiplier out, and it is solved for, or raise target_epsilon."
            )
        return given

    def _check_delta(self) -> None:
        number = self.sampling.clients
        if self.delta >= 1 / number:
            raise ValueError(
                f"target_delta={self.delta} with {number} clients: with 1/{number} or more, to publish one client's data would "
                f"count as private. Set it well below {1 / number:g}."
            )

    def _check_clients(self) -> None:
        self._check_delta()
        number = self.sampling.clients
        compresses = self.args.update_bits != FULL_PRECISION or self.args.update_density < 1
        if compresses and self.sampling.kind == "fixed" and self.sampling.per_round < number:
            raise ValueError(
                f"Client-level differential privacy does not go with update_bits={self.args.update_bits}, "
                f"update_density={self.args.update_density} and {self.sampling.per_round} of {number} clients in a round: what "
                "a client keeps of its rounding errors depends on the rounds it was in, and so on who else was. Set "
                "client_sampling='poisson', where each is drawn by itself, or send plain updates."
            )

    def _warn(self) -> None:
        values = sum(math.prod(shape) for shape in self.shapes.values())
        multiplier, _ = ClientMechanism(self.noise_multiplier, 1, self.args.clip_quantile).split_noise()
        factor, counted = self._count_noise()
        needed = factor * multiplier * math.sqrt(values)
        if needed > self.sampling.per_round:
            logger.warning(
                f"The noise on a round's mean is {needed / self.sampling.per_round:.1f} times as long as the clip: {values} "
                f"values, noise multiplier {multiplier:.3g}, {self.sampling.per_round} clients in a round{counted}. It takes "
                f"{math.ceil(needed)} clients in a round until it is no longer than one client's update. Train fewer values "
                "(a lower rank, aggregation='freeze_a'), or see docs/data-privacy.md for few clients."
            )
        if self.args.aggregation != "freeze_a":
            logger.warning(
                "With noise, aggregation='freeze_a' is the better choice: noise on both factors is multiplied in B·A, and half "
                "as many values get noise."
            )

    def _count_noise(self) -> tuple[float, str]:
        """How many times as long as the noise that counts the noise on a sum is, and why, for the warning."""
        return 1.0, ""
