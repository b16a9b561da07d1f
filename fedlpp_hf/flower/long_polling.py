# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Nodes that hear of a message at once: the SuperLink keeps the answer that there is none until there is one.

Flower's SuperNodes ask every three seconds, which is most of a short round. To ask more often would keep a SuperLink with many nodes
busy with questions.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from .fleet_limits import read_body, replay_body


HOLD_SECONDS = 3.0  # so no node asks more often than Flower's do
_QUESTION, _NEWS = "/v1/fleet/pull-messages", "/v1/runtime/push-messages"
_QUICK_SECONDS = 1.0

T = TypeVar("T")


class LongPolling:
    """ASGI middleware of a SuperLink that holds a node's question for messages while there are none for it.

    It holds only an answer without messages. A message that came meanwhile is not in it: the node has to ask again. A question
    whose sender is gone would take the message with it, as Flower gives each out once.

    Args:
        app: what it stands in front of.
        seconds: to hold a question for.
    """

    def __init__(self, app: Any, seconds: float = HOLD_SECONDS):
        self.app, self.seconds = app, seconds
        self._held: dict[int, set[asyncio.Event]] = {}  # by node

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in (_QUESTION, _NEWS):
            await self.app(scope, receive, send)
        elif (body := await read_body(receive, sys.maxsize)) is not None:
            answer = self._answer_question if scope["path"] == _QUESTION else self._pass_news
            await answer(body, scope, replay_body(body, receive), send)

    async def _answer_question(self, body: bytes, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            node = PullMessagesRequest.FromString(body).node.node_id
        except DecodeError:
            await self.app(scope, receive, send)
            return
        answer: list[dict[str, Any]] = []

        async def keep(message: dict[str, Any]) -> None:
            answer.append(message)

        news = asyncio.Event()
        self._held.setdefault(node, set()).add(news)  # before the app looks, else news could come between
        try:
            await self.app(scope, receive, keep)
            if _is_without_messages(answer):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), self.seconds)
        finally:
            self._held[node].discard(news)
            if not self._held[node]:
                del self._held[node]
        for message in answer:
            await send(message)

    async def _pass_news(self, body: bytes, scope: dict[str, Any], receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
        with contextlib.suppress(DecodeError):
            for message in PushAppMessagesRequest.FromString(body).messages_list:
                for news in self._held.get(message.metadata.dst_node_id, ()):
                    news.set()


def ask_again(receive: Callable[[], T | None]) -> T | None:
    """Ask a SuperLink with [`LongPolling`] until there is a message. Where questions are not held, it returns None.

    Args:
        receive: asks once, and returns None where there is no message.
    """
    quick = 0
    while quick < 2:  # one quick answer is that of a question which news has ended
        began = time.monotonic()
        if (message := receive()) is not None:
            return message
        quick = quick + 1 if time.monotonic() - began < _QUICK_SECONDS else 0
    return None


def _is_without_messages(answer: list[dict[str, Any]]) -> bool:
    try:
        body = b"".join(part.get("body", b"") for part in answer[1:])
        return bool(answer) and answer[0]["status"] == 200 and not PullMessagesResponse.FromString(body).messages_list
    except DecodeError:
        return False
