# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A hostile client with a registered key: what it answers, as a library, and a node that says it over Flower's real protocol.

python -m tests.flower.hostile ADDRESS CA_CERTIFICATE NODE_KEY CLIENT_ID SEED LOG
"""

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fedlpp_hf.wire.messages import ClientTask, ClientUpdate


_DOOR = 60_000  # bytes that the server takes of any client, whatever the adapter
ESCAPES = "x\nClients: a forged line\x1b[2J\u202e"

# What a node may answer to `query.describe` and `query.base`. Each breaks a rule.
DESCRIPTIONS = {
    "nothing": {},
    "another field": {"x": 1},
    "two fields": {"clients": '{"evil": 6}', "received": 0},
    "an error that is a number": {"error": 5},
    "a list": {"clients": "[1]"},
    "a number": {"clients": "5"},
    "no JSON": {"clients": "{"},
    "no text": {"clients": [1, 2]},
    "bytes": {"clients": b'{"evil": 6}'},
    "deep": {"clients": "[" * 100_000},
    "a key twice": {"clients": '{"evil": 6, "evil": 7}'},
    "nobody": {"clients": "{}"},
    "100,000 ids": {"clients": json.dumps({f"s{number}": 5 for number in range(100_000)})},
    "two ids": {"clients": '{"evil": 6, "eviler": 6}'},
    "rows: text": {"clients": '{"evil": "many"}'},
    "rows: null": {"clients": '{"evil": null}'},
    "rows: true": {"clients": '{"evil": true}'},
    "rows: a list": {"clients": '{"evil": [1]}'},
    "rows: a float": {"clients": '{"evil": 6.0}'},
    "rows: none": {"clients": '{"evil": 0}'},
    "rows: -1": {"clients": '{"evil": -1}'},
    "rows: 10**18": {"clients": '{"evil": 1000000000000000000}'},
    "rows: NaN": {"clients": '{"evil": NaN}'},
    "rows: infinite": {"clients": '{"evil": 1e999}'},
    "rows: 5,000 digits": {"clients": '{"evil": ' + "9" * 5000 + "}"},
    "id: half a surrogate": {"clients": '{"\\ud800": 6}'},
    "id: empty": {"clients": '{"": 6}'},
    "id: a space": {"clients": '{" evil": 6}'},
    "id: long": {"clients": json.dumps({"e" * 101: 6})},
    "id: line breaks and escape codes": {"clients": json.dumps({ESCAPES: 6})},
    "received: text": {"received": "abc"},
    "received: true": {"received": True},
    "received: a float": {"received": 1.0},
    "received: infinite": {"received": float("inf")},
    "received: NaN": {"received": float("nan")},
    "received: a list": {"received": [1]},
    "received: -5": {"received": -5},
    "received: 2**63 - 1": {"received": 2**63 - 1},
    "error: 2 MB of lines and escape codes": {"error": ESCAPES * 100_000},
}


def make_update(task: ClientTask, adapter: dict[str, torch.Tensor], **changes) -> bytes:
    """An update that would be taken, but for `changes`."""
    fields = {
        "federation_id": task.federation_id,
        "round": task.round,
        "client_id": task.client_id,
        "base_fingerprint": task.base_fingerprint,
        "num_examples": 1,
        "delta": {key: torch.zeros_like(value) for key, value in adapter.items()},
        "metrics": {"loss": 1.0, "steps": 1},
    }
    return ClientUpdate(**fields | changes).to_bytes()


Forge = Callable[[ClientTask, dict[str, torch.Tensor]], object]
GOOD = {"loss": 1.0, "steps": 1}

# What a node may answer to `train`: the content of its record.
UPDATES: dict[str, Forge] = {
    "nothing": lambda task, adapter: {},
    "no bytes": lambda task, adapter: {"update": "text"},
    "an error as well": lambda task, adapter: {"update": make_update(task, adapter), "error": "x"},
    "not an update": lambda task, adapter: {"update": b"not an update"},
    "another client's": lambda task, adapter: {"update": make_update(task, adapter, client_id="site-0")},
    "another round's": lambda task, adapter: {"update": make_update(task, adapter, round=task.round + 1)},
    "another federation's": lambda task, adapter: {"update": make_update(task, adapter, federation_id=ESCAPES)},
    "NaN": lambda task, adapter: {
        "update": make_update(task, adapter, delta={key: value * float("nan") for key, value in adapter.items()})
    },
    "more rows than announced": lambda task, adapter: {"update": make_update(task, adapter, num_examples=2**62)},
    "no rows": lambda task, adapter: {"update": make_update(task, adapter, num_examples=0)},
    "no steps": lambda task, adapter: {"update": make_update(task, adapter, metrics={"loss": 1.0, "steps": 0})},
    "2**62 steps": lambda task, adapter: {"update": make_update(task, adapter, metrics={"loss": 1.0, "steps": 2**62})},
    "no metrics": lambda task, adapter: {"update": make_update(task, adapter, metrics={})},
    "a metric with a name of 2 MB": lambda task, adapter: {
        "update": make_update(task, adapter, metrics=GOOD | {"x" * 2_000_000: 1})
    },
    "a metric with escape codes": lambda task, adapter: {
        "update": make_update(task, adapter, metrics=GOOD | {ESCAPES: 1})
    },
    "5,000 metrics": lambda task, adapter: {
        "update": make_update(task, adapter, metrics=GOOD | {f"m{number}": 1 for number in range(5_000)})
    },
    "federation_id of 2 MB": lambda task, adapter: {
        "update": make_update(task, adapter, federation_id="x" * 2_000_000)
    },
    "three keys of 1 MB": lambda task, adapter: {
        "update": make_update(task, adapter, delta={letter * 1_000_000: torch.zeros(1) for letter in "abc"})
    },
    "2,000 empty tensors": lambda task, adapter: {
        "update": make_update(task, adapter, delta={f"{number}": torch.zeros(0) for number in range(2_000)})
    },
    "another shape": lambda task, adapter: {
        "update": make_update(task, adapter, delta={key: torch.zeros(3) for key in adapter})
    },
    "ten times the adapter": lambda task, adapter: {
        "update": make_update(
            task, adapter, delta={key: torch.zeros(10 * value.numel()) for key, value in adapter.items()}
        )
    },
    "error: 2 MB of lines and escape codes": lambda task, adapter: {"error": ESCAPES * 100_000},
}


def damage(data: bytes, source: random.Random) -> bytes:
    """A message with a few bytes changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data) + 1)
        kind = source.randrange(4)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            del data[place : place + source.randrange(1, 200)]
        elif kind == 2:
            data[place:place] = data[place : place + source.randrange(1, 200)]
        else:
            data[place:place] = source.randbytes(source.randrange(1, 20))
        if not data:
            break
    return bytes(data)


