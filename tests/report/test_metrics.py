# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A record as numbers."""

import pytest

from fedlpp_hf.report.metrics import flatten_record, mean_client_loss

from .records import make_record


def test_loss_of_clients_is_weighted_by_their_examples():
    assert mean_client_loss(make_record(1, None, None)) == pytest.approx((30 * 2.0 + 10 * 1.0) / 40)


def test_trackers_get_numbers_by_name():
    logs = flatten_record(make_record(1, {"eval_loss": 1.25}, {"eval_loss": 1.0}))
    expected = {"proxy/eval_loss": 1.25, "server/eval_loss": 1.0, "clients/loss": 1.75}
    expected |= {"clients/accepted": 2, "clients/rejected": 0}
    assert logs == expected | {"bytes/down": 1500, "bytes/up": 2500, "time/seconds": 1.5}
    chosen = flatten_record(make_record(1, None, None, selection_loss=2.0, base_weight=0.5, owner_seconds=0.5))
    assert (chosen["owner/selection_loss"], chosen["owner/base_weight"], chosen["time/owner"]) == (2.0, 0.5, 0.5)
    assert flatten_record(make_record(0, None, {"eval_loss": 1.0})) == {"server/eval_loss": 1.0}


def test_trackers_get_no_metric_that_is_no_number():
    metrics = {
        "eval_loss": 1.0,
        "eval_per_class": {"0": 1.0},
        "eval_note": "text",
        "eval_none": None,
        "eval_list": [1.0],
    }
    logs = flatten_record(make_record(1, metrics, metrics))
    assert {name for name in logs if "/eval" in name} == {"proxy/eval_loss", "server/eval_loss"}
