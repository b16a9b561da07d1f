# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole runs of the server with attackers among the clients: as many as each robust rule withstands, and none more."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig

from fedlpp_hf import FederatedConfig, FederatedServer
from fedlpp_hf.wire.encoding import restore_tensors
from fedlpp_hf.wire.messages import ClientUpdate


KEY_A, KEY_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
CLIENTS, ROUNDS, SIZE, RANK = 11, 10, 12, 2

Delta = dict[str, torch.Tensor]


class Problem:
    """Clients fit the same low-rank change of a linear map, each on other inputs: LoRA, small enough to be quick."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.start = {KEY_A: torch.randn(RANK, SIZE, generator=g) / SIZE**0.5, KEY_B: torch.zeros(SIZE, RANK)}
        left, right = torch.randn(SIZE, RANK, generator=g), torch.randn(RANK, SIZE, generator=g)
        self.change = left @ right / SIZE**0.5
        self.inputs = {
            f"client-{k:02}": torch.randn(64, SIZE, generator=g) * (0.8 + 0.4 * torch.rand(SIZE, generator=g))
            for k in range(CLIENTS)
        }

    def loss(self, adapter: Delta) -> float:
        return float((adapter[KEY_B] @ adapter[KEY_A] - self.change).square().mean())

    def train(self, client: str, proxy: Delta) -> Delta:
        inputs = self.inputs[client]
        adapter = {key: tensor.clone().requires_grad_() for key, tensor in proxy.items()}
        optimizer = torch.optim.Adam(adapter.values(), lr=0.02)
        for _ in range(10):
            optimizer.zero_grad()
            (inputs @ (adapter[KEY_B] @ adapter[KEY_A] - self.change).T).square().mean().backward()
            optimizer.step()
        return {key: tensor.detach() - proxy[key] for key, tensor in adapter.items()}


def flip(honest: list[Delta], seed: int) -> Delta:
    return {key: -10 * torch.stack([delta[key] for delta in honest]).mean(0) for key in honest[0]}


def scale(honest: list[Delta], seed: int) -> Delta:
    g = torch.Generator().manual_seed(seed)
    return {key: 100 * torch.randn(tensor.shape, generator=g) for key, tensor in honest[0].items()}


def hide(honest: list[Delta], seed: int) -> Delta:
    """A little is enough (arXiv 1902.06156): one standard deviation off in every coordinate, as half of them may."""
    rows = {key: torch.stack([delta[key] for delta in honest]) for key in honest[0]}
    return {key: stack.mean(0) - stack.std(0) for key, stack in rows.items()}


def run_federation(output_dir, attackers: int, attack: Callable | None, **options) -> float:
    """The loss of the server's adapter at the end; the first `attackers` clients know what the others answer."""
    problem = Problem()
    args = FederatedConfig(
        str(output_dir),
        use_cpu=True,
        num_rounds=ROUNDS,
        num_clients=CLIENTS,
        min_clients=CLIENTS,  # a counting rule refuses to run with fewer than it needs
        adapter_bits=8,
        weighting="uniform",
        **options,
    )
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q"])
    server = FederatedServer(args, problem.start, config, dict.fromkeys(problem.inputs, 1), "fingerprint")

    def train_clients(tasks):
        honest = [problem.train(task.client_id, restore_tensors(task.proxy)) for task in tasks[attackers:]]
        bad = [attack(honest, task.seed) for task in tasks[:attackers]] if attack else []
        return [
            ClientUpdate(
                task.federation_id,
                task.round,
                task.client_id,
                task.base_fingerprint,
                1,
                delta,
                {"loss": 0.0, "steps": 10},
            )
            for task, delta in zip(tasks, bad + honest, strict=True)
        ]

    try:
        server.run(train_clients)
    except RuntimeError as error:
        if "NaN or infinite" not in str(error):
            raise
        return math.inf  # so far off that no client's training is finite
    return problem.loss(server.adapter)


@pytest.fixture(scope="module")
def honest_loss(tmp_path_factory) -> float:
    return run_federation(tmp_path_factory.mktemp("honest"), 0, None)


@pytest.fixture(scope="module")
def attacked_mean(tmp_path_factory) -> Callable[[Callable, int], float]:
    @functools.cache
    def run(attack, attackers):
        return run_federation(tmp_path_factory.mktemp("mean"), attackers, attack)

    return run


@pytest.mark.parametrize("attack", [flip, scale, hide])
@pytest.mark.parametrize(("robust", "attackers"), [("median", 5), ("trimmed_mean", 5), ("multi_krum", 4)])
def test_the_run_learns_in_spite_of_attackers(tmp_path, honest_loss, attacked_mean, robust, attackers, attack):
    start = Problem().loss(Problem().start)
    loss = run_federation(tmp_path, attackers, attack, robust=robust, num_attackers=attackers)
    assert honest_loss < 0.02 * start
    assert loss < 0.1 * start
    if attack is not hide:  # which alone does no harm to an average
        assert attacked_mean(attack, attackers) > start
