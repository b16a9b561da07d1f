# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Nodes hear of a message at once, and no message goes to a question that nobody asks any more."""

import asyncio
import time

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest

from fedlpp_hf.flower import long_polling
from fedlpp_hf.flower.long_polling import LongPolling, ask_again


PULL, PUSH = "/v1/fleet/pull-messages", "/v1/runtime/push-messages"


class SuperLink:
    """Flower's app behind the layer: gives each message out once. `seconds` is how long questions are held."""

    def __init__(self, seconds=60.0, status=200):
        self.layer, self.status = LongPolling(self, seconds), status
        self.box, self.asked, self.during = {}, [], None

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        answer = b""
        if scope["path"] == PUSH:
            for message in PushAppMessagesRequest.FromString(body).messages_list:
                self.box.setdefault(message.metadata.dst_node_id, []).append(message)
        elif scope["path"] == PULL and body != b"\xff":
            node = PullMessagesRequest.FromString(body).node.node_id
            self.asked.append(node)
            answer = PullMessagesResponse(messages_list=self.box.pop(node, [])).SerializeToString()
            if self.during is not None:
                during, self.during = self.during, None
                await during()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": answer[:3], "more_body": True})
        await send({"type": "http.response.body", "body": answer[3:]})

    async def request(self, path, body):
        sent, told = [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return told.pop()

        async def send(message):
            sent.append(message)

        await self.layer({"type": "http", "path": path}, receive, send)
        assert sent[0]["status"] == self.status
        return b"".join(message["body"] for message in sent[1:])

    async def pull(self, node):
        body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
        return len(PullMessagesResponse.FromString(await self.request(PULL, body)).messages_list)

    async def push(self, *nodes):
        messages = [Message(metadata=Metadata(dst_node_id=node)) for node in nodes]
        await self.request(PUSH, PushAppMessagesRequest(messages_list=messages).SerializeToString())


async def finishes(task):
    """Whether a task ends without anything else happening."""
    done, _ = await asyncio.wait([task], timeout=0.1)
    return bool(done)


def test_question_is_held_until_there_is_a_message_for_its_node():
    async def run():
        link = SuperLink()
        first, second = asyncio.create_task(link.pull(1)), asyncio.create_task(link.pull(2**63 + 2))
        assert not await finishes(first) and not await finishes(second)
        await link.push(2**63 + 2)
        assert not await finishes(first)
        assert await second == 0 and await link.pull(2**63 + 2) == 1  # it has to ask again
        await link.push(3, 1)
        assert await first == 0 and await link.pull(1) == 1 and await link.pull(3) == 1
        assert not link.layer._held

    asyncio.run(run())


def test_message_is_not_lost_to_a_sender_that_is_gone():
    async def run():
        link = SuperLink()
        gone = asyncio.create_task(link.pull(1))
        assert not await finishes(gone)
        gone.cancel()
        await asyncio.wait([gone])
        held = asyncio.create_task(link.pull(1))  # its sender may be gone as well, and nobody knows yet
        assert not await finishes(held)
        await link.push(1)
        await held
        assert await link.pull(1) == 1

    asyncio.run(run())


def test_news_while_flower_looks_ends_the_question():
    async def run():
        link = SuperLink()
        link.during = lambda: link.push(1)
        assert await link.pull(1) == 0
        assert await link.pull(1) == 1

    asyncio.run(asyncio.wait_for(run(), 30))


def test_question_is_not_held_for_long():
    async def run():
        link = SuperLink(seconds=0.2)
        began = time.monotonic()
        assert await link.pull(1) == 0
        assert 0.15 < time.monotonic() - began < 10

    asyncio.run(run())


@pytest.mark.parametrize("status, path, body", [(401, PULL, b""), (200, PULL, b"\xff"), (200, "/v1/fleet/x", b"")])
def test_other_answers_are_not_held(status, path, body):
    asyncio.run(asyncio.wait_for(SuperLink(status=status).request(path, body), 30))


class TestAskAgain:
    @pytest.mark.parametrize(
        "answers, expected",
        [
            ([(0.0, None), (0.0, None), (0.0, "late")], None),  # questions are not held
            ([(0.0, "at once")], "at once"),
            ([(0.0, None), (0.0, "after news")], "after news"),
            ([(3.0, None), (0.4, None), (3.0, None), (0.4, None), (0.0, "after news")], "after news"),
            ([(0.4, None), (3.0, None), (3.0, None), (0.4, None), (0.0, None)], None),  # news of what can't be had
        ],
    )
    def test_ends_with_a_message_or_two_quick_answers(self, answers, expected, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(long_polling.time, "monotonic", lambda: now[0])
        left = list(answers)

        def receive():
            seconds, message = left.pop(0)
            now[0] += seconds
            return message

        assert ask_again(receive) == expected
        assert left == ([(0.0, "late")] if expected is None and answers[-1][1] else [])
