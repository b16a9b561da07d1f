# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""One round of a secure sum from the server's side, over any transport."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from ...wire.messages import ClientFailure, ClientTask, ClientUpdate
from .fixed_point import OpenedSum
from .server import SumServer, TooFewError
from .terms import SumTerms


# Clients, each with its answer, or the reason why there is none. It is closed where a phase ends before all have answered.
Answers = Generator[tuple[str, bytes | str], None, None]
# Sends a step's requests to clients; the steps are those of [`SumClient.answer`].
Ask = Callable[[str, Mapping[str, bytes]], Answers]


@dataclass(frozen=True, slots=True)
class RoundSum:
    """What a server gets of a round in place of updates.

    Args:
        clients: Those whose updates are in it.
        opened: What it says.
        members: Clients that were ready to take part.
        threshold: Clients that had to help to open it.
        resolution: Step of its fixed point.
        bytes_up, bytes_down: By client, without the tasks.
    """

    clients: tuple[str, ...]
    opened: OpenedSum
    members: int
    threshold: int
    resolution: float
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]


def list_answered(answer: ClientUpdate | ClientFailure | RoundSum) -> tuple[str, ...]:
    """The clients of an answer."""
    return answer.clients if isinstance(answer, RoundSum) else (answer.client_id,)


def run_sum(
    terms: SumTerms,
    tasks: Mapping[str, ClientTask],
    wanted: int,
    train: Callable[[Mapping[str, ClientTask]], Answers],
    ask: Ask,
    before_opening: Callable[[], None] = lambda: None,
) -> Iterator[ClientFailure | RoundSum]:
    """Train a round's clients and open the sum of their updates; yields a failure for each client that is not in it, and the sum.

    Below the threshold of any phase nothing is opened, and there are failures alone.

    Args:
        terms: Of the round.
        tasks: By client.
        wanted: Members at which the first phase closes, without those who are slower.
        train: Sends the tasks; a client's answer are its keys ([`SumClient.advertise`]). Its generator is closed early where
            more clients were asked than are wanted.
        ask: Sends a step's requests; its generator, too, yields clients and answers.
        before_opening: Called before clients are asked for what opens the sum.
    """
    server, reasons = SumServer(terms), dict[str, str]()
    up: Counter[str] = Counter()
    down: Counter[str] = Counter()

    def take(answers: Answers, add: Callable[[str, bytes], None], most: int) -> None:
        count = 0
        with closing(answers):
            for client, answer in answers:
                if isinstance(answer, str):
                    reasons.setdefault(client, answer)
                    continue
                try:
                    add(client, answer)
                except ValueError as error:
                    reasons.setdefault(client, str(error))
                    continue
                up[client] += len(answer)
                count += 1
                if count == most:
                    return

    steps: tuple[tuple[str, Callable[[], dict[str, bytes]], Callable[[str, bytes], None]], ...] = (
        ("roster", server.make_rosters, server.add_sealed),
        ("shares", server.make_deliveries, server.add_masked),
        ("survivors", server.make_survivors, server.add_confirmation),
        ("opening", server.make_openings, server.add_shares),
    )
    try:
        take(train(tasks), server.add_keys, wanted)
        for step, make, add in steps:
            requests = make()
            if step == "opening":
                before_opening()
            down.update({client: len(request) for client, request in requests.items()})
            take(ask(step, requests), add, len(requests) + 1)
        opened = server.open()
    except (TooFewError, ValueError) as error:
        for client in tasks:
            yield ClientFailure(client, reasons.get(client, f"the sum was not opened: {error}"))
        return
    assert server.roster is not None
    survivors = tuple(server.survivors)
    for client in tasks:
        if client not in survivors:
            missing = "it did not answer" if client in server.roster.members else "the round closed without it"
            yield ClientFailure(client, reasons.get(client, missing))
    for client in reasons.keys() - tasks.keys():
        yield ClientFailure(client, reasons[client])
    members = len(server.roster.ids)
    yield RoundSum(survivors, opened, members, server.roster.threshold, terms.resolution(members), up, down)
