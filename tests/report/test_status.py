# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The state of a federation, from its records and from the process that runs it, as values, as text, and for Prometheus."""

import json
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedlpp_hf.report.exposition import MOST_CLIENTS, render_metrics
from fedlpp_hf.report.status import describe_status, format_seconds, summarize_status


HOSTILE = 'x"} 1\nfedlpp_rounds 99\\\x1b[2J\u202e'
FEDERATION = {"federation_id": "f" * 16, "clients": {"a": 10, "b": None, "c": 5}, "config": {"num_rounds": 6}}


def make_record(number, seconds=10.0, rejected=None, times=(1.0, 1.5, 2.0), **more):
    clients = [client for client in "abc" if client not in (rejected or {})]
    costs = {
        client: {"bytes_down": 100, "bytes_up": 50 if client in clients else 0, "seconds": time}
        for client, time in zip("abc", times, strict=True)
    }
    record = {
        "round": number,
        "metrics": {"server": {"eval_loss": 0.5, "eval_accuracy": 0.75}},
        "clients": {client: {"num_examples": 1, "loss": 1.0} for client in clients if number},
        "rejected": rejected or {},
        "bytes_down": 300 if number else 0,
        "bytes_up": 50 * len(clients) if number else 0,
        "seconds": seconds if number else 0.0,
    }
    return record | ({"traffic": costs} if number else {}) | more


RECORDS = [make_record(0), make_record(1, 8.0, {"b": "no memory"}), make_record(2, 12.0)]


def make_live(**changes):
    asked = {
        "a": {"state": "answered", "seconds": 1.0, "reason": None, "bytes_down": 100, "bytes_up": 50},
        "b": {"state": "training", "seconds": 30.0, "reason": None, "bytes_down": 100, "bytes_up": 0},
        "c": {"state": "refused", "seconds": 2.0, "reason": "its norm is 9", "bytes_down": 100, "bytes_up": 0},
    }
    live = {
        "process": {"pid": 7, "host": "host", "since": "2026-11-29T00:00:00+00:00"},
        "phase": "round", "round": 3, "round_seconds": 4.0, "usual_seconds": None, "pausing": False, "stopping": False,
        "committed": 2, "num_rounds": 6, "num_clients": 3, "rows": FEDERATION["clients"], "dropped": [], "asked": asked,
        "here": None, "refused_nodes": {},
    }  # fmt: skip
    return live | changes


def by_id(status):
    return {client["id"]: client for client in status["clients"]}


def test_without_a_process_it_is_what_the_records_say():
    status = summarize_status(FEDERATION, RECORDS, None, ["c"])
    assert status["phase"] == "not running" and status["committed"] == 2 and status["num_rounds"] == 6
    assert (status["bytes_down"], status["bytes_up"], status["seconds"]) == (600, 250, 20.0)
    assert status["process"] is None and status["round"] is None and status["seconds_left"] is None
    clients = by_id(status)
    assert {client: entry["state"] for client, entry in clients.items()} == {"a": "idle", "b": "idle", "c": "dropped"}
    assert (clients["b"]["asked"], clients["b"]["accepted"], clients["b"]["refused"]) == (2, 1, 1)
    assert clients["b"]["reason"] == "no memory" and clients["b"]["reason_round"] == 1 and clients["b"]["here"] is None
    assert clients["c"]["seconds"] == 2.0 and clients["a"]["bytes_up"] == 100 and clients["b"]["bytes_up"] == 50
    json.dumps(status, allow_nan=False)


def test_round_under_way():
    status = summarize_status(FEDERATION, RECORDS, make_live())
    assert status["bytes_down"] == 900 and status["bytes_up"] == 300
    clients = by_id(status)
    # Those who have answered took 1 and 2 seconds.
    assert [clients[client]["slow"] for client in "abc"] == [False, True, False]
    assert clients["c"]["reason"] == "its norm is 9" and clients["c"]["reason_round"] is None
    assert clients["a"]["asked"] == 3 and clients["a"]["accepted"] == 2
    assert (
        status["seconds_left"] == 4 * 10.0 - 4.0
    )  # four rounds of the median of 8 and 12 s, less what this one has taken
    assert summarize_status(FEDERATION, RECORDS, make_live(usual_seconds=3.0))["seconds_left"] == 4 * 3.0 - 3.0
    assert summarize_status(FEDERATION, RECORDS, make_live(stopping=True))["seconds_left"] == 10.0 - 4.0
    assert summarize_status(FEDERATION, RECORDS, make_live(phase="finishing", round=None))["seconds_left"] is None


