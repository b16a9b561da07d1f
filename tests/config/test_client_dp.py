# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Client-level differential privacy: what it lacks, and what breaks its analysis, is refused with the reason."""

import pytest

from fedlpp_hf.config import client_dp
from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.config.options import options_beside, reference_options


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
PRIVATE = {"target_epsilon": 3.0, "target_delta": 1e-3, "clip_update_norm": 1.0, "weighting": "uniform"}


def make_config(**options) -> FederatedConfig:
    return FederatedConfig("out", report_to=[], use_cpu=True, **{**PRIVATE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon=0.0; expected a positive number"),
        ({"target_epsilon": float("nan")}, "target_epsilon=nan; expected a positive number"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0; expected a positive number"),
        ({"noise_multiplier": 0.01}, "noise_multiplier=0.01; expected 0.1 or more. With less, ε is in the hundreds"),
        ({"target_delta": 1.0}, "target_delta=1.0; expected a number between 0 and 1"),
        ({"target_delta": None}, "needs target_delta. Set it well below 1 / number of clients"),
        ({"clip_quantile": 0.0}, "clip_quantile=0.0; expected a number between 0 and 1"),
        ({"client_sampling": "uniform"}, "client_sampling='uniform'; expected one of fixed, poisson"),
        ({"clip_update_norm": None}, "needs clip_update_norm: .*modules_to_save included"),
        ({"weighting": "examples"}, "weighting='examples': a client with many examples .* Set weighting='uniform'"),
        ({"robust": "median"}, "robust='median': it looks at single updates.* Set robust='none'"),
        ({"robust": "multi_krum", "num_attackers": 1, "min_clients": 5}, "robust='multi_krum': it looks at single"),
        ({"over_sample": 0.5, "clients_per_round": 4}, "over_sample=0.5: who is in the sum would depend on how fast"),
        ({"colluding_clients": -1}, "colluding_clients=-1; expected a number from 0"),
        ({"colluding_clients": 2}, "colluding_clients=2: without secure_aggregation the server adds the noise"),
        ({"min_clients": 2}, "min_clients=2: that a round stopped would tell how many"),
        ({"aggregation": "exact"}, "aggregation='exact': the clip bounds the factors, not the mean of their products"),
        ({"broadcast": "never", "num_rounds": 3}, "broadcast='never' in num_rounds=3: .* Set num_rounds=1"),
    ],
    ids=str,
)
def test_what_breaks_the_analysis_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client_sampling": "poisson"}, "client_sampling='poisson': the server knows who takes part"),
        ({"clip_quantile": 0.5}, "clip_quantile=0.5: how many updates are shorter than the clip would need noise"),
        ({"max_update_norm": 2.0}, "max_update_norm=2.0: it bounds the mean, too, which has noise"),
        ({"audit": True, "audit_data": True}, "audit_data=True: its canary clients go through noise that the server"),
        ({"over_sample": 0.5, "clients_per_round": 4}, "over_sample=0.5: who is in the sum"),
        ({"target_delta": None}, "under secure_aggregation needs target_delta"),
        ({"noise_multiplier": 2000.0}, "noise_multiplier=2000.0; expected up to 1024"),
    ],
    ids=str,
)
def test_what_breaks_noise_in_shares_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(secure_aggregation=True, **options)


def test_noise_in_shares_goes_with_what_only_the_server_would_hide():
    assert make_config(secure_aggregation=True, min_clients=3, clients_per_round=5, colluding_clients=2).adds_noise


@pytest.mark.parametrize(
    "options",
    [{"target_delta": 0.1}, {"client_sampling": "poisson"}, {"clip_quantile": 0.5}, {"colluding_clients": 2}],
    ids=str,
)
def test_parts_of_it_do_nothing_alone_and_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* belongs to client-level differential privacy, which is off"):
        FederatedConfig("out", report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_multiplier": 1.0, "target_epsilon": None},
        {"noise_multiplier": 1.0},
        {"aggregation": "freeze_a", "client_sampling": "poisson", "clients_per_round": 3, "clip_quantile": 0.5},
        {"broadcast": "never", "num_rounds": 1},
        {"server_optimizer": "yogi", "server_learning_rate": 0.01, "max_update_norm": 5.0, "update_bits": 4},
    ],
    ids=str,
)
def test_what_goes_together_passes(options):
    assert make_config(**options).adds_noise


def test_it_is_off_by_default_in_other_processes_and_in_the_reference():
    assert not FederatedConfig("out", report_to=[], use_cpu=True).adds_noise
    for values in (options_beside(FederatedConfig), reference_options(FederatedConfig)):
        assert values["target_epsilon"] is values["noise_multiplier"] is None


def test_missing_accountant_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(client_dp, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs dp-accounting. Install it: pip install 'fedlpp_hf\[privacy\] @ git"):
        make_config()
    FederatedConfig("out", report_to=[], use_cpu=True)  # nobody else needs it
