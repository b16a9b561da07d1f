# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Secure aggregation over Flower's messages: the server's side, and how large its answers may be.

Flower's own protocol (SecAgg+) is for its older interface, which this library does not use.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .answers import read_sum
from .clients import FlowerClients
from .grid_requests import SUM, Answer


if TYPE_CHECKING:
    from ..config.federated import FederatedConfig
    from ..privacy.secure_sums.rounds import Answers, RoundSum
    from ..server.loop import TrainClients
    from ..wire.messages import ClientFailure, ClientTask

_MEMBER_BYTES = 2000  # of a message, for each member: an id of 100 characters, and what is sealed for it
_SPARE_BYTES = 1 << 16


def limit_sum(update_bytes: int, num_clients: int) -> int:
    """How long a client's answer may be: an update, or what it sends about each other client."""
    return max(update_bytes, _SPARE_BYTES + _MEMBER_BYTES * num_clients)


def sum_over_flower(
    args: "FederatedConfig",
    adapter: Mapping[str, Any],
    clients: FlowerClients,
    before_opening: Callable[[int], None],
) -> "TrainClients":
    """What trains a round's clients and opens the sum of their updates.

    Args:
        args: the federation's options.
        adapter: gives keys and shapes of an update.
        clients: whom the Grid reaches.
        before_opening: told the round whose sum is about to be opened.
    """
    from ..config.rules import trainable_keys
    from ..privacy.secure_sums.rounds import run_sum
    from ..privacy.secure_sums.terms import make_terms

    size = sum(adapter[key].numel() for key in trainable_keys(args.aggregation, adapter))

    def read(client: str, answer: Answer) -> bytes:
        return read_sum(answer)

    def send_tasks(tasks: "Mapping[str, ClientTask]") -> "Answers":
        return clients.send_tasks(tasks, read)

    def ask(step: str, requests: Mapping[str, bytes]) -> "Answers":
        def write(client: str) -> dict[str, Any]:
            return {"sum": requests[client], "step": step, "client": client}

        return clients.ask(SUM, requests, write, read)

    def train(tasks: "list[ClientTask]") -> "Iterator[ClientFailure | RoundSum]":
        terms = make_terms(args, tasks[0], size)
        wanted = args.clients_per_round or len(tasks)
        asked = {task.client_id: task for task in tasks}
        yield from run_sum(terms, asked, wanted, send_tasks, ask, lambda: before_opening(terms.round))

    return train
