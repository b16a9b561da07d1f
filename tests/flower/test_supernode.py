# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode during and after an outage of its network."""

import subprocess
import sys
import threading
import time

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

import httpx
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import fleet_http_connection
from flwr.supernode.nodestate import NodeStateFactory

from fedlpp_hf.flower import supernode
from fedlpp_hf.flower.supernode import make_patient_invoker


class TestSupernode:
    @pytest.mark.parametrize(
        "error, gives_up",
        [
            (httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"), False),
            (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"), False),
            (httpx.ConnectError("[Errno 111] Connection refused"), False),
            (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), True),
        ],
    )
    def test_what_it_gives_up_over(self, error, gives_up):
        assert make_patient_invoker().should_giveup(error) == gives_up

    def test_connections_are_made_with_its_patience(self, monkeypatch):
        class Asked(BaseException):
            pass

        def make_invoker():
            raise Asked

        def connect():
            with fleet_http_connection.http_request_response("127.0.0.1:1", True):
                pass

        theirs = fleet_http_connection.make_simple_http_retry_invoker
        monkeypatch.setattr(fleet_http_connection, "make_simple_http_retry_invoker", theirs)  # to be put back
        monkeypatch.setattr(supernode, "make_patient_invoker", make_invoker)
        monkeypatch.setattr(supernode, "flower_supernode", connect)
        monkeypatch.setattr(supernode, "start_superexec", lambda: None)
        with pytest.raises(Asked):
            supernode.main()

    def test_announces_each_task(self, monkeypatch):
        node = supernode.start_client_internal
        monkeypatch.setattr(node, "_pull_and_store_message", lambda receive, **_: 7 if receive() else None)
        announced = []
        supernode.take_messages(lambda: announced.append("a task"))
        state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
        given = {"get_run": None, "get_fab": None, "state": state, "object_store": None}
        assert node._pull_and_store_message(receive=lambda: "a message", **given) == 7
        assert announced == ["a task"]
        assert node._pull_and_store_message(receive=lambda: None, **given) is None
        assert announced == ["a task"]

    def test_waits_for_its_client_app(self):
        state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
        task = state.create_task(TaskType.CLIENT_APP, run_id=1, fab_hash="ab")
        began = time.monotonic()
        supernode.wait_for_answer(state, patience=0.2)  # the rest is left to Flower
        assert 0.2 <= time.monotonic() - began < 5
        threading.Timer(0.2, state.finish_task, (task, SubStatus.FAILED, "")).start()
        supernode.wait_for_answer(state, patience=60)
        assert 0.4 < time.monotonic() - began < 10

    @pytest.mark.parametrize(
        "options", [["--isolation", "process"], ["--isolation", "subprocess"], ["--ssl-certfile", "server.crt"]]
    )
    def test_other_ways_to_run_client_apps_are_left_to_flower(self, options, monkeypatch):
        monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.5")
        monkeypatch.setattr(sys, "argv", ["supernode", "--port", "1", *options])
        assert supernode.start_superexec()() is None
        assert sys.argv == ["supernode", "--port", "1", *options]

    @pytest.mark.parametrize("end", ["raise OSError('gone')", "print('gone')"])
    def test_what_ends_it_ends_the_process(self, end):
        """Flower's own server, a thread, would keep it."""
        code = (
            "import threading, time\nimport fedlpp_hf.flower.supernode as node\n"
            "def run():\n    threading.Thread(target=time.sleep, args=(600,)).start()\n"
            f"    {end}\nnode.flower_supernode = run\nnode.main()"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert run.returncode == 1 and "gone" in run.stdout + run.stderr

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere Flower's own runs")
    def test_ends_with_its_superexec(self):
        code = (
            "import os, signal, time\nimport fedlpp_hf.flower.supernode as node\n"
            "def run():\n    child = open(f'/proc/self/task/{os.getpid()}/children').read().split()[0]\n"
            "    os.kill(int(child), signal.SIGKILL)\n    time.sleep(600)\n"
            "node.flower_supernode = run\nnode.main()"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert run.returncode == 1 and "The SuperExec ended with code -9" in run.stderr
