# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the audit says each party holds: few rows, with intervals; and files of the schema before."""

import json

import pytest

from fedlpp_hf import AuditReport
from fedlpp_hf.audit.report import SCHEMA_VERSION, CoalitionAudit, render_audit
from fedlpp_hf.audit.stolen_value import StolenValue
from fedlpp_hf.report.sent import SentTensor


def make_stolen(attacker, local_only, server=1.0, best="last proxy", value=0.5):
    return StolenValue("loss", attacker, local_only, server, best, "base + 4 steps", value, value - 0.1, value + 0.1)


def make_coalition(clients, attacker, sent=True):
    attacks = {"last proxy": {"loss": attacker}} if sent else {}
    return CoalitionAudit(
        clients=clients,
        num_proxies=len(attacks),
        attacks=attacks,
        local_only={"untouched base": {"loss": 1.4}, "base + 4 steps": {"loss": 1.3}},
        stolen={"loss": make_stolen(attacker, 1.3)},
        healed=make_stolen(1.3, 3.0, 1.2),
        metrics={"eval_loss": attacker},
        diverged=[],
        intervals={"attacker": [attacker - 0.05, attacker + 0.05], "local_only": [1.2, 1.4]},
    )


def make_report(coalitions):
    return AuditReport(
        federation_id="f0", base_fingerprint="ab", num_clients=4, num_rows=8, num_rows_available=10, steps=4, seed=0,
        threshold=None, before={"loss": 1.2}, server={"loss": 1.0}, exposure=make_stolen(1.4, 3.0, 1.2, "base"),
        coalitions=coalitions, sent=[SentTensor("base", "w", "linear4bit", 10, 5)], notes=[], seconds=1.0,
        intervals={"base": [1.35, 1.45], "before": [1.1, 1.3]},
    )  # fmt: skip


def test_there_is_a_row_for_each_party_and_not_for_each_attack():
    report = make_report([make_coalition(["a"], 1.1), make_coalition(["b"], 1.2), make_coalition(["a", "b"], 1.05)])
    parties = report.list_parties()
    assert [(party.holder, party.loss) for party in parties] == [
        ("nobody", 3.0), ("clients", 1.4), ("clients", 1.3), ("clients", 1.1), ("clients", 1.3), ("clients", 1.05),
        ("owner", 1.2), ("owner", 1.0),
    ]  # fmt: skip
    assert (parties[3].label, parties[3].model) == ("one client: with what was sent", "last proxy")
    assert (parties[3].low, parties[3].high) == pytest.approx((1.05, 1.15)) and parties[5].label.startswith(
        "2 clients"
    )
    assert [party.low for party in (parties[0], parties[-1])] == [None, None]


def test_where_nothing_was_sent_there_is_no_row_for_it():
    parties = make_report([make_coalition(["a"], 1.3, sent=False)]).list_parties()
    assert len(parties) == 5 and not [party for party in parties if "was sent" in party.label]
    assert len(make_report([make_coalition(list("abcd"), 1.1)]).list_parties()) == 4  # more than half of the clients


def test_summary_has_the_tables_of_the_page():
    summary = make_report([make_coalition(["a"], 1.1), make_coalition(list("abcdefg"), 1.1)]).summarize()
    assert [row.label for row in summary.attackers] == ["best attacker (one client)"]
    assert [row[:3] for row in summary.stolen[1:]] == [
        ["a", "loss", "50% (40% to 60%)"], ["7 clients: a, b, c, d, e and 2 more", "loss", "50% (40% to 60%)"],
    ]  # fmt: skip
    assert {len(row) for row in summary.exposures} == {3} and summary.rows == "8 of 10 evaluation rows (seed 0)"


def test_what_is_written_is_read_again_and_schema_3_without_intervals_too(tmp_path):
    report = make_report([make_coalition(["a"], 1.1)])
    assert report.write(tmp_path) == (tmp_path / "audit.png").is_file()
    assert AuditReport.read(tmp_path) == report
    assert "1.0500 to 1.1500" in (tmp_path / "audit.md").read_text()
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values.pop("schema") == SCHEMA_VERSION == 5
    for part in (values, *values["coalitions"]):
        del part["intervals"]
    (tmp_path / "audit.json").write_text(json.dumps({"schema": 3, **values}))
    older = AuditReport.read(tmp_path)
    assert {party.low for party in older.list_parties()} == {None} and "1.1000" in render_audit(older)
    for schema, damage in (
        (2, {}),
        (6, {}),
        (5, {"data": {"inversions": []}}),
        (4, {"intervals": {"base": ["x", "y"]}}),
        (4, {"intervals": {"base": [1.0]}}),
    ):
        (tmp_path / "audit.json").write_text(json.dumps({"schema": schema, **values, **damage}))
        with pytest.raises(ValueError, match="no audit of this version"):
            AuditReport.read(tmp_path)


def test_a_picture_that_can_t_be_drawn_leaves_none_of_another_run(tmp_path):
    (tmp_path / "audit.png").write_bytes(b"of another run")
    report = make_report([make_coalition(["a"], 1.1)])
    report.server["loss"] = float("nan")
    assert report.write(tmp_path) is False and not (tmp_path / "audit.png").exists()
