# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode, made to survive a network outage, for its own user alone, and for the installed app alone.

Flower treats every failed TLS handshake as a wrong certificate and gives up, even if the network was only down for a
minute. Its main thread then ends, but its local server keeps the process alive without receiving any messages. That server
listens on loopback and asks nobody who they are. And what it runs is what the SuperLink sends.

    python -m fedlpp_hf.flower.supernode [--trust-local-users] [arguments of flower-supernode]
"""

import logging
import os
import sys
import traceback
from typing import Any

from flwr.app import Message
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode import main as supernode_app
from flwr.supernode.cli import flower_supernode

from .environment import check_flower, ignore_proxies
from .installed_app import ForeignAppError, check_app, check_run
from .neighbours import TRUST_FLAG, OwnUserOnly, choose_trust
from .patience import make_patient_


logger = logging.getLogger(__name__)


def make_patient_invoker() -> Any:
    """Flower's invoker of requests, which also retries after an outage."""
    return make_patient_(make_simple_http_retry_invoker())


def check_apps() -> None:
    """Make this process answer every message of a run with another app than the installed one by an error, and not run it.

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
            received.append(given["receive"]())
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
            return pull(**given | {"receive": receive, "get_run": get_run, "get_fab": get_app})
        except ForeignAppError as reason:
            logger.error("The server sent an app that is not the installed one: %s. It does not run here.", reason)
            message = received[-1][0]
            node._insert_message(Message(error, reply_to=message), given["state"], given["object_store"])
            return message.metadata.run_id

    node._pull_and_store_message = pull_checked  # type: ignore[assignment]


def guard_local_server(trust: bool) -> None:
    """Put [`OwnUserOnly`] in front of the SuperNode's local server."""
    create = supernode_app.create_app

    def create_guarded(*arguments: Any, **options: Any) -> Any:
        app = create(*arguments, **options)
        app.add_middleware(OwnUserOnly, trust=trust)  # the last one that is added is the outermost
        return app

    supernode_app.create_app = create_guarded


def main() -> None:
    """Run `flower-supernode`, and end the process with it."""
    check_flower()
    trust = TRUST_FLAG in sys.argv
    sys.argv = [word for word in sys.argv if word != TRUST_FLAG]
    ignore_proxies()
    guard_local_server(choose_trust(trust))
    check_apps()
    fleet_http_connection.make_simple_http_retry_invoker = make_patient_invoker
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
