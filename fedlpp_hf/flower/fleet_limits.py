# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Limits of what a client's machine may send to Flower's Fleet API: how much, in whose name, and with which key.

Flower stores what a registered node uploads, whatever its size, and takes the sender of a message as the node writes it.
"""

import base64
import binascii
import json
import os
import sys
from pathlib import Path
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..wire.text import make_printable
from .client_keys import ClientKeys
from .environment import SERVER_FILE


FLEET_PREFIX = "/v1/fleet/"
_SMALL = 1 << 16  # bytes of a request that carries no part of an update
_SPARE = 1 << 16  # bytes around an update: Flower's own, and an error's text
_MAX_OBJECTS = 8  # in a message: itself, its content, and the record in that
_LIMIT_SUFFIX = ".limit"


def write_limit(num_bytes: int) -> None:
    """Tell the SuperLink, which runs in another process, how large an update can be. Until then it takes none."""
    if SERVER_FILE in os.environ:
        Path(os.environ[SERVER_FILE]).with_suffix(_LIMIT_SUFFIX).write_text(str(num_bytes))


class FleetLimits:
    """ASGI middleware in front of the Fleet API.

    Args:
        app: what it stands in front of.
        server_file: what `fedlpp-hf server` wrote: it names the directory of the clients' keys. There is none beside a
            SuperLink that was started by hand.
    """

    def __init__(self, app: Any, server_file: Path | None):
        self.app, self.server_file = app, server_file
        directory = None
        if server_file is not None and server_file.exists():
            directory = json.loads(server_file.read_text(encoding="utf-8")).get("client_keys")
        self.keys = None if directory is None else ClientKeys(directory)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(FLEET_PREFIX):
            await self.app(scope, receive, send)
            return
        if self.keys is not None and not self.keys.find_ids(_read_key(scope)):
            await _refuse(send, 401, "the key is not in the directory of --client_keys", scope)
            return
        request = scope["path"].removeprefix(FLEET_PREFIX)
        body = await read_body(receive, self._find_limit(request))
        if body is None:
            await _refuse(send, 413, "the request is too long", scope)
            return
        if request == "push-messages" and (reason := check_pushed(body)):
            await _refuse(send, 400, reason, scope)
            return
        await self.app(scope, replay_body(body, receive), send)

    def _find_limit(self, request: str) -> int:
        if request != "push-object" or self.server_file is None:
            return _SMALL if request != "push-object" else sys.maxsize
        try:
            return int(self.server_file.with_suffix(_LIMIT_SUFFIX).read_text()) + _SPARE
        except (OSError, ValueError):
            return _SMALL


def check_pushed(body: bytes) -> str | None:
    """Why a node may not push these messages; None if they are one small answer, in its own name."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return "the request can't be read"
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return f"the request has {len(request.messages_list)} messages; expected one"
    metadata = request.messages_list[0].metadata
    if metadata.src_node_id != request.node.node_id:
        return "the message is in another node's name"
    if not metadata.reply_to_message_id:
        return "the message answers no other"
    objects, left = 0, [request.message_object_trees[0]]
    while left:
        objects += 1
        left += left.pop().children
    return None if objects <= _MAX_OBJECTS else f"the message has {objects} objects; expected at most {_MAX_OBJECTS}"


def _read_key(scope: dict[str, Any]) -> bytes:
    """The key that a caller claims to have; Flower verifies its signature afterwards."""
    name = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
    for header, value in scope["headers"]:
        if header == name:
            try:
                return base64.b64decode(value, validate=True)
            except binascii.Error:
                return b""
    return b""


async def read_body(receive: Any, limit: int) -> bytes | None:
    """A request's body, or None if it is longer than `limit`, and then the rest is not read, or its sender is gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def replay_body(body: bytes, receive: Any) -> Any:
    """What takes the place of `receive`, from which [`read_body`] has read all."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Any, status: int, reason: str, scope: dict[str, Any]) -> None:
    caller = make_printable(str((scope.get("client") or ("?",))[0]), 50)
    print(f"Refused {make_printable(scope['path'], 80)} of {caller}: {reason}.", file=sys.stderr, flush=True)
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the request is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
