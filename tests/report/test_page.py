# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The report as one HTML file: whole, escaped, without scripts and without anything from elsewhere."""

import math
import re
import sys
from dataclasses import replace

import pytest

from fedlpp_hf.report.page import SHOWN_CLIENTS, render_page
from fedlpp_hf.report.text import NOT_MEASURED

from .pages import HOSTILE, StrictReader, make_audit, make_content
from .records import make_record, make_records


ADDRESSES = {"href", "src", "srcset", "action", "data", "poster", "xlink:href", "formaction", "background"}


def check_page(page: str) -> StrictReader:
    """Check what holds for every page, and return it read."""
    assert page.startswith("<!DOCTYPE html>\n<html lang=") and "\n\n\n" not in page
    reader = StrictReader(page)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ADDRESSES & attributes.keys():
            assert attributes[name].startswith("#"), (tag, name, attributes[name])
    assert "://" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in reader.tags if "href" in a} | set(re.findall(r"url\(#([^)]+)\)", page))
    targets |= {a["aria-labelledby"] for _, a in reader.tags if "aria-labelledby" in a}
    assert targets <= set(ids)
    (policy,) = [a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in reader.tags if tag == "svg")
    return reader


def test_page_has_all_parts(args):
    pytest.importorskip("matplotlib")
    reader = check_page(render_page(make_content(args)))
    for words in (
        "The server's model is better than the owner's was: accuracy 0.6000 before, 0.9000 after.",
        "Clients hold accuracy 0.7500 (base + last proxy; the base alone had 0.5000).",
        "The best attacker reaches accuracy 0.7800; stolen value 40% (20% to 60%).",
        "4.5 kB went to clients, beside the base of 603 B for each; 7.5 kB came back.",
        "nobody (reference)", "linear4bit", "Proxies carry what was learned", "1.0000 to 1.2000", "A note.", "Federation f0",
    ):  # fmt: skip
        assert words in reader.text, words
    labels = [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"]
    assert len(labels) == 2 and "accuracy of the server's model" in labels[0] and "guessing" in labels[1]
    assert "Warning" not in reader.text


def test_page_depends_on_its_content_alone(args):
    assert render_page(make_content(args)) == render_page(make_content(args))
    assert render_page(make_content(args)) != render_page(make_content(args, federation_id="f1"))


@pytest.mark.parametrize(
    "records",
    [
        [make_record(0, None, None)],  # no round is done
        [make_record(n, None, None) for n in range(2)],
        [make_record(n, None, {"eval_loss": 2.0 - n}) for n in range(3)],  # no evaluation of clients
        [make_record(n, {"eval_loss": 2.0 - n}, None) for n in range(3)],  # no owner
        [make_record(0, {"eval_loss": 2.0}, {"eval_loss": 2.0}), make_record(1, None, {"eval_loss": 1.0})],  # never
        [make_record(n, {"eval_loss": math.nan}, {"eval_loss": math.inf}) for n in range(2)],
        [make_record(n, {"eval_note": "text"}, {"eval_list": [1.0]}) for n in range(2)],
        make_records("eval_loss", [(1.0, 1.0), (0.5, 1.5)]),  # worse than before, and than the proxy
    ],
)
@pytest.mark.parametrize("audit", [None, make_audit(attackers=[], notes=[])], ids=lambda audit: "")
def test_any_federation_has_a_page(args, records, audit):
    page = check_page(render_page(make_content(args, records=records, audit=audit, sent=[], references={}))).text
    server = [record["metrics"].get("server", {}) for record in records]
    assert ("nothing was measured" in page) == (
        not any(record["metrics"] for record in records) or "eval_list" in server[0]
    )
    assert ("No audit was run" in page) == (audit is None)
    assert ("Warning." in page) == (server[0].get("eval_loss") == 1.0)
    assert NOT_MEASURED.replace("`", "") in page or "loss" in page


def test_nothing_from_elsewhere_becomes_markup(args):
    """Client ids, refusals, metrics and labels are other people's."""
    clients = {HOSTILE: {"num_examples": 3, "loss": 1.0}, "$x_{$": {"num_examples": 3, "loss": 1.0}}
    metrics = {HOSTILE: 0.5, "eval_$\\frac{$": 0.25}
    records = [
        make_record(n, metrics, metrics, clients=clients, rejected={HOSTILE + "2": HOSTILE, "b": "said " + HOSTILE})
        for n in range(3)
    ]
    audit = make_audit(notes=[HOSTILE], rows=HOSTILE, stolen=[[HOSTILE] * 4, [HOSTILE] * 4])
    audit = replace(audit, parties=[replace(party, label=HOSTILE, model=HOSTILE) for party in audit.parties])
    content = make_content(args, records=records, audit=audit, references={HOSTILE: metrics}, federation_id=HOSTILE)
    args.metric_for_best_model = HOSTILE
    page = render_page(content)
    assert HOSTILE.split("&")[0] in check_page(page).text
    assert "<script" not in page and "<img" not in page


def test_page_of_ten_thousand_clients_can_be_mailed(args):
    names = [f"client-{number}" for number in range(10_000)]
    clients = {name: {"num_examples": 10, "loss": 1.0, "steps": 3} for name in names}
    traffic = {name: {"bytes_down": 100, "bytes_up": 1000, "seconds": 0.5} for name in names}
    rejected = {f"late-{number}": f"it claims {number} examples" for number in range(100)}
    records = [
        make_record(n, {"eval_loss": 2.0}, {"eval_loss": 1.0}, clients=clients, traffic=traffic, rejected=rejected)
        for n in range(1, 56)
    ]
    page = render_page(make_content(args, records=[make_record(0, {"eval_loss": 2.0}, {"eval_loss": 2.0}), *records]))
    text = check_page(page).text
    assert f"The first {SHOWN_CLIENTS} of 10,100 clients" in text and "And 80 other reasons." in text
    assert "metrics.jsonl has the 6 before them" in text
    assert len(page.encode()) < 300_000


def test_settings_are_those_of_the_card(args):
    args.hub_token, args.full_model = "hf_secret", "/owner/full"
    page = render_page(make_content(args))
    assert "bits per weight of the clients" in page and "local learning rate" in page
    assert not [word for word in ("hf_secret", "/owner", args.output_dir) if word in page]


def test_without_matplotlib_there_is_a_page_without_pictures(args, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reader = check_page(render_page(make_content(args)))
    assert "matplotlib is not installed" in reader.text and "svg" not in dict(reader.tags)
    assert "0.9500 to 1.1000" in reader.text  # the numbers are in the tables
