# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The HTTP server of the monitor: two paths, on loopback, for as many callers as it says."""

import contextlib
import http.client
import socket
import time
import urllib.error
import urllib.request

import pytest

from fedlpp_hf.processes import monitor
from fedlpp_hf.processes.monitor import serve_monitor


def fetch(port, path, **headers):
    """(code, body) of a GET."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_and_metrics():
    health = [True, "round"]
    with serve_monitor(0, lambda: tuple(health), lambda: "fedlpp_rounds 3\n") as port:
        assert fetch(port, "/healthz") == (200, "ok: round\n")
        assert fetch(port, "/metrics") == (200, "fedlpp_rounds 3\n")
        health[0] = False
        assert fetch(port, "/healthz") == (503, "not ok: round\n")
        assert fetch(port, "/")[0] == fetch(port, "/metrics/../etc/passwd")[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, "/metrics", body=b"x")
            assert connection.getresponse().status == 501
            connection.close()
    with pytest.raises(OSError):
        fetch(port, "/healthz")


def test_other_names_than_loopback_are_refused():
    """A page whose name was made to mean 127.0.0.1 can't read it through the owner's browser."""
    with serve_monitor(0, lambda: (True, ""), lambda: "secret\n") as port:
        for host, code in (
            ("evil.example", 403),
            (f"evil.example:{port}", 403),
            ("localhost", 200),
            (f"127.0.0.1:{port}", 200),
        ):
            assert fetch(port, "/metrics", Host=host)[0] == code, host


def test_only_loopback_is_listened_on():
    with serve_monitor(0, lambda: (True, ""), str) as port, socket.socket() as outside:
        outside.bind(("127.0.0.2", port))  # free, so nobody listens on all addresses


def test_taken_port_is_an_error():
    with serve_monitor(0, lambda: (True, ""), str) as port:
        refused = pytest.raises(ValueError, match=f"monitor_port={port}: 127.0.0.1:{port} can't be listened on")
        with refused, serve_monitor(port, lambda: (True, ""), str):
            pass


def test_callers_are_bounded_and_silent_ones_give_up(monkeypatch):
    monkeypatch.setattr(monitor._Handler, "timeout", 0.5)
    with serve_monitor(0, lambda: (True, ""), str) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        answered, deadline = 0, time.monotonic() + 30
        while not answered and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # all places are taken
                answered = fetch(port, "/healthz")[0]
            time.sleep(0.05)
        assert answered == 200
        for connection in silent:
            connection.close()


def test_failure_is_a_500(caplog):
    with serve_monitor(0, lambda: (True, ""), lambda: 1 / 0) as port:
        assert fetch(port, "/metrics") == (500, "The monitor failed; see the log.\n")
        assert fetch(port, "/healthz")[0] == 200
    assert "ZeroDivisionError" in caplog.text
