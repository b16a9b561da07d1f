# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Our SuperExec beside a SuperNode's real local server."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

import uvicorn
from flwr.common.constant import Status
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere Flower's own runs")


@pytest.fixture
def node():
    """A SuperNode's state, and the port of its local server."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    app = create_app(state_factory=factory, superexec_auth_secret=None)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield factory.state(), server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def test_each_task_has_a_process_and_the_superexec_ends_with_its_supernode(node):
    state, port = node
    command = [sys.executable, "-m", "fedlpp_hf.flower.superexec", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as superexec:

        def run_task():
            task = state.create_task(TaskType.CLIENT_APP, run_id=1, fab_hash="ab")
            superexec.stdin.write(b"\n")
            deadline = time.monotonic() + 100
            while not (found := state.get_tasks(task_ids=[task], statuses=[Status.FINISHED])):
                assert superexec.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            return found[0]

        assert "404" in run_task().status.details  # the ClientApp says so itself: there is no such run
        other = state.create_task(TaskType.SERVER_APP, run_id=1, fab_hash="ab")
        superexec.terminate()  # like all of the group: it stays to the end of the SuperNode
        superexec.send_signal(signal.SIGINT)
        run_task()
        assert state.get_tasks(task_ids=[other])[0].status.status == Status.PENDING
        children = Path(f"/proc/{superexec.pid}/task/{superexec.pid}/children")
        deadline = time.monotonic() + 100
        while children.read_text():  # the dead are still in it until their parent has read how they ended
            superexec.stdin.write(b"\n")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        superexec.stdin.close()
        assert superexec.wait(timeout=100) == 0
