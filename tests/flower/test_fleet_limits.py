# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server lets a client's machine send to Flower's Fleet API."""

import asyncio
import base64
import json
import shutil

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedlpp_hf.flower.certificates import make_node_key
from fedlpp_hf.flower.client_keys import read_public_key
from fedlpp_hf.flower.environment import SERVER_FILE
from fedlpp_hf.flower.fleet_limits import FleetLimits, check_pushed, write_limit
from tests.flower.hostile import BENT


def make_answer():
    """What Flower's own SuperNode pushes."""
    return PushMessagesRequest(
        node=Node(node_id=7),
        messages_list=[Message(metadata=Metadata(src_node_id=7, dst_node_id=1, reply_to_message_id="m"))],
        message_object_trees=[ObjectTree(object_id="a", children=[ObjectTree(object_id="b")])],
    )


@pytest.fixture
def server_file(tmp_path, monkeypatch):
    path = tmp_path / "server.json"
    path.write_text("{}")
    monkeypatch.setenv(SERVER_FILE, str(path))
    return path


def ask(limits, path, *parts, key=b""):
    """The status of the answer to a request, and the body that the app behind the limits has seen."""
    seen, sent = [], []

    async def app(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body")
        seen.append(body)
        await send({"type": "http.response.start", "status": 200})

    left = list(parts or [b""])

    async def receive():
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    limits.app = app
    headers = [(FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), base64.b64encode(key))]
    scope = {"type": "http", "path": path, "client": ("192.0.2.1", 1), "headers": headers}
    asyncio.run(limits(scope, receive, send))
    return sent[0]["status"], b"".join(seen), left


def test_an_update_has_a_largest_size(server_file):
    limits = FleetLimits(None, server_file)
    assert ask(limits, "/v1/fleet/push-object", b"x" * 100_000)[0] == 413  # there is no adapter yet
    write_limit(1_000_000)
    body = b"x" * 500_000
    assert ask(limits, "/v1/fleet/push-object", body, body) == (200, body + body, [])
    status, seen, left = ask(limits, "/v1/fleet/push-object", body, body, body, body, body)
    assert (status, seen) == (413, b"") and len(left) == 2  # the rest was not even read
    assert ask(limits, "/v1/fleet/pull-messages", b"x" * 100_000)[0] == 413
    assert ask(limits, "/v1/runtime/push-object", body, body, body)[0] == 200  # the server's own


def test_a_message_is_one_small_answer_in_ones_own_name(server_file):
    limits = FleetLimits(None, server_file)
    body = make_answer().SerializeToString()
    assert check_pushed(body) is None
    assert ask(limits, "/v1/fleet/push-messages", body)[:2] == (200, body)
    for change in BENT.values():
        bent = make_answer()
        change(bent)
        assert ask(limits, "/v1/fleet/push-messages", bent.SerializeToString())[:2] == (400, b"")
    two = make_answer()
    two.messages_list.add()
    for wrong in (two.SerializeToString(), b"", b"\xff" * 50):
        assert ask(limits, "/v1/fleet/push-messages", wrong)[:2] == (400, b"")


def test_key_that_is_withdrawn_is_refused_from_the_next_request_on(server_file, tmp_path):
    (tmp_path / "keys").mkdir()
    server_file.write_text(json.dumps({"client_keys": str(tmp_path / "keys")}))
    make_node_key(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "node.pub", tmp_path / "keys" / "a.pub")
    key = read_public_key(tmp_path / "keys" / "a.pub")
    limits = FleetLimits(None, server_file)
    assert ask(limits, "/v1/fleet/pull-messages", key=key)[0] == 200
    assert ask(limits, "/v1/fleet/pull-messages", key=key[:-2])[0] == 401
    (tmp_path / "keys" / "a.pub").unlink()
    assert ask(limits, "/v1/fleet/pull-messages", key=key)[0] == 401
    assert ask(limits, "/v1/runtime/get-nodes")[0] == 200
