# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A small HTTP server on loopback: `/healthz` for whoever watches the process, `/metrics` for Prometheus. It reads, and changes nothing."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, ClassVar


_HOST = "127.0.0.1"
_MOST_CALLERS = 8  # at a time
_TIMEOUT = 5.0  # seconds in which a caller must send and read
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def serve_monitor(port: int, check_health: Callable[[], tuple[bool, str]], render: Callable[[], str]) -> Iterator[int]:
    """Serve meanwhile, in threads, on 127.0.0.1 alone; yields the port.

    Args:
        port: To listen on; 0 takes a free one.
        check_health: Whether all is well, and a word; 503 otherwise.
        render: The body of `/metrics`.

    Raises:
        ValueError: if the port is taken.
    """

    class Handler(_Handler):
        answers: ClassVar = {
            "/healthz": lambda: _answer_health(*check_health()),
            "/metrics": lambda: (200, _METRICS_TYPE, render()),
        }

    try:
        server = _Server((_HOST, port), Handler)
    except OSError as error:
        raise ValueError(
            f"monitor_port={port}: {_HOST}:{port} can't be listened on ({error}). Choose another port."
        ) from None
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _answer_health(well: bool, word: str) -> tuple[int, str, str]:
    return (200 if well else 503), "text/plain; charset=utf-8", f"{'ok' if well else 'not ok'}: {word}\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a caller that reads slowly keeps nobody waiting
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]):
        super().__init__(address, handler)
        self._places = threading.Semaphore(_MOST_CALLERS)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks DNS for a name that nobody needs
        self.server_name, self.server_port = _HOST, int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("A caller of the monitor went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT
    protocol_version = "HTTP/1.0"  # one request for each connection
    server_version, sys_version = "fedlpp_hf", ""
    answers: ClassVar[dict[str, Callable[[], tuple[int, str, str]]]]

    def do_GET(self) -> None:
        """Answer one of the two paths."""
        answer = self.answers.get(self.path)
        # A page in the owner's browser can make it ask 127.0.0.1 by another name (DNS rebinding), and read the answer.
        if self.headers.get("Host", _HOST).partition(":")[0] not in (_HOST, "localhost"):
            self._send(403, "text/plain; charset=utf-8", "The monitor answers as 127.0.0.1 and localhost alone.\n")
        elif answer is None:
            self._send(404, "text/plain; charset=utf-8", "There are /healthz and /metrics.\n")
        else:
            try:
                self._send(*answer())
            except OSError:
                raise  # the caller has gone
            except Exception:
                logger.exception("The monitor failed")
                self._send(500, "text/plain; charset=utf-8", "The monitor failed; see the log.\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a scrape every few seconds is no news."""

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
