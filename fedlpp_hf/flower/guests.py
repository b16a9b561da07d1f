# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Nodes that connect: whose they are, whether they have the base, and which of them are the federation's clients."""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from .answers import RefusalError, read_description
from .base_copies import Bases
from .base_transfer import PackedBase
from .client_keys import ClientKeys, name_holder
from .grid_requests import BASE, DESCRIBE, Answer, GridRequests, Node, Request


if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from .loading import NetworkConfig

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 2.0  # after which a node that was rejected may try again; `fedlpp-hf client` waits longer
_NO_KEY = "its key is not in the directory of --client_keys, or was withdrawn"


@dataclass(slots=True)
class _Guest:
    """A node that describes itself and is sent the base. `ids`: those that it may announce; None where all are free."""

    since: str
    ids: tuple[str, ...] | None
    base: PackedBase
    sent: int = 0  # bytes of the base up to the end of the last piece


class Guests:
    """Welcomes nodes, none of which keeps another one waiting.

    Args:
        grid: Flower's.
        network: timeouts, and the size of a piece of the base.
        bases: the base that each node must have.
        piece_timeout: seconds that a node has to take a piece of the base.
        keys: which ids each node may announce; None where an id is whose node announces it first.
        hides_rows: whether clients keep their numbers of rows to themselves, as under secure aggregation.
    """

    def __init__(
        self,
        grid: "Grid",
        network: "NetworkConfig",
        bases: Bases,
        piece_timeout: float,
        keys: ClientKeys | None,
        hides_rows: bool = False,
    ):
        self.network, self.bases, self.piece_timeout, self.keys = network, bases, piece_timeout, keys
        self.hides_rows = hides_rows
        self.nodes: dict[str, int] = {}  # client id → node, of clients that are connected and have the base
        self.num_examples: dict[str, int | None] = {}
        self.rejected: dict[int, str] = {}  # node → reason
        self.export_seconds = 0.0  # spent on marked copies
        self._requests = GridRequests(grid, network.lost_timeout)
        self._guests: dict[int, _Guest] = {}
        self._invited: dict[int, float] = {}  # node → time
        self._last_nodes: dict[str, int] = {}  # as `nodes`, with clients that have left
        self._settled: dict[int, Node] = {}  # nodes that were registered or rejected, as they were then
        self._bases: dict[int, PackedBase] = {}
        self._keys: dict[str, bytes] = {}  # client id → the key of its node
        self._most = 1
        self._known: Mapping[str, int | None] | None = None

    def expect(self, count: int, known: Mapping[str, int | None] | None) -> None:
        """Set how many clients there are to be, and, once that is settled, who they are, with their numbers of rows."""
        self._most, self._known = count, known

    def attend(self, present: Mapping[int, Node] | None = None) -> None:
        """Take in who has come, left and answered; returns at once, unless a marked copy has to be made.

        Args:
            present: the nodes, where they were looked for just now.
        """
        present = self._requests.find_nodes() if present is None else present
        # After a reconnect a node may have another version or base.
        for number in [number for number, node in self._settled.items() if present.get(number) != node]:
            del self._settled[number]
        for client, number in list(self.nodes.items()):
            if number not in self._settled or self.is_withdrawn(client):
                del self.nodes[client]
                self._settled.pop(number, None)
        for number in self.rejected.keys() - present.keys() - set(self._last_nodes.values()):
            del self.rejected[number]
        for number in self._invited.keys() - present.keys() - self.rejected.keys():
            del self._invited[number]
        for number, node in present.items():
            guest = self._guests.get(number)
            if self._settled.get(number) == node or (guest is not None and guest.since == node.since):
                continue
            if number not in self.rejected or time.monotonic() > self._invited[number] + _AGAIN_SECONDS:
                self._invited[number] = time.monotonic()
                self._invite(number, node)
        for (number, since), answer in self._requests.receive(present):
            guest = self._guests.get(number)
            if guest is not None and guest.since == since and number in present:
                self._hear(number, present[number], guest, answer)
            elif guest is not None and guest.since == since:
                del self._guests[number]

    @property
    def sends_base(self) -> bool:
        """Whether a node is taking the base."""
        return any(guest.sent for guest in self._guests.values())

    def pause(self) -> None:
        """Wait before the next [`attend`]."""
        self._requests.pause()

    def may_become(self, clients: Collection[str]) -> bool:
        """Whether a node that is describing itself, or taking the base, may be one of `clients`."""
        return any(
            guest.ids is None or not set(guest.ids).isdisjoint(clients) for guest in self._guests.values() if clients
        )

    def explain_absence(self, client: str) -> str:
        """Why a client is not connected."""
        rejection = self.rejected.get(self._last_nodes.get(client, -1))
        return "it is not connected" if rejection is None else f"it was rejected: {rejection}"

    def name_base(self, node: int) -> dict[str, str]:
        """The fields of a request that say which base a node must have."""
        return _name_base(self._bases[node])

    def is_withdrawn(self, client: str) -> bool:
        """Whether the key with which a client registered is no longer that of its id."""
        return self.keys is not None and client not in self.keys.find_ids(self._keys[client])

    def _invite(self, number: int, node: Node) -> None:
        ids = None if self.keys is None else self.keys.find_ids(node.key)
        if ids == ():
            self._reject(number, node, _NO_KEY)
            return
        began = time.monotonic()
        base = self.bases.find("" if ids is None else name_holder(ids))
        self.export_seconds += time.monotonic() - began
        if number in self._guests:  # else a node that reconnects all the time is owed more and more answers
            self._requests.forget((number, self._guests[number].since))
        self._guests[number] = _Guest(node.since, ids, base)
        self._send(DESCRIBE, number, {}, self.network.join_timeout)  # it may have to load a model first

    def _send(self, kind: str, number: int, fields: Mapping[str, Any], timeout: float) -> None:
        guest = self._guests[number]
        content = {"version": __version__, **_name_base(guest.base), **fields}
        self._requests.send(kind, [Request((number, guest.since), number, content)], timeout)

    def _hear(self, number: int, node: Node, guest: _Guest, answer: Answer) -> None:
        try:
            said = read_description(answer, self._most if guest.ids is None else len(guest.ids), self.hides_rows)
            if isinstance(said, int):
                self._send_piece(number, guest, said)
            else:
                self._register(number, node, guest, said)
        except RefusalError as error:
            # A node that did not answer may do so later; one that answered with an error is asked again when it reconnects.
            self._reject(number, None if isinstance(answer, str) else node, str(error))
        except ValueError as error:
            self._reject(number, node, str(error))

    def _send_piece(self, number: int, guest: _Guest, received: int) -> None:
        if not guest.sent <= received < guest.base.size:
            raise ValueError(
                f"it does not keep the pieces of the base: it has {received} bytes, was sent the first {guest.sent}, and "
                f"the base has {guest.base.size}"
            )
        piece = guest.base.read(received, self.network.chunk_megabytes << 20)
        guest.sent = received + len(piece["data"])
        self._send(BASE, number, piece, self.piece_timeout)

    def _register(self, number: int, node: Node, guest: _Guest, rows: Mapping[str, int | None]) -> None:
        for client, count in rows.items():
            if guest.ids is not None and client not in guest.ids:
                raise ValueError(f"it announces client {client!r}; its key is registered for {', '.join(guest.ids)}")
            if self.nodes.get(client, number) != number:
                raise ValueError(f"it announces client {client!r}, which is at node {self.nodes[client]}")
            if self._known is not None and client not in self._known:
                raise ValueError(
                    f"it announces client {client!r}, which is not one of the {len(self._known)} with which this federation began"
                )
            if self._known is not None and count != self._known[client]:
                raise ValueError(
                    f"it announces {count} rows of client {client!r}; when this federation began, there were "
                    f"{self._known[client]}"
                )
        del self._guests[number]
        self._settled[number], self._bases[number] = node, guest.base
        self.rejected.pop(number, None)
        for client, count in rows.items():
            self.nodes[client] = self._last_nodes[client] = number
            self.num_examples[client], self._keys[client] = count, node.key

    def _reject(self, number: int, node: Node | None, reason: str) -> None:
        """Note why a node can't train. It is asked again when it reconnects, or at once if `node` is None."""
        self._guests.pop(number, None)
        if node is not None:
            self._settled[number] = node
        if self.rejected.get(number) != reason:
            logger.warning("Node %d is rejected: %s", number, reason)
        self.rejected[number] = reason


def _name_base(base: PackedBase) -> dict[str, str]:
    return {"base": base.fingerprint} | ({"copy": base.copy} if base.copy else {})
