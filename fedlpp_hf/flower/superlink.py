# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's SuperLink with a gate: other machines reach only the Fleet API.

Flower serves three APIs on one port. The Fleet API asks for node keys. The Control API (`flwr run`, register a node) and
the Runtime API (fetch the ServerApp's task) ask for nothing, so anyone who reaches the port could run code next to the
owner's full model. The gate keeps these two for this machine.

    python -m fedlpp_hf.flower.superlink [arguments of flower-superlink]
"""

import ipaddress
from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware

from .environment import check_flower


FLEET_PREFIX = "/v1/fleet/"


class FleetOnly:
    """ASGI middleware that answers other machines with 403 on every path outside the Fleet API."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FLEET_PREFIX) or _is_local(scope.get("client")):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def _is_local(client: Any) -> bool:
    return client is not None and ipaddress.ip_address(client[0]).is_loopback


def main() -> None:
    """Run `flower-superlink` with the gate as its outermost layer."""
    check_flower()
    extensions.get_middleware = lambda: (Middleware(FleetOnly),)
    flower_superlink()


if __name__ == "__main__":
    main()
