# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode, made to survive a network outage, for its own user alone, for the installed app alone, and quicker.

Flower treats every failed TLS handshake as a wrong certificate and gives up, even if the network was only down for a
minute. Its main thread then ends, but its local server keeps the process alive without receiving any messages. That server
listens on loopback and asks nobody who they are. And what it runs is what the SuperLink sends. It asks for messages every three
seconds (`long_polling.py`), starts an interpreter for each (`superexec.py`), and looks for the answer every half second.

    python -m fedlpp_hf.flower.supernode [--trust-local-users] [arguments of flower-supernode]
"""

import argparse
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.common.constant import Status
from flwr.supercore.address import resolve_bind_address
from flwr.supercore.constant import SUPERNODE_UVICORN_DEFAULT_PORT, UVICORN_DEFAULT_HOST
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode import main as supernode_app
from flwr.supernode.cli import flower_supernode

from .environment import check_flower, ignore_proxies
from .installed_app import ForeignAppError, check_app, check_run
from .long_polling import ask_again
from .neighbours import TRUST_FLAG, OwnUserOnly, choose_trust
from .patience import make_patient_


logger = logging.getLogger(__name__)

_ANSWER_PAUSE = 0.05
_ANSWER_SECONDS = 10.0  # then Flower's half a second is short


def make_patient_invoker() -> Any:
    """Flower's invoker of requests, which also retries after an outage."""
    return make_patient_(make_simple_http_retry_invoker())


def take_messages(announce: Callable[[], object]) -> None:
    """Answer every message of a run with another app than the installed one by an error, and do not run it. Take in messages,
    and their answers, sooner than Flower does.

    Args:
        announce: called when there is a task for a ClientApp.

    Raises:
        RuntimeError: if this Flower has no place for the check.
    """
    node = start_client_internal
    pull, error = getattr(node, "_pull_and_store_message", None), getattr(node, "FAB_VERIFICATION_ERROR", None)
    if pull is None or error is None:
        raise RuntimeError("This version of Flower takes in apps in another way, so they can't be checked.")

    def pull_checked(**given: Any) -> int | None:
        received: list[Any] = []
        digests: dict[int, str] = {}

        def receive() -> Any:
            received.append(ask_again(given["receive"]))
            return received[-1]

        def get_run(number: int) -> Any:
            run = given["get_run"](number)
            check_run(run)
            digests[number] = run.fab_hash
            return run

        def get_app(digest: str, number: int) -> Any:
            app = given["get_fab"](digest, number)
            check_app(app.content, app.hash_str, digests[number])
            return app

        try:
            run_id = pull(**given | {"receive": receive, "get_run": get_run, "get_fab": get_app})
        except ForeignAppError as reason:
            logger.error("The server sent an app that is not the installed one: %s. It does not run here.", reason)
            message = received[-1][0]
            node._insert_message(Message(error, reply_to=message), given["state"], given["object_store"])
            return message.metadata.run_id
        if run_id is not None:
            announce()
            wait_for_answer(given["state"])
        return run_id

    node._pull_and_store_message = pull_checked  # type: ignore[assignment]


def wait_for_answer(state: Any, patience: float = _ANSWER_SECONDS) -> None:
    """Wait until no ClientApp is at work any more, which has then left its whole answer; at most for `patience` seconds.

    Args:
        state: the SuperNode's.
        patience: after which Flower's own loop looks for the answer.
    """
    deadline = time.monotonic() + patience
    at_work = [Status.PENDING, Status.STARTING, Status.RUNNING]
    while time.monotonic() < deadline and state.get_tasks(statuses=at_work, limit=1):
        time.sleep(_ANSWER_PAUSE)


def guard_local_server(trust: bool) -> None:
    """Put [`OwnUserOnly`] in front of the SuperNode's local server."""
    create = supernode_app.create_app

    def create_guarded(*arguments: Any, **options: Any) -> Any:
        app = create(*arguments, **options)
        app.add_middleware(OwnUserOnly, trust=trust)  # the last one that is added is the outermost
        return app

    supernode_app.create_app = create_guarded


def start_superexec() -> Callable[[], object]:
    """Start our SuperExec instead of Flower's, and end this process with it. Returns what announces a task to it.

    Flower starts its own where the arguments ask for another way to run ClientApps, and on macOS, where forks are unsafe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=UVICORN_DEFAULT_HOST)
    parser.add_argument("--port", default=SUPERNODE_UVICORN_DEFAULT_PORT)
    parser.add_argument("--isolation")
    parser.add_argument("--ssl-certfile", "--appio-ssl-certfile")
    arguments = parser.parse_known_args()[0]
    if arguments.isolation or arguments.ssl_certfile or not sys.platform.startswith("linux"):
        os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1")  # else a second, in every message
        return lambda: None
    sys.argv += ["--isolation", "process"]
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = resolve_bind_address(f"{host}:{arguments.port}")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlpp_hf.flower.superexec", address], stdin=subprocess.PIPE, bufsize=0
    )
    announcements = process.stdin
    assert announcements is not None

    def end_with_it() -> None:
        print(
            f"The SuperExec ended with code {process.wait()}, and the SuperNode with it.", file=sys.stderr, flush=True
        )
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    return lambda: announcements.write(b"\n")


def main() -> None:
    """Run `flower-supernode`, and end the process with it."""
    check_flower()
    trust = TRUST_FLAG in sys.argv
    sys.argv = [word for word in sys.argv if word != TRUST_FLAG]
    ignore_proxies()
    guard_local_server(choose_trust(trust))
    take_messages(start_superexec())
    fleet_http_connection.make_simple_http_retry_invoker = make_patient_invoker
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
    # It returns after some errors, which it has logged.
    sys.stdout.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
