# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a report says of client-level differential privacy."""

import pytest

from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.report.metrics import flatten_record
from fedlpp_hf.report.page import PageContent, render_page
from fedlpp_hf.report.privacy import describe_privacy, find_spent, format_spent
from fedlpp_hf.report.text import describe_round, list_rounds, render_report

from .records import make_records


def make_noisy(lost: int = 0) -> list[dict]:
    records = make_records()
    for number, record in enumerate(records[1:], 1):
        record["privacy"] = {
            "epsilon": 1.2341 * number,
            "epsilon_of_another_round": 1.2341 * (number + 1),
            "delta": 1e-4,
            "releases": number + lost,
            "noise_multiplier": 0.8,
            "clip_norm": 0.5,
            "analysis": "Poisson sampling at rate 0.1; PLD accountant",
        }
    return records


@pytest.fixture
def args(tmp_path):
    options = {"target_epsilon": 3.0, "target_delta": 1e-4, "clip_update_norm": 1.0, "weighting": "uniform"}
    return FederatedConfig(str(tmp_path), report_to=[], use_cpu=True, num_rounds=2, **options)


def test_spent_is_in_the_line_of_a_round_the_table_and_for_trackers():
    records = make_noisy()
    assert "| ε 2.47 |" in describe_round(records[2], 2)
    table = list_rounds(records)
    place = table[0].index("ε")
    assert [row[place] for row in table[1:]] == ["0", "1.24", "2.47"]
    assert flatten_record(records[2])["privacy/epsilon"] == 1.2341 * 2
    assert "ε" not in list_rounds(make_records())[0] and "ε" not in describe_round(make_records()[2], 2)
    assert not any(name.startswith("privacy/") for name in flatten_record(make_records()[2]))


@pytest.mark.parametrize(("epsilon", "shown"), [(1.0, "1.00"), (1.0000001, "1.01"), (0.001, "0.01"), (123.2, "124")])
def test_spent_is_rounded_up(epsilon, shown):
    assert format_spent({"epsilon": epsilon}) == shown


def test_report_and_page_say_what_was_spent_and_against_whom_it_holds(args):
    records = make_noisy()
    text, page = render_report(records, args), render_page(PageContent(records, args))
    for part in ("ε = 2.47 at δ = 0.0001 after 2 releases", "not against the server", "Poisson sampling at rate 0.1"):
        assert part in text and part in page
    assert "<dd>ε = 2.47</dd>" in page
    for plain in (render_report(make_records(), args), render_page(PageContent(make_records(), args))):
        assert "releases" not in plain
    assert find_spent(make_records()) is None and describe_privacy(make_records(), args) == []


def test_report_of_noise_in_shares_says_that_it_holds_against_the_server(args):
    records = make_noisy()
    for record in records[1:]:
        record["privacy"]["colluders"] = 2
        record["sum"] = {"loss": float("nan"), "losses": 0, "steps": 0}
    text = render_report(records, args)
    assert "against the server, too, while at most 2 of a round's clients help it" in text
    assert "not against the server" not in text and "nan" not in text
    assert "loss" not in describe_round(records[2], 2) and list_rounds(records)[2][3] == ""


def test_report_says_that_the_budget_ended_it(args):
    args.num_rounds = 9
    assert "The budget of ε = 3 ended the federation after round 2: another round would have brought it to 3.702." in (
        render_report(make_noisy(), args)
    )
    for changed in ({"num_rounds": 2}, {"target_epsilon": 9.0}, {"target_epsilon": None}):
        config = {"num_rounds": 9, "target_epsilon": 3.0} | changed  # as a card reads it
        assert len(describe_privacy(make_noisy(), config)) == 1


def test_report_counts_rounds_that_were_lost(args):
    assert "1 of these releases belong to rounds that were lost" in render_report(make_noisy(lost=1), args)
