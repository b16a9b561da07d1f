# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What does not go with secure aggregation is refused: the message names both options, says why, and what to do."""

import pytest

from fedlpp_hf.config.federated import FederatedConfig


def make_config(**changes) -> FederatedConfig:
    secure = {"secure_aggregation": True, "weighting": "uniform", "clip_update_norm": 1.0}
    return FederatedConfig("out", report_to=[], use_cpu=True, **secure | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weighting": "examples"}, ("weighting='examples'", "can't weigh what it can't see", "weighting='uniform'")),
        ({"robust": "median"}, ("robust='median'", "look at single updates", "robust='none'")),
        ({"update_density": 0.1}, ("update_density=0.1", "positions", "update_density=1.0")),
        ({"aggregation": "exact"}, ("aggregation='exact'", "products of single updates", "'freeze_a'")),
        ({"clip_update_norm": None}, ("needs a bound on updates", "Set clip_update_norm, or max_update_norm")),
        ({"max_update_norm": 0.5}, ("clip_update_norm=1.0 with max_update_norm=0.5", "Lower clip_update_norm")),
        ({"num_clients": 2}, ("with 2 clients in a round", "needs 3 or more")),
        ({"clients_per_round": 1}, ("with 1 clients in a round",)),
        ({"secure_threshold": 0.4}, ("secure_threshold=0.4; expected a share from 0.5", "take them apart")),
        ({"secure_threshold": 1.0}, ("secure_threshold=1.0",)),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes, named):
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update_bits": 4, "adapter_bits": 2, "aggregation": "freeze_a", "secure_threshold": 0.5},
        {"clip_update_norm": None, "max_update_norm": 2.0},
        {"broadcast": "never", "num_rounds": 1, "server_optimizer": "yogi", "server_learning_rate": 0.01},
        {"clients_per_round": 3, "over_sample": 0.5, "min_clients": 3},
    ],
    ids=str,
)
def test_what_goes_together_passes(changes):
    assert make_config(**changes).secure_aggregation


@pytest.mark.parametrize(("missing", "named"), [("Crypto", "pycryptodome"), ("cryptography", "cryptography")])
def test_missing_packages_are_named(missing, named, monkeypatch):
    monkeypatch.setattr("fedlpp_hf.config.secure_sums.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ValueError, match=rf"needs {named}, which is not installed: pip install 'fedlpp_hf\[privacy\]"):
        make_config()
    assert not make_config(secure_aggregation=False).secure_aggregation
