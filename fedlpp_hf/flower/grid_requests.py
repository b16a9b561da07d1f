# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Requests to nodes over Flower's Grid, and their answers.

Messages carry bytes in a ConfigRecord, because an ArrayRecord rejects bfloat16.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, RecordDict

from ..wire.text import make_printable


if TYPE_CHECKING:
    from flwr.serverapp import Grid

RECORD = "fedlpp_hf"  # the name of the record in a message
DESCRIBE, BASE, TRAIN, SUM = "query.describe", "query.base", "train", "query.sum"  # kinds of messages
POLL_SECONDS = 0.1  # between two looks for answers, at first; Flower's own `send_and_receive` looks every 3 s
_SLOW_POLL_SECONDS = 0.5  # at last: each look costs the SuperLink some 10 ms of the processor for each client
_SOON_SECONDS = 10.0  # a node sends a heartbeat every 30 s, which counts for 60 s
_MOST_UPLOADS = 8  # of a node that keep a thread waiting: one that was announced and never sent does so for an hour
_PATIENCE_SECONDS = 1.0  # for an answer that is still on its way, before others are asked for theirs

# The content of a node's answer, or why there is none.
Answer = Mapping[str, Any] | str


@dataclass(frozen=True, slots=True)
class Node:
    """A connected node: the time at which it connected, and the public key (PEM) by which the SuperLink knows it."""

    since: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """A message to a node; the answer comes back with `key`."""

    key: Any
    node: int
    content: Mapping[str, Any]


@dataclass(slots=True)
class _Waiting:
    key: Any
    node: int
    timeout: float
    deadline: float
    offline_since: float | None = None


class GridRequests:
    """Sends requests to nodes and collects their answers, without waiting for any node.

    Args:
        grid: Flower's.
        lost_timeout: seconds without a sign of life after which a node's answer is no longer expected.
    """

    def __init__(self, grid: "Grid", lost_timeout: float):
        self.grid, self.lost_timeout = grid, lost_timeout
        self._waiting: dict[str, _Waiting] = {}  # by the message's id
        self._failed: list[tuple[Any, Answer]] = []
        self._stuck: list[_Sweep] = []
        self._nodes: dict[str, int] = {}  # by the message's id, of those that are expected or keep a thread waiting
        self._pause = POLL_SECONDS
        self._since = time.monotonic()  # when something was sent last, or came

    @property
    def unanswered(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._waiting or self._failed)

    def find_nodes(self) -> dict[int, Node]:
        """The nodes that are online, and will be for some seconds without another heartbeat."""
        soon = time.time() + _SOON_SECONDS  # the SuperLink runs on this machine, so it has the same clock
        return {
            node.node_id: Node(node.last_activated_at, node.public_key)
            for node in self.grid.get_nodes()
            if node.online_until > soon
        }

    def send(self, kind: str, requests: Iterable[Request], timeout: float) -> None:
        """Send requests.

        Args:
            kind: one of `DESCRIBE`, `BASE`, `TRAIN` and `SUM`.
            requests: read one by one; an iterator keeps only one content in memory.
            timeout: seconds that each node has to answer.
        """
        self._since = time.monotonic()
        deadline = self._since + timeout
        for request in requests:
            content = RecordDict({RECORD: ConfigRecord(dict(request.content))})
            sent = list(self.grid.push_messages([Message(content, request.node, kind, ttl=timeout)]))
            if sent and sent[0]:
                self._nodes[sent[0]] = request.node
                self._waiting[sent[0]] = _Waiting(request.key, request.node, timeout, deadline)
            else:
                self._failed.append((request.key, "it could not be reached"))

    def receive(self, present: Mapping[int, Node] | None = None) -> list[tuple[Any, Answer]]:
        """The keys and answers that have arrived, and those that are no longer expected.

        Args:
            present: the nodes, where they were looked for just now.
        """
        present = self.find_nodes() if present is None else present
        answers, self._failed = self._failed, []
        uploading = {sweep.current for sweep in self._stuck}
        self._nodes = {i: node for i, node in self._nodes.items() if i in self._waiting or i in uploading}
        slow = Counter(self._nodes[identity] for identity in uploading if identity in self._nodes)
        # If it is asked for the answer of an offline node, Flower invents an error and drops the answer for good.
        online = [
            identity
            for identity, request in self._waiting.items()
            if request.node in present and identity not in uploading and slow[request.node] < _MOST_UPLOADS
        ]
        for identity, answer in self._sweep(online):
            if (request := self._waiting.pop(identity, None)) is not None:  # else it came twice, or too late
                self._since = time.monotonic()
                answers.append((request.key, answer))
        now = time.monotonic()
        for identity, request in list(self._waiting.items()):
            if request.node in present:
                request.offline_since = None
            elif request.offline_since is None:
                request.offline_since = now
            offline = 0.0 if request.offline_since is None else now - request.offline_since
            if now > request.deadline:
                reason = f"it did not answer within {request.timeout:.0f} s"
            elif offline > self.lost_timeout:
                reason = f"it showed no sign of life for {self.lost_timeout:.0f} s"
            else:
                continue
            del self._waiting[identity]
            answers.append((request.key, reason))
        return answers

    def pause(self) -> None:
        """Wait before the next [`receive`]; longer where there are many nodes to ask, or none has answered for long."""
        waited = time.monotonic() - self._since
        time.sleep(max(self._pause, min(waited / 20, _SLOW_POLL_SECONDS)))

    def forget(self, key: Any = None) -> None:
        """Expect no answer any more: to the requests with `key`, or to any."""
        self._waiting = {i: request for i, request in self._waiting.items() if key is not None and request.key != key}
        self._failed = [(failed, reason) for failed, reason in self._failed if key is not None and failed != key]

    def _sweep(self, identities: Sequence[str]) -> list[tuple[str, Answer]]:
        """Ask for answers one by one, each by itself: what is wrong with one concerns no other.

        Flower waits for an answer that was announced and is not uploaded, for hours if need be. That is left to the thread
        that asked, and another one goes on.
        """
        began = time.monotonic()
        left = deque(identities)
        while left:
            sweep = _Sweep(self.grid, left)
            sweep.start()
            while sweep.is_alive() and not sweep.is_stuck():
                sweep.join(0.02)
            if sweep.is_alive():
                left = sweep.hand_over()
            self._stuck.append(sweep)
        self._pause = max(POLL_SECONDS, time.monotonic() - began)
        found = [pair for sweep in self._stuck for pair in sweep.take()]
        self._stuck = [sweep for sweep in self._stuck if sweep.is_alive()]
        if any(isinstance(answer, str) for _, answer in found):
            self.find_nodes()  # it fails if it is not the answer that was wrong, but the connection to the SuperLink
        return found


