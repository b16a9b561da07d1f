# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rounds as they come: lines, files and a picture."""

import json
import math
import re
import sys
from unittest.mock import Mock

import pytest

from fedlpp_hf.report.metrics import flatten_record
from fedlpp_hf.report.page import PageContent, render_page
from fedlpp_hf.report.picture import draw_rounds
from fedlpp_hf.report.rounds import RoundReporter
from fedlpp_hf.report.text import render_report

from .records import make_record, make_records


def test_reporter_writes_jsonl_report_and_picture(args, capsys):
    pytest.importorskip("matplotlib")
    args.disable_tqdm = False
    trackers, records = Mock(), make_records()
    with RoundReporter(args, trackers) as reporter:
        for record in records:
            reporter.on_client("a")
            reporter.on_round(record)
        reporter.write(records)
        reporter.show()
    written = (reporter.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == records
    assert (reporter.output_dir / "report.md").read_text() == render_report(records, args)
    assert (reporter.output_dir / "rounds.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (reporter.output_dir / "report.html").read_text(encoding="utf-8")
    assert page == render_page(PageContent(records, args)) and "<svg" in page
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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_rounds(make_records(), tmp_path / "rounds.png") is False
    assert not (tmp_path / "rounds.png").exists()