def test_who_is_here():
    live = make_live(
        phase="paused", round=None, asked={}, here=["a", "c"], dropped=["c"], refused_nodes={"5": "no key"}
    )
    status = summarize_status(FEDERATION, RECORDS, live)
    assert {client: entry["state"] for client, entry in by_id(status).items()} == {
        "a": "idle",
        "b": "away",
        "c": "dropped",
    }
    assert [by_id(status)[client]["here"] for client in "abc"] == [True, False, True]
    text = "\n".join(describe_status(status))
    assert "Node 5 is refused: no key" in text and text.index("| b ") < text.index("| a ")  # trouble first


def test_before_there_is_a_federation():
    live = make_live(phase="joining", rows=None, asked={}, round=None, round_seconds=None, here=["a"], committed=None)
    lines = describe_status(summarize_status({}, [], live))
    assert lines[0] == "Clients are joining; 0 of 6 rounds committed"
    assert "Here are 1 of 3 clients: a" in lines


def test_text():
    noisy = [*RECORDS[:2], make_record(2, 12.0, privacy={"epsilon": 1.2301, "delta": 1e-5})]
    lines = describe_status(summarize_status(FEDERATION, noisy, make_live(pausing=True)))
    assert lines[0] == f"Federation {'f' * 16}: round 3 of 6 under way for 4.0 s; 2 of 6 rounds committed"
    assert lines[1:5] == [
        "It pauses before the next round.",
        "Process 7 on host, since 2026-11-29T00:00:00+00:00",
        "About 36 s left, without the merge and the audit.",
        "900 B to clients, 300 B from clients | server accuracy 0.7500 | ε = 1.24 (δ = 1e-05)",
    ]
    assert [line.split("|")[1].strip() for line in lines[6:]][2:] == ["c", "b", "a"]
    assert "training, slow" in lines[9]
    many = FEDERATION | {"clients": {f"c{number:03}": 1 for number in range(100)}}
    assert "… and 60 more clients" in describe_status(summarize_status(many, [], None))[-1]


def test_what_clients_say_forges_nothing():
    federation = FEDERATION | {"clients": {HOSTILE: 1}}
    asked = {HOSTILE: {"state": "refused", "seconds": 1.0, "reason": HOSTILE, "bytes_down": 1, "bytes_up": 0}}
    live = make_live(rows=federation["clients"], asked=asked, refused_nodes={"1": HOSTILE})
    lines = describe_status(summarize_status(federation, [], live))
    assert all(line.isprintable() for line in lines)
    page = render_metrics(summarize_status(federation, [], live))
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert [sample.value for sample in families["fedlpp_rounds"].samples] == [6]
    assert page.isascii() or "\u202e" not in page
    assert len(families["fedlpp_client_refused"].samples) == 1


def test_prometheus_reads_it():
    status = summarize_status({}, [*RECORDS, make_record(3, privacy={"epsilon": 0.5})], make_live(here=["a"]))
    families = {family.name: family for family in text_string_to_metric_families(render_metrics(status))}

    def value(family, **labels):
        [sample] = [sample for sample in families[family].samples if sample.labels == labels]
        return sample.value

    assert value("fedlpp_rounds_committed") == 3 and value("fedlpp_rounds") == 6 and value("fedlpp_epsilon") == 0.5
    assert families["fedlpp_sent_bytes"].type == "counter" and value("fedlpp_sent_bytes") == 1200
    assert value("fedlpp_phase", phase="round") == 1 and value("fedlpp_phase", phase="paused") == 0
    assert value("fedlpp_clients", state="training") == 1 and value("fedlpp_clients_slow") == 1
    assert value("fedlpp_metric", view="server", name="eval_accuracy") == 0.75
    assert value("fedlpp_client_accepted", client="b") == 2 and value("fedlpp_clients_connected") == 1
    assert all(family.documentation for family in families.values())


def test_series_are_bounded_and_values_are_numbers():
    clients = {f"{'c' * 200}{number}": 1 for number in range(3 * MOST_CLIENTS)}
    record = make_record(1) | {
        "metrics": {"server": {"eval_loss": math.nan, "eval_max": math.inf, "eval_names": ["x"]}}
    }
    status = summarize_status({"clients": clients, "config": {"num_rounds": 2}}, [make_record(0), record], None)
    page = render_metrics(status)
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert len(families["fedlpp_client_accepted"].samples) <= MOST_CLIENTS
    assert families["fedlpp_clients_not_shown"].samples[0].value == 2 * MOST_CLIENTS
    assert len(page) < 60_000
    values = {sample.labels["name"]: sample.value for sample in families["fedlpp_metric"].samples}
    assert math.isnan(values["eval_loss"]) and values["eval_max"] == math.inf and "eval_names" not in values


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (93_700, "1 d 2 h"),
    ],
)
def test_times(seconds, text):
    assert format_seconds(seconds) == text
