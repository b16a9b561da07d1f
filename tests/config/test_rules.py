# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of aggregation that do not go together are refused: the message names both, and says why."""

import pytest
import torch
from peft import LoraConfig

from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.config.rules import ROBUST_RULES, RULES, check_products, trainable_keys


def make_config(**options) -> FederatedConfig:
    return FederatedConfig("out", report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"aggregation": "exact", "server_optimizer": "yogi"}, ("aggregation='exact'", "server_optimizer='yogi'")),
        ({"aggregation": "exact", "server_momentum": 0.9}, ("aggregation='exact'", "server_momentum=0.9")),
        ({"aggregation": "exact", "server_learning_rate": 0.5}, ("aggregation='exact'", "server_learning_rate=0.5")),
        (
            {"aggregation": "exact", "robust": "median", "weighting": "uniform"},
            ("aggregation='exact'", "robust='median'", "nobody's"),
        ),
        ({"server_optimizer": "yogi", "server_momentum": 0.9}, ("server_momentum=0.9", "server_optimizer='yogi'")),
        ({"robust": "median"}, ("robust='median'", "weighting='examples'", "an attacker would claim many")),
        ({"robust": "multi_krum", "weighting": "uniform"}, ("robust='multi_krum'", "num_attackers=0")),
        ({"robust": "median", "weighting": "uniform", "num_attackers": -1}, ("robust='median'", "num_attackers=-1")),
        (
            {"robust": "multi_krum", "weighting": "uniform", "num_attackers": 2, "clients_per_round": 6},
            ("robust='multi_krum'", "num_attackers=2", "needs 7 clients", "clients_per_round=6"),
        ),
        (
            {"robust": "trimmed_mean", "weighting": "uniform", "num_attackers": 2, "min_clients": 4},
            ("robust='trimmed_mean'", "num_attackers=2", "needs 5 clients", "min_clients=4"),
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_by_both_names(options, named):
    with pytest.raises(ValueError) as error:
        make_config(**options)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["use_dora", "target_parameters"])
def test_exact_refuses_adapters_that_are_no_products(name):
    config = LoraConfig(r=2, target_modules=["q"], **{name: ["q.weight"] if name == "target_parameters" else True})
    check_products("fedavg", config)
    with pytest.raises(ValueError, match=f"aggregation='exact' does not go with an adapter of {name}="):
        check_products("exact", config)


def test_what_goes_together_passes():
    for rule in RULES:
        make_config(aggregation=rule)
        make_config(aggregation=rule, broadcast="never", num_rounds=1)
    make_config(aggregation="freeze_a", server_optimizer="yogi", server_learning_rate=0.01)
    make_config(aggregation="exact", robust="multi_krum", num_attackers=1, min_clients=5, weighting="uniform")
    for robust in set(ROBUST_RULES) - {"none"}:
        make_config(robust=robust, num_attackers=2, min_clients=7, weighting="uniform")


def test_frozen_factors_are_neither_trained_nor_sent():
    keys = ["q.lora_A.weight", "q.lora_B.weight", "e.lora_embedding_A", "e.lora_embedding_B", "head.weight"]
    tensors = {key: torch.zeros(1) for key in keys}
    assert trainable_keys("freeze_a", tensors) == ["q.lora_B.weight", "e.lora_embedding_B", "head.weight"]
    for rule in ("fedavg", "exact"):
        assert trainable_keys(rule, tensors) == keys
