# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperNode, made to survive a network outage.

Flower treats every failed TLS handshake as a wrong certificate and gives up, even if the network was only down for a
minute. Its main thread then ends, but its local server keeps the process alive without receiving any messages.

    python -m fedlpp_hf.flower.supernode [arguments of flower-supernode]
"""

import os
import sys
import traceback
from typing import Any

from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode

from .environment import check_flower
from .patience import make_patient_


def make_patient_invoker() -> Any:
    """Flower's invoker of requests, which also retries after an outage."""
    return make_patient_(make_simple_http_retry_invoker())


def main() -> None:
    """Run `flower-supernode`, and end the process with it."""
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
