# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients and seeds of a round, as functions of the federation's seed."""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from ..config.federated import FederatedConfig


def sample_clients(args: FederatedConfig, clients: Sequence[str], number: int) -> list[str]:
    """The clients of a round, uniform without replacement, a function of (seed, round) alone."""
    count = len(clients)
    if args.clients_per_round is not None:
        count = min(count, math.ceil(args.clients_per_round * (1 + args.over_sample)))
    generator = np.random.default_rng([args.seed, number])
    return [clients[index] for index in sorted(generator.choice(len(clients), count, replace=False))]


def make_seed(seed: int, number: int, client: str) -> int:
    """A client's seed in one round, a function of (seed, round, client) alone."""
    return int(np.random.SeedSequence([seed, number, zlib.crc32(client.encode())]).generate_state(1)[0] >> 1)
