# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Requests to a SuperLink that survive an outage, or a machine that is too busy to answer in time.

Flower takes every failed TLS handshake for a wrong certificate and gives up.
"""

from typing import Any

import httpx


def make_patient_(invoker: Any) -> Any:
    """Make one of Flower's invokers of requests retry after an outage, too; returns it."""
    gives_up = invoker.should_giveup
    invoker.should_giveup = lambda error: not _is_outage(error) and gives_up(error)
    return invoker


def _is_outage(error: Exception) -> bool:
    # An interrupted handshake reports `[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol`.
    return isinstance(error, httpx.TimeoutException) or "EOF occurred" in str(error)
