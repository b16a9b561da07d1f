# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which metric is shown, what is better, and a record as numbers."""

import pytest

from fedlpp_hf.report.metrics import flatten_record, is_better, main_metric, mean_client_loss

from .records import make_record


def test_main_metric_is_the_first_that_is_not_the_loss():
    assert main_metric({"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4}) == "eval_accuracy"
    assert main_metric({"eval_loss": 1.0}) == "eval_loss"
    assert main_metric({}) is None


def test_losses_are_better_when_small():
    assert is_better("eval_loss", 1.0, 2.0) and is_better("eval_perplexity", 1.0, 2.0)
    assert is_better("eval_accuracy", 2.0, 1.0) and not is_better("eval_accuracy", 1.0, 1.0)


def test_loss_of_clients_is_weighted_by_their_examples():
    assert mean_client_loss(make_record(1, None, None)) == pytest.approx((30 * 2.0 + 10 * 1.0) / 40)


def test_trackers_get_numbers_by_name():
    logs = flatten_record(make_record(1, {"eval_loss": 1.25}, {"eval_loss": 1.0}))
    expected = {"proxy/eval_loss": 1.25, "server/eval_loss": 1.0, "clients/loss": 1.75}
    assert logs == expected | {"bytes_down": 1500, "bytes_up": 2500, "seconds": 1.5}
    assert "clients/loss" not in flatten_record(make_record(0, None, None))