@dataclass(eq=False)
class _Sweep:
    """A thread that asks for the answers to the messages in `left`, and stops at the first that keeps it waiting."""

    grid: "Grid"
    left: deque[str]
    current: str | None = None
    _since: float = 0.0
    _found: deque[tuple[str, Answer]] = field(default_factory=deque)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._since = time.monotonic()
        # A daemon: the process does not wait for an answer that nobody expects any more.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        assert self._thread is not None
        self._thread.join(seconds)

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def is_stuck(self) -> bool:
        return time.monotonic() - self._since > _PATIENCE_SECONDS

    def hand_over(self) -> deque[str]:
        """The messages that were not asked for yet; the thread goes on with none of them."""
        left, self.left = self.left, deque()
        return left

    def take(self) -> list[tuple[str, Answer]]:
        """What was found since the last call."""
        return [self._found.popleft() for _ in range(len(self._found))]

    def _run(self) -> None:
        while self.left:
            try:
                identity = self.left.popleft()
            except IndexError:
                return
            self.current, self._since = identity, time.monotonic()
            try:
                messages = [
                    message
                    for message in self.grid.pull_messages([identity])
                    if message.metadata.reply_to_message_id == identity
                ]
                self._found.extend((identity, _read_answer(message)) for message in messages)
            except Exception as error:  # whatever Flower raises on what a node made up
                self._found.append((identity, f"its answer can't be read ({make_printable(repr(error), 200)})"))
        self.current = None


def _read_answer(message: Message) -> Answer:
    if message.has_error():
        return f"Flower reports: {make_printable(str(message.error.reason))} (code {message.error.code})"
    record = message.content.config_records.get(RECORD)
    return "its answer does not come from fedlpp_hf" if record is None else record
