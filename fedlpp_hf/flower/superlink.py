# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperLink with a gate: other machines, and other users of this one, reach only the Fleet API.

Flower serves three APIs on one port. The Fleet API asks for node keys. The Control API (`flwr run`, register a node) and
the Runtime API (fetch the ServerApp's task) ask for nothing, so anyone who reaches the port could run code next to the
owner's full model. The gate keeps these two for this user's processes on this machine (`neighbours.py`). What clients send to
the Fleet API has limits, too (`fleet_limits.py`).

    python -m fedlpp_hf.flower.superlink [--trust-local-users] [arguments of flower-superlink]
"""

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware

from .addresses import is_wildcard
from .environment import SERVER_FILE, check_flower, ignore_proxies
from .fleet_limits import FLEET_PREFIX, FleetLimits
from .long_polling import LongPolling
from .neighbours import TRUST_FLAG, choose_trust, is_own, refuse


class FleetOnly:
    """ASGI middleware that answers 403 to other machines, and other users of this one, on every path outside the Fleet API.

    Args:
        app: what it stands in front of.
        trust: take all users of this machine for this one.
        one_interface: the server listens on one interface and not on loopback, so that this machine reaches it from the
            interface's own address. No other machine can be answered there.
    """

    def __init__(self, app: Any, one_interface: bool = False, trust: bool = False):
        self.app, self.one_interface, self.trust = app, one_interface, trust

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FLEET_PREFIX) or self._is_local(scope):
            await self.app(scope, receive, send)
        else:
            await refuse(send)

    def _is_local(self, scope: dict[str, Any]) -> bool:
        client, server = scope.get("client"), scope.get("server")
        if client is None:
            return False
        own = self.one_interface and server is not None and client[0] == server[0]
        return (own or ipaddress.ip_address(client[0]).is_loopback) and (self.trust or is_own(scope))


def main() -> None:
    """Run `flower-superlink` with the gate, the limits and what holds questions as its outermost layers."""
    check_flower()
    trust = TRUST_FLAG in sys.argv
    sys.argv = [word for word in sys.argv if word != TRUST_FLAG]
    ignore_proxies()
    trust = choose_trust(trust)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="0.0.0.0")
    host = parser.parse_known_args()[0].host
    server_file = Path(os.environ[SERVER_FILE]) if SERVER_FILE in os.environ else None
    extensions.get_middleware = lambda: (
        Middleware(FleetOnly, one_interface=not is_wildcard(host), trust=trust),
        Middleware(FleetLimits, server_file=server_file),
        Middleware(LongPolling),
    )
    flower_superlink()


if __name__ == "__main__":
    main()