class HostileNode:
    """A node that speaks Flower's protocol itself, without a ClientApp, so that it can break it.

    Args:
        address: of the server.
        certificate: path of its `ca.crt`.
        key: path of the private key that the server knows.
    """

    def __init__(self, address: str, certificate: str, key: str):
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private = load_ssh_private_key(Path(key).read_bytes(), None)
        self.public_key = public_key_to_bytes(private.public_key())
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, private.public_key()),
        ]
        self.client = FleetHttpClient.from_server_address(address, False, certificate, interceptors=interceptors)
        self.client.__enter__()
        self.node = None

    def call(self, method: str, request):
        """Send a request to Flower, again if the machine is too busy to take it."""
        import httpx

        for _ in range(30):
            try:
                return getattr(self.client, method)(request)
            except httpx.TransportError as error:
                problem = error
                time.sleep(1)
        raise problem

    def connect(self) -> None:
        """Connect, or reconnect: the server then asks for a description again."""
        import httpx
        from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
        from flwr.proto.node_pb2 import Node

        if self.node is not None:
            with contextlib.suppress(httpx.HTTPStatusError):  # on a busy machine it may be held for offline already
                self.call("DeactivateNode", DeactivateNodeRequest(node_id=self.node.node_id))
        answer = self.call("ActivateNode", ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30))
        self.node = Node(node_id=answer.node_id)

    def beat(self) -> None:
        """Stay online."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        self.call("SendNodeHeartbeat", SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30))

    def messages(self) -> Iterator:
        """The server's messages, until it is gone."""
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        last = time.monotonic()
        while True:
            if time.monotonic() - last > 15:
                last = time.monotonic()
                self.beat()
            pulled = self.call("PullMessages", PullMessagesRequest(node=self.node))
            if not pulled.messages_list:
                time.sleep(0.2)
                continue
            metadata, contents = pulled.messages_list[0].metadata, {}
            for part in iterate_object_tree(pulled.message_object_trees[0]):
                while True:
                    request = PullObjectRequest(node=self.node, run_id=metadata.run_id, object_id=part.object_id)
                    found = self.call("PullObject", request)
                    if found.object_available:
                        break
                    time.sleep(0.05)
                contents[part.object_id] = found.object_content
            message = inflate_object_from_contents(metadata.message_id, contents)
            message.metadata.__dict__["_message_id"] = metadata.message_id
            self.call(
                "ConfirmMessageReceived",
                ConfirmMessageReceivedRequest(
                    node=self.node, run_id=metadata.run_id, message_object_id=metadata.message_id
                ),
            )
            yield message

    def answer(self, message, content: dict, upload: bool = True, change: Callable | None = None) -> None:
        """Answer a message.

        Args:
            message: the server's.
            content: of the answer's record.
            upload: whether the announced answer is sent, too.
            change: called with the request to Flower before it is sent.
        """
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.message_pb2 import PushObjectRequest
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        reply = Message(RecordDict({"fedlpp_hf": ConfigRecord(content)}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.1],
        )
        if change is not None:
            change(request)
        pushed = self.call("PushMessages", request)
        for identity in pushed.objects_to_push if upload else ():
            self.call(
                "PushObject",
                PushObjectRequest(
                    node=self.node,
                    run_id=message.metadata.run_id,
                    object_id=identity,
                    object_content=objects[identity].deflate(),
                    session_id=pushed.session_id,
                ),
            )


