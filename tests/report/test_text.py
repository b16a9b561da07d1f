# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The report shows what the owner gained and what the clients hold, and warns when and only when it should."""

import re

import pytest

from fedlpp_hf.report.text import AttackerRow, describe_round, find_warnings, render_report

from .records import make_record, make_records


@pytest.mark.parametrize(
    "metric, proxy, before, after, warnings",
    [
        ("eval_accuracy", 0.7, 0.6, 0.8, []),
        ("eval_accuracy", 0.9, 0.6, 0.8, ["repair the quantized base"]),
        ("eval_accuracy", 0.7, 0.85, 0.8, ["worse than the owner's was at the start"]),
        ("eval_accuracy", 0.9, 0.85, 0.8, ["repair the quantized base", "worse than the owner's was at the start"]),
        ("eval_loss", 1.2, 1.5, 1.1, []),
        ("eval_loss", 1.0, 1.5, 1.1, ["repair the quantized base"]),
        ("eval_loss", 1.2, 1.0, 1.1, ["worse than the owner's was at the start"]),
        ("eval_perplexity", 3.0, 5.0, 4.0, ["repair the quantized base"]),
        ("eval_accuracy", 0.8, 0.8, 0.8, []),
        ("eval_mse", 0.4, 0.5, 0.3, []),
        ("eval_wer", 0.2, 0.5, 0.3, ["repair the quantized base"]),
        ("eval_negative_mse", -0.4, -0.5, -0.3, []),
    ],
)
def test_warnings_come_when_they_are_due(args, metric, proxy, before, after, warnings):
    first = {"proxy": {metric: 0.1}, "server": {metric: before}}
    last = {"proxy": {metric: proxy}, "server": {metric: after}}
    found = find_warnings(first, last)
    assert len(found) == len(warnings)
    for text, expected in zip(found, warnings, strict=True):
        assert expected in text and "base_bits" in text and f"{after:.4f}" in text
    records = [make_record(0, first["proxy"], first["server"]), make_record(1, last["proxy"], last["server"])]
    assert render_report(records, args).count("**Warning.**") == len(warnings)


@pytest.mark.parametrize("last", [{}, {"proxy": {"eval_loss": 1.0}}, {"server": {}}])
def test_without_a_server_to_compare_there_is_no_warning(last):
    assert find_warnings({"server": {"eval_loss": 0.5}}, last) == []


def test_warning_names_the_metric_that_both_have():
    last = {"proxy": {"eval_loss": 1.0}, "server": {"eval_accuracy": 0.8, "eval_loss": 1.1}}
    assert find_warnings({"server": {"eval_accuracy": 0.5}}, last) == []  # accuracy is what is shown; proxy has none


def test_report_shows_both_views_and_who_holds_them(args):
    text = render_report(make_records(), args, {"federation in full precision": {"eval_accuracy": 0.95}})
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert cells[0] == ["model", "held by", "accuracy"]
    assert cells[2:] == [
        ["owner's model before", "owner", "0.6000"],
        ["base before (2 bits)", "clients", "0.5000"],
        ["base + last proxy (full precision)", "clients", "0.7500"],
        ["server's model after", "owner", "0.9000"],
        ["federation in full precision", "nobody (reference)", "0.9500"],
    ]
    assert "2 rounds, 4 client runs (0 rejected), 4.5 kB to clients, 7.5 kB from clients, 4 s." in text
    assert "Warning" not in text
    waited = [record | {"owner_seconds": 1.5} for record in make_records()]
    assert " 4 s, of which 3 s waited for the owner's work." in render_report(waited, args)  # not for round 0


def test_attackers_bring_a_row_and_a_column_of_stolen_value(args):
    attacker = AttackerRow("best attacker (one client)", {"eval_accuracy": 0.8}, "50% (40% to 60%)")
    text = render_report(make_records(), args, attackers=[attacker])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert cells[0] == ["model", "held by", "accuracy", "stolen value"]
    assert cells[5] == ["best attacker (one client)", "clients", "0.8000", "50% (40% to 60%)"]
    assert [row[3] for row in cells[2:5]] == ["", "", ""] and "audit.md has more" in text


def test_the_user_says_which_way_is_better(args):
    records = make_records("eval_toughness", ((0.5, 0.6), (0.4, 0.5), (0.3, 0.2)))
    assert "worse than the owner's was at the start" in render_report(records, args)
    args.metric_for_best_model, args.greater_is_better = "toughness", False
    assert "Warning" not in render_report(records, args)


def test_metrics_that_are_no_numbers_are_left_out(args):
    metrics = {
        "eval_per_class": {"0": 1.0},
        "eval_note": "text",
        "eval_none": None,
        "eval_list": [1.0],
        "eval_loss": 1.0,
    }
    text = render_report([make_record(n, metrics, metrics | {"eval_loss": None}) for n in range(2)], args)
    header, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert header == ["model", "held by", "loss"] and [row[2] for row in rows[1:]] == ["", "1.0000", "1.0000", ""]
    assert describe_round(make_record(1, metrics, metrics), 2).split(" | ")[2:4] == [
        "base + proxy loss 1.0000",
        "server loss 1.0000",
    ]


def test_best_round_is_named_and_its_metrics_are_shown(args):
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "accuracy", True
    text = render_report(make_records(values=((0.5, 0.6), (0.7, 0.9), (0.75, 0.8))), args)
    assert re.search(r"server's model after round 1 +\| owner +\| 0.9000", text)
    assert "Round 1 is published, the best by `eval_accuracy`. The evaluation set chose it" in text
    text = render_report(make_records(), args)
    assert "server's model after " in text and "Round 2 is published" in text


def test_report_without_evaluation_says_so(args):
    assert "nothing was measured" in render_report([make_record(n, None, None) for n in range(3)], args)


def test_line_of_a_round_shows_metrics_bytes_and_rejections():
    record = make_record(2, {"eval_loss": 1.25}, {"eval_loss": 1.0}, rejected={"c": "it did not answer"})
    assert describe_round(record, 9).split(" | ") == [
        "round 2/9",
        "clients' loss 1.7500",
        "base + proxy loss 1.2500",
        "server loss 1.0000",
        "down 3.0 kB, up 5.0 kB",
        "3.0 s",
        "REJECTED c: it did not answer",
    ]
    assert describe_round(make_record(0, None, {"eval_f1": 0.5}), 9) == "round 0/9 | server f1 0.5000"
