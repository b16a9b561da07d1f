# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode during and after an outage of its network."""

import subprocess
import sys

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

import httpx
from flwr.supernode import fleet_http_connection

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
        with pytest.raises(Asked):
            supernode.main()

    def test_what_ends_it_ends_the_process(self):
        """Flower's own server, a thread, would keep it."""
        code = (
            "import threading, time\nimport fedlpp_hf.flower.supernode as node\n"
            "def run():\n    threading.Thread(target=time.sleep, args=(600,)).start()\n    raise OSError('gone')\n"
            "node.flower_supernode = run\nnode.main()"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert run.returncode == 1 and "OSError: gone" in run.stderr
