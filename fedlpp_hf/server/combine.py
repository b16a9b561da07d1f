# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From a round's accepted updates to their mean, without noise, to a multiple of it, and to what is left without an offset."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig

from ..aggregation.round import AggregationResult, RoundUpdates
from ..aggregation.rules import aggregate
from ..config.federated import FederatedConfig
from ..config.rules import RULES
from .admission import AcceptedUpdate
from .state import ServerState


# s times the mean of a round's updates, each less an offset: by s, and the offset's tensors, or none.
ScaledMean = Callable[[float, Mapping[str, torch.Tensor]], AggregationResult]


def combine_updates(
    args: FederatedConfig,
    updates: Mapping[str, AcceptedUpdate],
    before: ServerState,
    start: Mapping[str, torch.Tensor],
    peft_config: PeftConfig,
    earlier: Sequence[Mapping[str, Any]],
) -> ScaledMean:
    """The mean of a round's updates by the options' rules, and multiples of it.

    Args:
        args: The federation's options.
        updates: By client.
        before: The server that the step starts from.
        start: What the clients started from.
        peft_config: Of the adapter.
        earlier: The records of the rounds before.
    """
    counts = not args.broadcasts and args.robust == "none"
    rounds = _count_rounds(updates, earlier) if counts else dict.fromkeys(updates, 1)
    given = RoundUpdates(
        deltas=[update.delta for update in updates.values()],
        weights=[
            rounds[client] * ((update.num_examples or 0) if args.weighting == "examples" else 1.0)
            for client, update in updates.items()
        ],
        start=start,
        adapter=before.adapter,
        peft_config=peft_config,
        residual=before.residual,
        num_attackers=args.num_attackers,
    )
    if RULES[args.aggregation].averages_products:
        # What is multiplied, or subtracted from, is the product; the factors' change follows from that.
        return lambda scale, offset: aggregate(
            args.aggregation, replace(given, scale=scale, offset=offset), args.robust
        )
    return scale_result(aggregate(args.aggregation, given, args.robust))


def scale_result(result: AggregationResult) -> ScaledMean:
    """Multiples of a mean of factors that has been released already: noise is drawn, and paid for, once."""

    def at(scale: float, offset: Mapping[str, torch.Tensor]) -> AggregationResult:
        if scale == 1 and not offset:
            return result
        moved = {key: value.double() - offset.get(key, 0.0) for key, value in result.delta.items()}
        return replace(result, delta={key: (scale * value).float() for key, value in moved.items()})

    return at


def _count_rounds(clients: Iterable[str], earlier: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rounds of each client's training its update holds, as far as the server saw them: its share of the mean."""
    return {client: 1 + sum(client in record["clients"] for record in earlier) for client in clients}
