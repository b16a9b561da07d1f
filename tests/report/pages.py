# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Contents of a report's page, and a reader of HTML that is stricter than a browser."""

from dataclasses import replace
from html.parser import HTMLParser

from fedlpp_hf.report.page import PageContent
from fedlpp_hf.report.parties import Party
from fedlpp_hf.report.sent import SentTensor
from fedlpp_hf.report.text import AttackerRow, AuditSummary

from .records import make_records


VOID = {"meta", "br", "hr", "img", "link", "input", "col", "wbr"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;`</code>"


class StrictReader(HTMLParser):
    """Reads a page; `tags` are its elements with their attributes, `words` its text. Raises where tags don't match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is there twice: {names}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> where {self.open[-3:]} are open"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_audit(**changes) -> AuditSummary:
    parties = [
        Party("guessing", "nobody", 3.0),
        Party("the base, as every client has it", "clients", 1.3, 1.25, 1.36),
        Party("one client: base and its rows alone", "clients", 1.1, 1.0, 1.2, "base + 4 steps at 0.001"),
        Party("one client: with what was sent", "clients", 1.02, 0.95, 1.1, "mean of proxies"),
        Party("the owner's model before", "owner", 1.2, 1.1, 1.3),
        Party("the server's model after", "owner", 1.0),
    ]
    audit = AuditSummary(
        attackers=[AttackerRow("best attacker (one client)", {"eval_accuracy": 0.78}, "40% (20% to 60%)")],
        parties=parties,
        stolen=[
            ["who", "in", "stolen value", "best attacker"],
            ["a", "loss", "40% (20% to 60%)", "mean of proxies"],
        ],
        exposures=[["base", "loss", "exposure"], ["untouched", "1.3000", "90% (80% to 99%)"]],
        notes=["A note."],
        rows="16 of 24 evaluation rows (seed 0)",
    )
    return replace(audit, **changes)


def make_content(args, **changes) -> PageContent:
    sent = [SentTensor("base", "w", "linear4bit", 1000, 563), SentTensor("base", "n", "full_precision", 10, 40)]
    content = PageContent(
        make_records(), args, {"reference": {"eval_accuracy": 0.95}}, make_audit(), sent, "f0", "ab" * 32
    )
    return replace(content, **changes)
