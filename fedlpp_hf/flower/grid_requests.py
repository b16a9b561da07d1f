# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Requests to nodes over Flower's Grid, and their answers.

Messages carry bytes in a ConfigRecord, because an ArrayRecord rejects bfloat16.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, RecordDict


if TYPE_CHECKING:
    from flwr.serverapp import Grid

RECORD = "fedlpp_hf"  # the name of the record in a message
DESCRIBE, BASE, TRAIN = "query.describe", "query.base", "train"  # kinds of messages
POLL_SECONDS = 0.2  # Flower's own `send_and_receive` polls every 3 s
_SOON_SECONDS = 10.0  # a node sends a heartbeat every 30 s, which counts for 60 s

# The content of a node's answer, or why there is none.
Answer = Mapping[str, Any] | str


@dataclass(frozen=True, slots=True)
class Request:
    """A message to a node; the answer comes back with `key`."""

    key: Any
    node: int
    content: Mapping[str, Any]


class GridRequests:
    """Sends requests to nodes and waits for their answers.

    Args:
        grid: Flower's.
        lost_timeout: seconds without a sign of life after which a node's answer is no longer expected.
    """

    def __init__(self, grid: "Grid", lost_timeout: float):
        self.grid, self.lost_timeout = grid, lost_timeout

    def find_nodes(self) -> dict[int, str]:
        """The nodes that are online, and will be for some seconds without another heartbeat, with the time they connected."""
        soon = time.time() + _SOON_SECONDS  # the SuperLink runs on this machine, so it has the same clock
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes() if node.online_until > soon}

    def ask(self, kind: str, requests: Iterable[Request], timeout: float) -> Iterator[tuple[Any, Answer]]:
        """Send the requests and yield the key and answer of each, in the order of arrival.

        Args:
            kind: one of `DESCRIBE`, `BASE` and `TRAIN`.
            requests: read one by one; an iterator keeps only one content in memory.
            timeout: seconds to wait for all answers.
        """
        waiting: dict[str, tuple[Any, int]] = {}  # message id → key, node
        deadline = time.monotonic() + timeout
        for request in requests:
            content = RecordDict({RECORD: ConfigRecord(dict(request.content))})
            (identity,) = self.grid.push_messages([Message(content, request.node, kind, ttl=timeout)])
            if identity:
                waiting[identity] = request.key, request.node
            else:
                yield request.key, "it could not be reached"
        offline_since: dict[str, float] = {}
        while waiting:
            present = self.find_nodes()
            # If it is asked for the answer of an offline node, Flower invents an error and drops the answer for good.
            online = [identity for identity, (_, node) in waiting.items() if node in present]
            for message in self.grid.pull_messages(online) if online else ():
                if message.metadata.reply_to_message_id in waiting:  # else the answer came twice
                    key, _ = waiting.pop(message.metadata.reply_to_message_id)
                    yield key, _read_answer(message)
            now = time.monotonic()
            for identity, (key, node) in list(waiting.items()):
                if node in present:
                    offline_since.pop(identity, None)
                offline = 0.0 if node in present else now - offline_since.setdefault(identity, now)
                if now > deadline:
                    reason = f"it did not answer within {timeout:.0f} s"
                elif offline > self.lost_timeout:
                    reason = f"it showed no sign of life for {self.lost_timeout:.0f} s"
                else:
                    continue
                del waiting[identity]
                yield key, reason
            if waiting:
                time.sleep(POLL_SECONDS)


def _read_answer(message: Message) -> Answer:
    if message.has_error():
        return f"Flower reports: {message.error.reason} (code {message.error.code})"
    record = message.content.config_records.get(RECORD)
    return "its answer does not come from fedlpp_hf" if record is None else record
