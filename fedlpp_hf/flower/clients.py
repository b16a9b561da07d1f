# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The clients of a federation over Flower: wait for them, send them tasks, and collect their updates."""

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .answers import read_update
from .base_copies import Bases
from .client_keys import ClientKeys
from .grid_requests import TRAIN, Answer, GridRequests, Request
from .guests import Guests


if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from ..wire.encoding import MessageLimit
    from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
    from .loading import NetworkConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ROUND_SECONDS = 3600.0  # the default of `round_timeout`


class FlowerClients:
    """The clients that a Grid reaches. One node may train for several clients.

    Args:
        grid: Flower's.
        network: timeouts, retries and the size of a piece of the base.
        bases: the base that each node must have.
        limit: of an update's size.
        round_timeout: seconds that clients have for a task, including the transport; an hour by default.
        keys: which ids each node may announce; without them, the first node that announces an id has it.
        hides_rows: whether clients keep their numbers of rows to themselves.
    """

    def __init__(
        self,
        grid: "Grid",
        network: "NetworkConfig",
        bases: Bases,
        limit: "MessageLimit",
        *,
        round_timeout: float | None = None,
        keys: ClientKeys | None = None,
        hides_rows: bool = False,
    ):
        self.network, self.limit = network, limit
        self.round_timeout = _ROUND_SECONDS if round_timeout is None else round_timeout
        self._requests = GridRequests(grid, network.lost_timeout)
        self._guests = Guests(grid, network, bases, self.round_timeout, keys, hides_rows)

    def gather(
        self, count: int, at_least: int | None = None, known: Mapping[str, int | None] | None = None
    ) -> dict[str, int | None]:
        """Wait until `count` clients are connected and have the base; returns their numbers of rows.

        These are the federation's clients from then on: no other id is admitted, and none with another number of rows.

        Args:
            count: clients to wait for.
            at_least: clients that are enough once `lost_timeout` has passed; by default `count`.
            known: the numbers of rows of the clients with which the federation began, if it is resumed.

        Raises:
            RuntimeError: if too few have joined within `join_timeout` and nobody is taking the base; names the rejected nodes
                and the reasons.
        """
        guests, network = self._guests, self.network
        guests.expect(count, known)
        began, exported = time.monotonic(), guests.export_seconds
        while True:
            guests.attend()
            waited = time.monotonic() - began - (guests.export_seconds - exported)
            needed = count if at_least is None or waited <= network.lost_timeout else at_least
            if len(guests.nodes) >= needed:
                break
            if waited > network.join_timeout and not guests.sends_base:
                rejected = "".join(f" Node {node}: {reason}." for node, reason in guests.rejected.items())
                raise RuntimeError(
                    f"{len(guests.nodes)} of {count} clients joined within {network.join_timeout:.0f} s "
                    f"({', '.join(guests.nodes) or 'none'}).{rejected} Start the others, or lower num_clients."
                )
            guests.pause()
        num_examples = (
            {client: guests.num_examples[client] for client in guests.nodes} if known is None else dict(known)
        )
        guests.expect(count, num_examples)
        rows = {client: "" if count is None else f" ({count} rows)" for client, count in num_examples.items()}
        here = ", ".join(client + rows[client] for client in guests.nodes)
        logger.info("Clients: %s", here)
        return num_examples

    def train(self, tasks: list["ClientTask"]) -> Iterator["ClientUpdate | ClientFailure"]:
        """Send the tasks and yield one update or failure for each, in the order of arrival."""
        from ..wire.messages import ClientFailure

        def read(client: str, answer: Answer) -> "ClientUpdate":
            return read_update(client, answer, self.limit)

        for client, update in self.send_tasks({task.client_id: task for task in tasks}, read):
            yield ClientFailure(client, update) if isinstance(update, str) else update

    def send_tasks(
        self, tasks: Mapping[str, "ClientTask"], read: Callable[[str, Answer], T]
    ) -> Generator[tuple[str, T | str], None, None]:
        """Send tasks by client and yield each client with its answer, or the reason why there is none.

        Args:
            tasks: by client.
            read: of an answer; raises ValueError for one that breaks a rule.
        """

        def write(client: str) -> dict[str, Any]:
            return {"task": tasks[client].to_bytes()}

        yield from self.ask(TRAIN, tasks, write, read, 1 + self.network.task_retries)

    def ask(
        self,
        kind: str,
        clients: Collection[str],
        write: Callable[[str], Mapping[str, Any]],
        read: Callable[[str, Answer], T],
        tries: int = 1,
    ) -> Generator[tuple[str, T | str], None, None]:
        """Ask clients, and yield each with its answer, or the reason why there is none, in the order of arrival.

        Args:
            kind: of the messages.
            clients: whom to ask.
            write: the fields of a client's request.
            read: of an answer.
            tries: how often a client is asked that does not answer, or not as it should.
        """
        from ..wire.text import make_printable

        unanswered = set(clients)
        reasons: dict[str, str] = {}
        try:
            for _ in range(tries):
                self._wait_for_guests(unanswered)
                reasons |= {client: self._guests.explain_absence(client) for client in unanswered}
                asked = [client for client in clients if client in unanswered]
                self._requests.send(kind, self._make_requests(asked, write), self.round_timeout)
                while self._requests.unanswered:
                    present = self._requests.find_nodes()
                    answers = self._requests.receive(present)
                    for client, answer in answers:
                        try:
                            found = read(client, answer)
                            if self._guests.is_withdrawn(client):
                                raise ValueError("its key was withdrawn")
                        except ValueError as error:
                            reasons[client] = str(error)
                            logger.warning("Client %s: %s", client, make_printable(str(error)))
                        else:
                            unanswered.discard(client)
                            yield client, found
                    self._guests.attend(None if answers else present)  # who takes an answer may take long over it
                    if self._requests.unanswered:
                        self._requests.pause()
                if not unanswered:
                    return
        finally:
            self._requests.forget()  # the round may close before all have answered
        for client in clients:
            if client in unanswered:
                yield client, reasons[client]

    def attend(self) -> None:
        """Take in who comes and goes while no round is under way."""
        self._guests.attend()

    def find_network(self) -> dict[str, Any]:
        """Who is connected and has the base (`here`), and which nodes are refused (`refused_nodes`, with the reasons).

        Safe to call in another thread.
        """
        rejected = dict(self._guests.rejected)
        return {
            "here": sorted(dict(self._guests.nodes)),
            "refused_nodes": {str(node): reason for node, reason in rejected.items()},
        }

    def _wait_for_guests(self, clients: set[str]) -> None:
        """Let clients that have just come back describe themselves before the round's tasks are sent."""
        deadline = time.monotonic() + self.network.lost_timeout
        while True:
            self._guests.attend()
            missing = clients - self._guests.nodes.keys()
            if not self._guests.may_become(missing) or time.monotonic() > deadline:
                return
            self._guests.pause()

    def _make_requests(self, clients: Collection[str], write: Callable[[str], Mapping[str, Any]]) -> Iterator[Request]:
        for client in clients:
            if client in self._guests.nodes:
                node = self._guests.nodes[client]
                content = {**write(client), "timeout": self.round_timeout, **self._guests.name_base(node)}
                yield Request(client, node, content)
