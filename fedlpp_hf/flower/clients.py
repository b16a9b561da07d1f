# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The clients of a federation over Flower: wait for them, send them the base, send them tasks."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from .base_transfer import PackedBase
from .grid_requests import BASE, DESCRIBE, POLL_SECONDS, TRAIN, Answer, GridRequests, Request


if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
    from .loading import NetworkConfig

logger = logging.getLogger(__name__)

_ROUND_SECONDS = 3600.0  # the default of `round_timeout`


class FlowerClients:
    """The clients that a Grid reaches, by the ids they announce; one node may train for several clients.

    Args:
        grid: Flower's.
        network: timeouts, retries and the size of a piece of the base.
        base: the base that clients must have.
        round_timeout: seconds that clients have for a task, including the transport; an hour by default.
    """

    def __init__(self, grid: "Grid", network: "NetworkConfig", base: PackedBase, round_timeout: float | None = None):
        self.network, self.base = network, base
        self.round_timeout = _ROUND_SECONDS if round_timeout is None else round_timeout
        self.num_examples: dict[str, int] = {}
        self._requests = GridRequests(grid, network.lost_timeout)
        self._nodes: dict[str, int] = {}  # client id → node, of clients that are connected
        self._last_nodes: dict[str, int] = {}  # the same, with clients that have left
        self._described: dict[int, str] = {}  # node → time of the connection in which it was described or rejected
        self._rejected: dict[int, str] = {}  # node → reason

    def gather(self, count: int, at_least: int | None = None) -> dict[str, int]:
        """Wait until `count` clients are connected and have the base; returns their numbers of rows.

        Args:
            count: clients to wait for.
            at_least: clients that are enough once `lost_timeout` has passed; by default `count`.

        Raises:
            RuntimeError: if too few have joined within `join_timeout`; names the rejected nodes and the reasons.
        """
        began = time.monotonic()
        while True:
            self._welcome(self.network.join_timeout)  # a client may have to load a model before its first answer
            waited = time.monotonic() - began
            needed = count if at_least is None or waited <= self.network.lost_timeout else at_least
            if len(self._nodes) >= needed:
                break
            if waited > self.network.join_timeout:
                rejected = "".join(f" Node {node}: {reason}." for node, reason in self._rejected.items())
                raise RuntimeError(
                    f"{len(self._nodes)} of {count} clients joined within {self.network.join_timeout:.0f} s "
                    f"({', '.join(self._nodes) or 'none'}).{rejected} Start the others, or lower num_clients."
                )
            time.sleep(POLL_SECONDS)
        logger.info("Clients: %s", ", ".join(f"{client} ({rows} rows)" for client, rows in self.num_examples.items()))
        return dict(self.num_examples)

    def train(self, tasks: list["ClientTask"]) -> Iterator["ClientUpdate | ClientFailure"]:
        """Send the tasks and yield one update or failure for each, in the order of arrival."""
        from ..wire.messages import ClientFailure

        unanswered = {task.client_id: task for task in tasks}
        reasons: dict[str, str] = {}
        for _ in range(1 + self.network.task_retries):
            self._welcome(self.network.lost_timeout)
            for client in unanswered.keys() - self._nodes.keys():
                rejection = self._rejected.get(self._last_nodes.get(client, -1))
                reasons[client] = "it is not connected" if rejection is None else f"it was rejected: {rejection}"
            for client, answer in self._requests.ask(TRAIN, self._make_requests(unanswered), self.round_timeout):
                try:
                    update = _read_update(client, answer)
                except (ValueError, KeyError, TypeError) as error:
                    reasons[client] = str(error)
                    logger.warning("Client %s: %s", client, error)
                else:
                    del unanswered[client]
                    yield update
            if not unanswered:
                return
        for client in unanswered:
            yield ClientFailure(client, reasons[client])

    def _make_requests(self, tasks: Mapping[str, "ClientTask"]) -> Iterator[Request]:
        for client, task in list(tasks.items()):
            if client in self._nodes:
                content = {"task": task.to_bytes(), "base": self.base.fingerprint, "timeout": self.round_timeout}
                yield Request(client, self._nodes[client], content)

    def _welcome(self, timeout: float) -> None:
        """Ask nodes that connected, or reconnected, to describe themselves, and send the base to those without it."""
        present = self._requests.find_nodes()
        new = [node for node, since in present.items() if self._described.get(node) != since]
        for client, node in list(self._nodes.items()):
            if node not in present or node in new:  # after a reconnect a node may have another version or base
                del self._nodes[client]
        content: dict[str, Any] = {"base": self.base.fingerprint, "version": __version__}
        requests = (Request(node, node, content) for node in new)
        kind, received = DESCRIBE, dict.fromkeys(new, -1)
        while new:
            incomplete: dict[int, int] = {}
            for node, answer in self._requests.ask(kind, requests, timeout):
                if isinstance(answer, str) or "error" in answer:
                    self._reject(node, answer, present[node])
                elif "received" not in answer:
                    self._register(node, json.loads(answer["clients"]), present[node])
                elif int(answer["received"]) > received[node]:
                    incomplete[node] = received[node] = int(answer["received"])
                else:
                    self._reject(node, {"error": "it does not keep the pieces of the base"}, present[node])
            new, kind, timeout = list(incomplete), BASE, self.round_timeout
            requests = (
                Request(node, node, content | self.base.read(start, self.network.chunk_megabytes << 20))
                for node, start in incomplete.items()
            )

    def _register(self, node: int, rows: Mapping[str, int], since: str) -> None:
        taken = [client for client in rows if self._nodes.get(client, node) != node]
        if taken:
            other = self._nodes[taken[0]]
            self._reject(node, {"error": f"it announces client {taken[0]!r}, which is at node {other}"}, since)
            return
        self._described[node] = since
        self._rejected.pop(node, None)
        for client, count in rows.items():
            self._nodes[client] = self._last_nodes[client] = node
            self.num_examples[client] = count

    def _reject(self, node: int, answer: Answer, since: str) -> None:
        """Note why a node can't train. After its own error it is not asked again until it reconnects."""
        if not isinstance(answer, str):
            self._described[node] = since
        reason = answer if isinstance(answer, str) else str(answer["error"])
        if self._rejected.get(node) != reason:
            logger.warning("Node %d is rejected: %s", node, reason)
        self._rejected[node] = reason


def _read_update(client: str, answer: Answer) -> "ClientUpdate":
    from ..wire.messages import ClientUpdate

    if isinstance(answer, str):
        raise ValueError(answer)
    if "error" in answer:
        raise ValueError(answer["error"])
    update = ClientUpdate.from_bytes(answer["update"])
    if update.client_id != client:
        raise ValueError(f"it answered as client {update.client_id!r}")
    return update