def _in_anothers_name(request) -> None:
    request.messages_list[0].metadata.src_node_id += 1


def _as_the_server(request) -> None:
    metadata = request.messages_list[0].metadata
    metadata.src_node_id, metadata.reply_to_message_id = 1, ""


def _with_many_objects(request) -> None:
    for number in range(500):
        request.message_object_trees[0].children.add(object_id=f"{number:064x}")


BENT = {"in another's name": _in_anothers_name, "as the server": _as_the_server, "500 objects": _with_many_objects}


def main() -> None:
    """Break COUNT rules of the description, one by one, then join and break those of the updates, one a round, again and again."""
    import httpx
    from flwr.supercore.task_identity import TaskIdentity

    address, certificate, key, client_id, seed, count, log = sys.argv[1:]
    for name in ("run_id", "task_id", "node_id"):
        setattr(TaskIdentity, name, 1)  # what Flower's own processes learn, and messages ask for
    source = random.Random(int(seed))
    descriptions = source.sample(sorted(DESCRIPTIONS), min(int(count), len(DESCRIPTIONS)))
    updates, damaged = source.sample(sorted(UPDATES), len(UPDATES)), 0.3
    node = HostileNode(address, certificate, key)

    def note(text: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            print(text, file=file)

    def refused(name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except httpx.HTTPStatusError as error:
            note(f"refused with {error.response.status_code}: {name}")
        else:
            note(f"TAKEN: {name}")

    node.connect()
    bent = False
    try:
        for message in node.messages():
            kind = message.metadata.message_type
            if kind != "train" and not bent:
                bent = True
                for name, change in BENT.items():
                    refused(name, lambda message=message, change=change: node.answer(message, {}, change=change))
                refused("8 MB", lambda message=message: node.answer(message, {"error": "x" * (8 << 20)}))
                node.connect()
            elif kind != "train" and descriptions:
                name = descriptions.pop()
                with contextlib.suppress(httpx.HTTPStatusError):  # the longest do not even reach the server
                    node.answer(message, DESCRIPTIONS[name])
                note(f"described: {name}")
                time.sleep(0.5)
                node.connect()
            elif kind != "train":
                if descriptions is not None:
                    descriptions = None
                    node.answer(message, {"received": 0}, upload=False)  # announced, and never sent
                    note("announced, and never sent")
                    node.connect()
                elif "data" not in message.content["fedlpp_hf"]:
                    node.answer(message, {"received": 0})
                else:
                    node.answer(message, {"clients": json.dumps({client_id: 6})})
                    note("joined")
            else:
                task = ClientTask.from_bytes(message.content["fedlpp_hf"]["task"])
                if not updates:
                    updates, damaged = source.sample(sorted(UPDATES), len(UPDATES)), 0.8
                name = updates.pop()
                content = UPDATES[name](task, task.proxy_tensors() or {"lora_A": torch.zeros(4, 8)})
                if "update" in content and isinstance(content["update"], bytes) and source.random() < damaged:
                    content["update"] = damage(content["update"], source)
                note(f"round {task.round}: {name}")
                # Longer ones are refused at the door, as was seen, and would cost the test a `round_timeout` each.
                node.answer(message, {key: value[:_DOOR] for key, value in content.items()})
    except httpx.HTTPError as error:
        note(f"the end: {type(error).__name__}")


if __name__ == "__main__":
    main()
