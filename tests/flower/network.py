# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A Grid whose nodes answer in this process, through the real ClientApp, with faults on the way."""

import time
from types import SimpleNamespace

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.flower.base_copies import CommonBase
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.loading import load_trainer
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.wire.messages import limit_update
from tests.helpers import CLIENTS


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from flwr.app import Context, RecordDict

from fedlpp_hf.flower.client_app import make_client_app
from fedlpp_hf.flower.clients import FlowerClients
from fedlpp_hf.flower.sums import sum_over_flower


class Network:
    """A Grid without processes: its nodes answer through the real ClientApp when they are asked.

    `fault` is called with the client and each message to it; it may return "silent", "offline", "late" (its answer comes
    after its next message, though nobody asks for it), "twice", "away" (for a second its heartbeat
    is nearly overdue), or bytes in place of the update.
    """

    def __init__(self, tmp_path, config, rows, clients=CLIENTS, fault=lambda client, message: None):
        self.app, self.fault = make_client_app(), fault
        self.nodes = dict(enumerate(clients, 1))
        self.settings = {
            node: ClientSettings(
                str(config),
                str(rows / f"{client}.jsonl"),
                client,
                str(tmp_path / f"node-{node}"),
                str(tmp_path / f"cache-{node}"),
                warm=False,
            )
            for node, client in self.nodes.items()
        }
        self.offline, self.replies, self.asked = set(), {}, []
        self.away, self.receivers = {}, {}
        self.late, self.due, self.since, self.updates = {}, [], dict.fromkeys(self.nodes, "the start"), []

    def get_nodes(self):
        online = [node for node in self.nodes if node not in self.offline]
        return [
            SimpleNamespace(
                node_id=node,
                last_activated_at=self.since[node],
                public_key=b"",
                online_until=time.time() + (5 if self.is_away(node) else 40),
            )
            for node in online
        ]

    def is_away(self, node):
        return time.monotonic() < self.away.get(node, 0)

    def push_messages(self, messages):
        (message,) = messages
        node = message.metadata.dst_node_id
        identity = message.metadata.__dict__["_message_id"] = message.object_id
        self.asked.append((message.metadata.message_type, self.nodes[node]))
        self.receivers[identity] = node
        if node in self.late:
            self.due.append(self.late.pop(node))
        fault = self.fault(self.nodes[node], message)
        if fault == "away":
            self.away[node] = time.monotonic() + 1
        if fault == "offline":
            self.offline.add(node)
        if fault not in ("silent", "offline"):
            context = Context(1, node, {"settings": str(self.settings[node].write())}, RecordDict(), {})
            reply = self.app(message, context)
            content = reply.content["fedlpp_hf"]
            self.updates.append(content.get("update"))
            if isinstance(fault, bytes):
                content["update"] = fault
            if fault == "late":
                self.late[node] = reply
            else:
                self.replies[identity] = [reply] * (2 if fault == "twice" else 1)
        return [identity]

    def pull_messages(self, identities):
        # Of a node that is offline by now, Flower would drop the answer.
        assert not any(self.is_away(self.receivers[identity]) for identity in identities)
        found = [reply for identity in identities for reply in self.replies.pop(identity, [])]
        found, self.due = self.due + found, []
        return found


def run_over(network, config, output_dir, llama_base, *flags):
    """The server's side as the ServerApp does it, but for the process."""
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, network_config = load_trainer(config, flags, model=None, train_dataset={})
    base = CommonBase(llama_base, output_dir / "base.packed")
    limit = limit_update(trainer.guard.initial)
    args, secure = trainer.args, trainer.args.secure_aggregation
    clients = FlowerClients(network, network_config, base, limit, round_timeout=args.round_timeout, hides_rows=secure)
    train = sum_over_flower(args, trainer.guard.initial, clients, trainer.count_opening) if secure else clients.train
    num_examples = clients.gather(len(network.nodes))
    trainer.train_remotely(train, num_examples, args.resume_from_checkpoint)
    return read_adapter(output_dir)[0]


def rejected(output_dir, number):
    return RoundStore(output_dir).records()[number]["rejected"]
