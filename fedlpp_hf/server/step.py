# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From a round's mean update to the server's next state: the control variate, the optimizer, and what the owner chooses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ..aggregation.optimizers import ServerOptimizer
from ..config.federated import FederatedConfig
from ..tensors.adapters import global_norm
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
        delta: The mean update, by the adapter's keys.
        residual: What the adapter's rank can't hold of it.
        start: What clients started from.
        seeds: Of the owner's pairs of runs; none where it shall not estimate the variate.
    """

    round: int
    delta: Mapping[str, torch.Tensor]
    residual: Mapping[str, torch.Tensor]
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
    if owner is None:
        return
    if len(args.base_weights) > 1 and not owner.selects:
        raise ValueError(
            f"base_weights={args.base_weights} has several values, but there are no rows to choose by. Pass "
            "`selection_dataset` (in the recipes: owner_data and selection_rows), or give one value."
        )
    if owner.selects and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True with `selection_dataset`: both choose the round to publish. Leave one out."
        )


def take_step(
    args: FederatedConfig, owner: Owner | None, optimizer: ServerOptimizer, state: ServerState, update: MeanUpdate
) -> tuple[ServerState, dict[str, Any]]:
    """Move the server by a mean update.

    Where the owner has selection rows, it chooses the share of the variate and λ of W − λE + θ with the least loss on them.

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
    shares = [0.0]
    if args.control_variate and owner is not None and update.seeds:
        with counted_wait(report):
            variate, report["variate_share"] = owner.estimate_variate(update.start, update.round, update.seeds)
        report |= {"update_norm": global_norm(update.delta), "variate_norm": global_norm(variate)}
        shares = [args.control_variate * share for share in (_SHARES if owner.selects else (1.0,))]
    candidates = []
    for share in shares:
        delta = {key: _subtract(value, share, variate.get(key)) for key, value in update.delta.items()}
        adapter, moments = optimizer.step(state.adapter, delta, state.optimizer)
        candidates.append(ServerState(adapter, moments, update.residual, args.base_weights[0]))
    if owner is None or not owner.selects:
        if args.base_weights != [0.0]:
            report["base_weight"] = args.base_weights[0]
        return candidates[0], report
    with counted_wait(report):
        losses = [
            (loss, place, number)
            for place, candidate in enumerate(candidates)
            for number, loss in enumerate(
                owner.measure_selection(candidate.adapter, update.residual, args.base_weights)
            )
        ]
    loss, place, number = min(losses)
    chosen = replace(candidates[place], base_weight=args.base_weights[number])
    report |= {"selection_loss": loss, "base_weight": chosen.base_weight}
    return chosen, report | ({"variate_weight": shares[place]} if variate else {})


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


def _subtract(delta: torch.Tensor, share: float, variate: torch.Tensor | None) -> torch.Tensor:
    return delta if variate is None or not share else (delta.double() - share * variate).float()
