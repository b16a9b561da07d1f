# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode that waits for its network to come back.

Flower takes every TLS handshake that fails for a wrong certificate, and gives up: also over one that got no answer because
the network was away for a minute. What it leaves is a process without its main thread, which takes no messages and does not
end, because its local server runs on.

    python -m fedlpp_hf.flower.supernode [arguments of flower-supernode]
"""

import os
import sys
import traceback
from typing import Any

import httpx
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode

from .version import check_flower


def make_patient_invoker() -> Any:
    """Flower's invoker of requests, which tries again after an outage, too."""
    invoker: Any = make_simple_http_retry_invoker()
    gives_up = invoker.should_giveup
    invoker.should_giveup = lambda error: not _is_outage(error) and gives_up(error)
    return invoker


def _is_outage(error: Exception) -> bool:
    # The text of a handshake that was cut is `[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol`.
    return isinstance(error, httpx.TimeoutException) or "EOF occurred" in str(error)


def main() -> None:
    """Run `flower-supernode`; whatever ends it ends the process."""
    check_flower()
    fleet_http_connection.make_simple_http_retry_invoker = make_patient_invoker
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
