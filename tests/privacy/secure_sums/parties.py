# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients and a server of a sum, in this process, and what is lost between them."""

import numpy as np

from fedlpp_hf.privacy.secure_sums.client import SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.rounds import RoundSum, run_sum
from fedlpp_hf.privacy.secure_sums.server import SumServer
from fedlpp_hf.privacy.secure_sums.terms import SumTerms


TASK = "0" * 64  # its digest


def make_terms(size=50, share=0.5, bound=1.0, number=3, **changes):
    return SumTerms(
        **{"federation_id": "federation", "round": number, "bound": bound, "share": share, "size": size, "task": TASK}
        | changes
    )


def name_clients(count):
    return [f"site-{number:02d}" for number in range(count)]


def make_values(count, size, seed=0, bound=1.0):
    """The clients' updates `(count, size)`, uniform within the bound."""
    return np.random.default_rng(seed).uniform(-bound, bound, (count, size)).astype(np.float32)


def make_clients(terms, count, seed=0, identities=None):
    """Clients by id, and their values."""
    values = make_values(count, terms.size, seed, terms.bound)
    clients = {}
    for number, name in enumerate(name_clients(count)):
        contribution = Contribution(values[number], float(number), number + 1)
        clients[name] = SumClient(terms, name, contribution, identities and identities[name])
    return clients, values


def run(terms, clients, wanted=0, lost=(), change=lambda step, client, data: data, heard=None):
    """All that the server gets. `lost` are pairs of a step and a client whose answer does not arrive; `change` forges answers.

    `heard` collects (step, client, answer).
    """

    def pass_on(step, client, make):
        if (step, client) in lost:
            return client, "lost"
        try:
            answer = change(step, client, make())
        except ValueError as error:
            return client, str(error)
        if heard is not None:
            heard.append((step, client, answer))
        return client, answer

    def train(tasks):
        for client in tasks:
            yield pass_on("keys", client, clients[client].advertise)

    def ask(step, requests):
        for client, request in requests.items():
            yield pass_on(step, client, lambda client=client, request=request: clients[client].answer(step, request))

    answers = list(run_sum(terms, dict.fromkeys(clients), wanted, train, ask))
    sums = [answer for answer in answers if isinstance(answer, RoundSum)]
    failures = {answer.client_id: answer.reason for answer in answers if not isinstance(answer, RoundSum)}
    assert len(sums) <= 1
    return (sums[0] if sums else None), failures


def start(count=4, size=20, share=0.5, identities=None):
    """A server that has all keys, its clients, their values, and the first requests."""
    terms = make_terms(size, share)
    clients, values = make_clients(terms, count, identities=identities)
    server = SumServer(terms)
    for name, client in clients.items():
        server.add_keys(name, client.advertise())
    return server, clients, values, server.make_rosters()


def reach(step, count=4, size=20, share=0.5, identities=None):
    """A round up to the requests of a step: the server, the clients, their values, the requests."""
    server, clients, values, requests = start(count, size, share, identities)
    for now, add, make in (
        ("roster", server.add_sealed, server.make_deliveries),
        ("shares", server.add_masked, server.make_survivors),
        ("survivors", server.add_confirmation, server.make_openings),
    ):
        if now == step:
            return server, clients, values, requests
        for name, request in requests.items():
            add(name, clients[name].answer(now, request))
        requests = make()
    assert step == "opening"
    return server, clients, values, requests
