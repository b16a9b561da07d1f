# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which clients the owner may drop: those without whom every round that is left has enough."""

from collections.abc import Collection, Sequence

from ..config.federated import FederatedConfig
from ..config.spelling import suggest
from .sampling import sample_clients


def check_dropped(args: FederatedConfig, clients: Sequence[str], dropped: Collection[str], next_round: int) -> None:
    """Refuse to drop clients that are unknown, or without whom a round to come could not have enough updates.

    The draws are known in advance, so every round that is left is looked at. Where the server adds noise they are secret, and
    a round may be empty.

    Args:
        args: The federation's options.
        clients: All of them, in the order of the draw.
        dropped: Those that shall not be asked.
        next_round: The first round without them.

    Raises:
        ValueError: naming the client, or the round.
    """
    for client in dropped:
        if client not in clients:
            raise ValueError(f"{client!r:.120} is no client of this federation{suggest(client, clients)}")
    if args.adds_noise and not args.secure_aggregation:
        return
    for number in range(next_round, args.num_rounds + 1):
        left = [client for client in sample_clients(args, clients, number) if client not in dropped]
        if len(left) < args.min_clients:
            raise ValueError(
                f"Without the dropped clients ({', '.join(sorted(dropped))}), round {number} would ask {len(left)}; "
                f"min_clients={args.min_clients}. Take one of them back first (`fedlpp-hf drop … --undo`), or `fedlpp-hf stop` and "
                "resume with a lower min_clients."
            )
