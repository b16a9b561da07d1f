# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What each client did and cost, over the rounds."""

import pytest

from fedlpp_hf.report.clients import count_reasons, hide_details, summarize_clients

from .records import make_record


def make_traffic(**seconds):
    return {name: {"bytes_down": 100, "bytes_up": 1000 * (value is not None), "seconds": value}
            for name, value in seconds.items()}  # fmt: skip


def test_clients_are_summed_over_the_rounds():
    entry = {"loss": 1.0, "steps": 1}
    records = [
        make_record(0, None, None, asked=[]),
        make_record(1, None, None, asked=["site-2", "site-10"], traffic=make_traffic(**{"site-2": 1.0, "site-10": 2.0}),
                    clients={"site-2": entry | {"num_examples": 5}, "site-10": entry | {"num_examples": 7}}),
        make_record(2, None, None, asked=["site-10", "site-3"], traffic=make_traffic(**{"site-10": 4.0, "site-3": None}),
                    clients={"site-10": entry | {"num_examples": 6}},
                    rejected={"site-3": "it did not answer", "nobody": "it was not asked in this round"}),
    ]  # fmt: skip
    found = {client.client: client for client in summarize_clients(records)}
    assert list(found) == ["nobody", "site-3", "site-2", "site-10"]
    ten = found["site-10"]
    assert (ten.asked, ten.accepted, ten.refused, ten.examples, ten.mean_seconds) == (2, 2, 0, 6, 3.0)
    assert (ten.bytes_down, ten.bytes_up) == (200, 2000)
    three = found["site-3"]
    assert (three.asked, three.accepted, three.refused, three.examples, three.mean_seconds) == (1, 0, 1, None, None)
    assert (three.bytes_down, three.bytes_up) == (100, 0)
    assert (found["nobody"].asked, found["nobody"].bytes_down) == (0, 0)
    assert count_reasons(records) == [("it did not answer", 1), ("it was not asked in this round", 1)]


def test_bytes_that_a_round_did_not_record_are_unknown_not_zero():
    known = make_record(1, None, None, asked=["a", "b"], traffic=make_traffic(a=1.0, b=1.0))
    found = summarize_clients([known, make_record(2, None, None)])
    assert [(client.bytes_down, client.bytes_up, client.accepted) for client in found] == [(None, None, 2)] * 2


@pytest.mark.parametrize(
    "reason, shown",
    [
        ("its run failed: FileNotFoundError: [Errno 2] '/home/owner/rows.csv'", "its run failed: FileNotFoundError"),
        ("its run failed: torch.OutOfMemoryError: on gpu-node-17", "its run failed: torch.OutOfMemoryError"),
        ("its run failed: /home/owner", "its run failed"),
        ("its round is 9; the task's is 1", "its round is 9; the task's is 1"),
        ("Flower reports: lost 10.0.0.7:9092 (code 3)", "Flower reports"),
        ("no answer from grpc://host:1 by C:\\rows or `/data/x`, token hf_abc, a@b", "no answer from … by … or … token …, …"),
        ("x" * 200, "x" * 100 + "…"),
    ],
)  # fmt: skip
def test_refusals_name_no_file_address_or_token(reason, shown):
    assert hide_details(reason) == shown
