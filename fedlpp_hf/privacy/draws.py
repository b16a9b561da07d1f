# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which clients a round with noise asks, drawn from a secret. Pure functions."""

import hashlib
from collections.abc import Sequence

from .accounting import ClientSampling
from .noise import draw_uniform


def draw_clients(secret: bytes, draw: int, clients: Sequence[str], sampling: ClientSampling) -> list[str]:
    """The clients of a round, in the order of `clients`; with `poisson` there may be none.

    Sampling makes ε smaller only for those who don't know who was drawn. Clients know the federation's seed, so the draw comes
    from a secret of the server, through SHAKE-256 (FIPS 202): a resumed server draws the same clients.

    Args:
        secret: At least 16 bytes that only the server has.
        draw: Number of the draw; a draw whose noise was drawn is never used again.
        clients: All of them, in a fixed order.
        sampling: How.
    """
    uniform = draw_uniform(len(clients), lambda count: hashlib.shake_256(secret + b"draw %d" % draw).digest(count))
    if sampling.kind == "poisson":
        chosen = [place for place, value in enumerate(uniform) if value < sampling.rate]
    else:
        chosen = sorted(sorted(range(len(clients)), key=uniform.__getitem__)[: sampling.per_round])
    return [clients[place] for place in chosen]
