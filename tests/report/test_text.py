# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The report shows what the owner gained and what the clients hold, and warns when and only when it should."""

import json
import math
import re
from unittest.mock import Mock

import pytest

from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.report.text import (
    RoundReporter,
    describe_round,
    draw_rounds,
    find_warnings,
    flatten_record,
    format_bytes,
    format_table,
    is_better,
    main_metric,
    mean_client_loss,
    render_report,
)


def make_record(number: int, proxy: dict | None, server: dict | None, **changes) -> dict:
    clients = {"a": {"num_examples": 30, "loss": 2.0}, "b": {"num_examples": 10, "loss": 1.0}} if number else {}
    metrics = {name: metrics for name, metrics in (("proxy", proxy), ("server", server)) if metrics is not None}
    base = {"round": number, "clients": clients, "rejected": {}, "metrics": metrics}
    return base | {"bytes_down": 1500 * number, "bytes_up": 2500 * number, "seconds": 1.5 * number} | changes


def make_records(metric: str = "eval_accuracy", values=((0.5, 0.6), (0.7, 0.8), (0.75, 0.9))) -> list[dict]:
    return [make_record(n, {metric: proxy}, {metric: server}) for n, (proxy, server) in enumerate(values)]


@pytest.fixture
def args(tmp_path) -> FederatedConfig:
    return FederatedConfig(str(tmp_path), num_rounds=2, base_bits=2, adapter_bits=32, use_cpu=True, report_to=[])


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


def test_main_metric_is_the_first_that_is_not_the_loss():
    assert main_metric({"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4}) == "eval_accuracy"
    assert main_metric({"eval_loss": 1.0}) == "eval_loss"
    assert main_metric({}) is None


def test_losses_are_better_when_small():
    assert is_better("eval_loss", 1.0, 2.0) and is_better("eval_perplexity", 1.0, 2.0)
    assert is_better("eval_accuracy", 2.0, 1.0) and not is_better("eval_accuracy", 1.0, 1.0)


def test_loss_of_clients_is_weighted_by_their_examples():
    assert mean_client_loss(make_record(1, None, None)) == pytest.approx((30 * 2.0 + 10 * 1.0) / 40)


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


def test_trackers_get_numbers_by_name():
    logs = flatten_record(make_record(1, {"eval_loss": 1.25}, {"eval_loss": 1.0}))
    expected = {"proxy/eval_loss": 1.25, "server/eval_loss": 1.0, "clients/loss": 1.75}
    assert logs == expected | {"bytes_down": 1500, "bytes_up": 2500, "seconds": 1.5}
    assert "clients/loss" not in flatten_record(make_record(0, None, None))


def test_table_is_aligned_markdown():
    lines = format_table([["model", "x"], ["a", "12345"], ["longer name", ""]])
    assert lines == [
        "| model       | x     |",
        "|-------------|-------|",
        "| a           | 12345 |",
        "| longer name |       |",
    ]


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1234, "1.2 kB"),
        (10**6, "1.0 MB"),
        (2_500_000, "2.5 MB"),
        (10**9, "1.0 GB"),
        (5 * 10**12, "5.0 TB"),
        (7 * 10**15, "7000.0 TB"),
    ],
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text


def test_reporter_writes_jsonl_report_and_picture(args, capsys):
    pytest.importorskip("matplotlib")
    args.disable_tqdm = False
    trackers, records = Mock(), make_records()
    with RoundReporter(args, trackers) as reporter:
        for record in records:
            reporter.on_client("a")
            reporter.on_round(record)
        reporter.finish(records)
    written = (reporter.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == records
    assert (reporter.output_dir / "report.md").read_text() == render_report(records, args)
    assert (reporter.output_dir / "rounds.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    shown = capsys.readouterr().out
    assert re.search(r"round 2/2 .*server accuracy 0\.9000", shown) and "# Federation report" in shown
    assert [call.kwargs["logs"] for call in trackers.on_log.call_args_list] == [flatten_record(r) for r in records]
    assert trackers.on_train_begin.call_count == trackers.on_train_end.call_count == 1


def test_reporter_appends_rounds_after_a_resumption(args):
    records = make_records()
    for part in (records[:2], records[2:]):
        with RoundReporter(args, Mock()) as reporter:
            for record in part:
                reporter.on_round(record)
    written = (reporter.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in written] == [0, 1, 2]


@pytest.mark.parametrize(
    "records",
    [
        make_records(),
        [make_record(n, None, {"eval_loss": 2.0 - n}) for n in range(3)],  # no evaluation of clients
        [make_record(0, {"eval_loss": 2.0}, {"eval_loss": 2.0}), make_record(1, None, {"eval_loss": 1.0})],  # never
        [make_record(n, None, None) for n in range(2)],
        [make_record(n, {"eval_loss": math.nan}, {"eval_loss": 1.0}) for n in range(2)],
    ],
)
def test_picture_of_any_federation_is_a_png(records, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_rounds(records, tmp_path / "rounds.png", {"reference": {"eval_loss": 0.5, "eval_accuracy": 0.9}})
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_missing_matplotlib_is_said_not_raised(args, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert draw_rounds(make_records(), tmp_path / "rounds.png") is False
    assert not (tmp_path / "rounds.png").exists()
