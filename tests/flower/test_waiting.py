# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How long a SuperNode waits for messages, and for its ClientApp."""

import threading
import time

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory

from fedlpp_hf.flower.waiting import FLOWER_PAUSE, Inquirer, wait_for_answer


class Server:
    """A clock, and a server that takes `seconds` to answer and has its messages at the given times."""

    def __init__(self, seconds, *messages):
        self.now, self.seconds, self.messages, self.asked = 0.0, seconds, list(messages), []

    def sleep(self, seconds):
        self.now += seconds

    def receive(self):
        self.asked.append(self.now)
        self.now += self.seconds
        return self.messages.pop(0) if self.messages and self.messages[0] <= self.now else None

    def make_inquirer(self):
        return Inquirer(lambda: self.now, self.sleep)


class TestInquirer:
    @pytest.mark.parametrize("due", [0.0, 0.5, 4.0, 20.0])
    def test_message_is_late_by_a_tenth_of_the_wait(self, due):
        server = Server(0.01, due)
        assert server.make_inquirer().ask(server.receive) == due
        assert server.now - due < max(0.12, 0.11 * server.now)

    def test_long_waits_are_left_to_flower(self):
        server = Server(0.01, 100.0, 100.3)
        inquirer = server.make_inquirer()
        assert inquirer.ask(server.receive) is None
        assert 25 < server.now < 31 and len(server.asked) < 50
        while (message := inquirer.ask(server.receive)) is None:
            assert server.asked[-1] == server.now - 0.01  # it asks once, and then Flower pauses
            server.sleep(FLOWER_PAUSE)
        assert message == 100.0 and server.now < 103.1
        assert inquirer.ask(server.receive) == 100.3  # after a message it begins anew

    def test_slow_server_is_asked_less_often(self):
        server = Server(0.2)
        assert server.make_inquirer().ask(server.receive) is None
        assert all(later - earlier > 2.1 for earlier, later in zip(server.asked, server.asked[1:], strict=False))
        overloaded = Server(0.4)
        assert overloaded.make_inquirer().ask(overloaded.receive) is None
        assert overloaded.asked == [0.0]


class TestAnswer:
    def test_is_there_when_no_client_app_is_at_work(self):
        state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
        wait_for_answer(state)  # no task at all
        task = state.create_task(TaskType.CLIENT_APP, run_id=1, fab_hash="ab")
        threading.Timer(0.2, state.finish_task, (task, SubStatus.FAILED, "")).start()
        began = time.monotonic()
        wait_for_answer(state)
        assert 0.15 < time.monotonic() - began < 5

    def test_long_ones_are_left_to_flower(self):
        state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
        state.create_task(TaskType.CLIENT_APP, run_id=1, fab_hash="ab")
        began = time.monotonic()
        wait_for_answer(state, patience=0.2)
        assert 0.2 <= time.monotonic() - began < 5
