# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A server of a tiny adapter and three clients, what these answer, and an owner that chooses."""

import dataclasses
import json

import torch
from peft import LoraConfig

from fedlpp_hf import FederatedConfig, FederatedServer
from fedlpp_hf.server.ledger import LEDGER_FILE
from fedlpp_hf.wire.messages import ClientUpdate


KEY_A, KEY_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
CLIENTS = {"a": 10, "b": 20, "c": 30}
# Client-level differential privacy. Everyone in each round under replacing one: an analysis that takes a millisecond.
PRIVATE = {
    "noise_multiplier": 4.0,
    "target_delta": 1e-2,
    "clip_update_norm": 1.0,
    "weighting": "uniform",
    "aggregation": "freeze_a",
}


def make_server(output_dir, num_examples=CLIENTS, **options):
    adapter = {KEY_A: torch.arange(8.0).view(2, 4) / 8, KEY_B: torch.zeros(4, 2)}
    args = FederatedConfig(str(output_dir), use_cpu=True, **{"num_rounds": 2, "adapter_bits": 32, **options})
    return FederatedServer(args, adapter, LoraConfig(r=2, target_modules=["q"]), num_examples, "fingerprint")


def answer(task, value=1.0, **changes):
    delta = {KEY_A: torch.full((2, 4), value), KEY_B: torch.full((4, 2), value)}
    update = ClientUpdate(
        task.federation_id,
        task.round,
        task.client_id,
        task.base_fingerprint,
        CLIENTS.get(task.client_id, 1),
        delta,
        {"loss": 1.0, "steps": 1},
    )
    return dataclasses.replace(update, **changes)


def answer_all(tasks):
    return [answer(task) for task in tasks]


def read_record(server, number):
    return json.loads((server.store.round_dir(number) / "round.json").read_text())


def read_ledger(server):
    return json.loads((server.store.root / LEDGER_FILE).read_text())


class Owner:
    """Measures (θ_B − target)² + (λ − weight)², and knows a variate of ones."""

    def __init__(self, target=0.0, weight=0.0, selects=True):
        self.target, self.weight, self.selects = target, weight, selects

    def evaluate(self, adapter, residual, base_weight):
        return {"eval_loss": 0.5, "weight": base_weight}

    def measure_selection(self, adapter, residual, base_weights):
        distance = float((adapter[KEY_B].mean() - self.target) ** 2)
        return [distance + (weight - self.weight) ** 2 for weight in base_weights]

    def begin_variate(self, start, number, seeds):
        pass

    def estimate_variate(self, start, number, seeds):
        return {key: torch.ones_like(value) for key, value in start.items()}, 0.5
