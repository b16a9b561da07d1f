# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Secure aggregation in a simulation: clients of this process mask their updates, so that the server sees what it would see."""

from collections.abc import Callable, Iterator, Mapping

import torch

from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.secure_sums.client import SumClient
from ..privacy.secure_sums.fixed_point import make_contribution
from ..privacy.secure_sums.rounds import Answers, RoundSum, run_sum
from ..privacy.secure_sums.terms import make_terms
from ..server.loop import TrainClients
from ..wire.messages import ClientFailure, ClientTask


def sum_in_process(
    args: FederatedConfig,
    adapter: Mapping[str, torch.Tensor],
    train_clients: TrainClients,
    before_opening: Callable[[int], None],
) -> TrainClients:
    """`train_clients` with one masked sum of all updates in place of each of them.

    Every message is made and read as over a network. The updates of a round are in memory until it is over.

    Args:
        args: The federation's options.
        adapter: Gives keys and shapes.
        train_clients: Trains clients whose rows are in this process.
        before_opening: Told the round whose sum is about to be opened.
    """
    shapes = {key: adapter[key] for key in trainable_keys(args.aggregation, adapter)}
    size = sum(tensor.numel() for tensor in shapes.values())

    def train(tasks: list[ClientTask]) -> Iterator[ClientFailure | RoundSum]:
        terms = make_terms(args, tasks[0], size)
        members: dict[str, SumClient] = {}

        def make_keys(asked: Mapping[str, ClientTask]) -> Answers:
            for update in train_clients(list(asked.values())):
                if isinstance(update, RoundSum):
                    raise ValueError("These clients sum their updates already.")
                if isinstance(update, ClientFailure):
                    yield update.client_id, update.reason
                    continue
                client = update.client_id
                try:
                    members[client] = SumClient(terms, client, make_contribution(update, shapes))
                except ValueError as error:
                    yield client, str(error)
                else:
                    yield client, members[client].advertise()

        def ask(step: str, requests: Mapping[str, bytes]) -> Answers:
            for client, request in requests.items():
                try:
                    yield client, members[client].answer(step, request)
                except ValueError as error:
                    yield client, str(error)

        wanted = args.clients_per_round or len(tasks)
        asked = {task.client_id: task for task in tasks}
        yield from run_sum(terms, asked, wanted, make_keys, ask, lambda: before_opening(terms.round))

    return train
