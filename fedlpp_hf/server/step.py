# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From a round's mean update to the server's next state: the control variate, the optimizer, and what the owner chooses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..aggregation.optimizers import ServerOptimizer
from ..config.federated import FederatedConfig
from ..config.rules import RULES
from ..tensors.adapters import global_norm
from .combine import ScaledMean
from .owner import Owner, counted_wait
from .sampling import make_seed
from .state import ServerState


# Shares of `control_variate` that the owner chooses from, where it has rows to choose by; of equals, the first.
_SHARES = (1.0, 0.5, 0.0)


@dataclass(frozen=True, slots=True)
class MeanUpdate:
    """What aggregation made of a round's updates.

    Args:
        round: Number of the round.
        scaled: s times the mean of the updates less an offset.
        start: What clients started from.
        seeds: Of the owner's pairs of runs; none where it shall not estimate the variate.
    """

    round: int
    scaled: ScaledMean
    start: Mapping[str, torch.Tensor]
    seeds: Sequence[int]


def check_owner(args: FederatedConfig, owner: Owner | None) -> None:
    """Refuse options that need more of the owner than there is.

    Raises:
        ValueError: naming the option, and what is missing.
    """
    moved = args.base_weights != [0.0]
    for name, wanted in (("control_variate", args.control_variate), ("base_weights", moved)):
        if wanted and owner is None:
            raise ValueError(
                f"{name}={getattr(args, name)}: only the owner's process has the full model it needs; set "
                "`full_model`."
            )
    for name in ("base_weights", "update_scales"):
        if len(getattr(args, name)) > 1 and (owner is None or not owner.selects):
            raise ValueError(
                f"{name}={getattr(args, name)} has several values, but there are no rows to choose by. Pass "
                "`selection_dataset` (in the recipes: owner_data and selection_rows), or give one value."
            )
    if owner is None:
        return
    if owner.selects and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True with `selection_dataset`: both choose the round to publish. Leave one out."
        )


def take_step(
    args: FederatedConfig, owner: Owner | None, optimizer: ServerOptimizer, state: ServerState, update: MeanUpdate
) -> tuple[ServerState, dict[str, Any]]:
    """Move the server by a mean update.

    Where the owner has selection rows, it chooses what has the least loss on them: the share of the variate and λ of W − λE + θ
    together, then the scale of the step.

    Args:
        args: The federation's options.
        owner: Estimates the variate, and chooses.
        optimizer: Of the server.
        state: The server before.
        update: The round's mean.

    Returns:
        The server after, and what to record.
    """
    report: dict[str, Any] = {}
    variate: Mapping[str, torch.Tensor] = {}
    scales, weights, shares = args.update_scales, args.base_weights, [0.0]
    if args.control_variate and owner is not None and update.seeds:
        with counted_wait(report):
            variate, report["variate_share"] = owner.estimate_variate(update.start, update.round, update.seeds)
        if not RULES[args.aggregation].averages_products:
            report["update_norm"] = global_norm(update.scaled(1.0, {}).delta)
        report["variate_norm"] = global_norm(variate)
        shares = [args.control_variate * share for share in (_SHARES if owner.selects else (1.0,))]

    def move(scale: float, share: float, weight: float) -> tuple[ServerState, Mapping[str, Any]]:
        mean = update.scaled(scale, {key: share * value for key, value in variate.items()} if share else {})
        adapter, moments = optimizer.step(state.adapter, mean.delta, state.optimizer)
        return ServerState(adapter, moments, mean.residual, weight), mean.report

    candidates = [move(scales[0], share, weights[0]) for share in shares]
    if owner is None or not owner.selects:
        chosen, found = candidates[0]
        report |= {"base_weight": weights[0]} if weights != [0.0] else {}
        return chosen, dict(found) | report | ({"update_scale": scales[0]} if scales != [1.0] else {})
    with counted_wait(report):
        loss, place, number = min(
            (loss, place, number)
            for place, (candidate, _) in enumerate(candidates)
            for number, loss in enumerate(owner.measure_selection(candidate.adapter, candidate.residual, weights))
        )
        share, weight, scale = shares[place], weights[number], scales[0]
        chosen, found = candidates[place]
        chosen = replace(chosen, base_weight=weight)
        for other in scales[1:]:
            candidate, other_found = move(other, share, weight)
            other_loss = owner.measure_selection(candidate.adapter, candidate.residual, [weight])[0]
            if other_loss < loss:
                loss, scale, chosen, found = other_loss, other, candidate, other_found
    report |= {"selection_loss": loss, "base_weight": weight}
    report |= {"variate_weight": share} if variate else {}
    return chosen, dict(found) | report | ({"update_scale": scale} if scales != [1.0] else {})


def list_owner_seeds(args: FederatedConfig, number: int, records: Iterable[Mapping[str, Any]]) -> list[int]:
    """Seeds of the owner's pairs of runs in the round `number`; none where it shall not estimate the variate."""
    runs = args.control_variate_runs if args.control_variate and is_variate_used(records) else 0
    return [make_seed(args.seed, number, f"owner {run}" if run else "owner") for run in range(runs)]


def is_variate_used(records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the owner should go on estimating the variate: not after it chose none of it in two rounds in a row.

    An estimate takes the owner two local runs for each of `control_variate_runs`, often more than all else in a round.
    """
    shares = [record.get("variate_weight") for record in records]
    return not any(one == other == 0.0 for one, other in pairwise(shares))
