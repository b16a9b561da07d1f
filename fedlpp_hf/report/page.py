# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The report as one HTML file that opens from disk and can be mailed: no script, nothing from elsewhere, no path or token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..config.federated import FederatedConfig
from ..config.metrics import MetricChoice, is_number
from ..config.options import card_labels
from .clients import ClientSummary, count_reasons, summarize_clients
from .metrics import Record
from .parties import draw_parties, tabulate_parties
from .picture import plot_rounds
from .privacy import find_spent, format_spent
from .sent import SentTensor, summarize_sent
from .svg import draw_svg
from .tables import format_bytes
from .text import (
    NOT_MEASURED,
    AttackerRow,
    AuditSummary,
    describe_costs,
    list_remarks,
    list_results,
    list_rounds,
    list_warnings,
    read_ends,
)


TEMPLATE = "page.html"
SHOWN_CLIENTS, SHOWN_ROUNDS, SHOWN_REASONS = 50, 50, 20  # so that the page of ten thousand clients can be mailed
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class PageContent:
    """What the page shows.

    Args:
        records: Of all rounds, from round 0.
        args: The federation's options.
        references: Metrics of models that nobody holds, by label.
        audit: What the audit found, if there was one.
        sent: The tensors of the base and of a proxy; empty where they are not known.
        federation_id, base_fingerprint: As in the federation's records.
    """

    records: Sequence[Record]
    args: FederatedConfig
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    audit: AuditSummary | None = None
    sent: Sequence[SentTensor] = ()
    federation_id: str = ""
    base_fingerprint: str = ""


def render_page(content: PageContent) -> str:
    """The page as text. It depends on `content` alone: no date, no random id. The template escapes all that it is given."""
    records, args, audit = content.records, content.args, content.audit
    attackers = audit.attackers if audit else []
    results = list_results(records, args, content.references, attackers)
    rounds = list_rounds(records, MetricChoice.of(args))
    clients = summarize_clients(records)
    reasons = count_reasons(records)
    base_bytes = sum(tensor.bytes for tensor in content.sent if tensor.part == "base")
    return _load_template().render(
        verdict=_write_verdict(content, base_bytes),
        facts=_list_facts(content, base_bytes),
        warnings=list_warnings(records, args),
        results=results,
        not_measured=NOT_MEASURED,
        costs=describe_costs(records),
        remarks=list_remarks(records, args, attackers),
        pictures=_draw_rounds(content),
        rounds=[rounds[0], *rounds[1:][-SHOWN_ROUNDS:]],
        rounds_left_out=max(len(records) - SHOWN_ROUNDS, 0),
        clients=[_show_client(client) for client in clients[:SHOWN_CLIENTS]],
        clients_left_out=len(clients) - SHOWN_CLIENTS,
        num_clients=len(clients),
        reasons=reasons[:SHOWN_REASONS],
        reasons_left_out=max(len(reasons) - SHOWN_REASONS, 0),
        sent=summarize_sent(content.sent) if content.sent else [],
        base_bytes=format_bytes(base_bytes),
        bytes_down=format_bytes(sum(record["bytes_down"] for record in records)),
        broadcasts=args.broadcasts,
        audit=audit,
        parties=tabulate_parties(audit.parties) if audit else [],
        parties_picture=_draw_audit(audit),
        settings=[
            (label, "" if getattr(args, name) is None else getattr(args, name))
            for name, label in card_labels(FederatedConfig).items()
        ],
        federation_id=content.federation_id,
        base_fingerprint=content.base_fingerprint,
        version=version("fedlpp_hf"),
    )


@cache
def _load_template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE)


def _write_verdict(content: PageContent, base_bytes: int) -> list[str]:
    """A few sentences: what the owner gained, what clients hold and can make, what was sent."""
    first, last, _ = read_ends(content.records, content.args)
    choice, server, name = MetricChoice.of(content.args), last.get("server", {}), _find_metric(content)
    sentences: list[str] = []
    if name is None:
        sentences.append(NOT_MEASURED.replace("`", ""))
    else:
        label = name.removeprefix("eval_")
        if is_number(server.get(name)) and is_number(first.get("server", {}).get(name)):
            before, after = first["server"][name], server[name]
            better = "better" if choice.is_better(name, after, before) else "no better"
            sentences.append(
                f"The server's model is {better} than the owner's was: {label} {before:.4f} before, {after:.4f} after."
            )
        else:
            sentences.append("Nobody here holds the full model, so the server's model was not measured.")
        held, what = _find_held(first, last)
        if is_number(held.get(name)):
            base = first.get("proxy", {}).get(name)
            alone = f"; the base alone had {base:.4f}" if "proxy" in last and is_number(base) else ""
            sentences.append(f"Clients hold {label} {held[name]:.4f} ({what}{alone}).")
        if best := _find_best_attacker(content, name):
            sentences.append(
                f"The best attacker reaches {label} {best.metrics[name]:.4f}; stolen value {best.stolen}."
            )
        elif content.audit is None:
            sentences.append("No audit was run: what clients can make of what they hold was not measured.")
    down, up = (sum(record[way] for record in content.records) for way in ("bytes_down", "bytes_up"))
    beside = f", beside the base of {format_bytes(base_bytes)} for each" if base_bytes else ""
    return [*sentences, f"{format_bytes(down)} went to clients{beside}; {format_bytes(up)} came back."]


def _find_metric(content: PageContent) -> str | None:
    """The metric of the headline: of the server's model, or where there is none of what clients hold."""
    first, last, _ = read_ends(content.records, content.args)
    return MetricChoice.of(content.args).main(last.get("server") or first.get("proxy") or {})


def _find_held(first: Mapping[str, Any], last: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The metrics of what clients hold at the end, and what that is."""
    if "proxy" in last:
        return last["proxy"], "base + last proxy"
    return first.get("proxy", {}), "the untouched base"


def _find_best_attacker(content: PageContent, name: str) -> AttackerRow | None:
    choice, best = MetricChoice.of(content.args), None
    for row in content.audit.attackers if content.audit else []:
        if is_number(row.metrics.get(name)) and (
            best is None or choice.is_better(name, row.metrics[name], best.metrics[name])
        ):
            best = row
    return best


def _list_facts(content: PageContent, base_bytes: int) -> list[tuple[str, str]]:
    """The numbers in large type, by what they are."""
    first, last, _ = read_ends(content.records, content.args)
    name = _find_metric(content)
    facts: list[tuple[str, str]] = []
    if name is not None:
        label = name.removeprefix("eval_")
        ends = [metrics.get("server", {}).get(name) for metrics in (first, last)]
        if all(is_number(value) for value in ends):
            facts.append((f"owner: {label} before → after", " → ".join(f"{value:.3f}" for value in ends)))
        held, what = _find_held(first, last)
        if is_number(held.get(name)):
            facts.append((f"clients hold ({what})", f"{held[name]:.3f}"))
        if best := _find_best_attacker(content, name):
            facts.append(("best attacker", f"{best.metrics[name]:.3f}"))
    if spent := find_spent(content.records):
        facts.append((f"spent on clients' privacy, at δ = {spent['delta']:g}", f"ε = {format_spent(spent)}"))
    if base_bytes:
        facts.append(("base, once to each client", format_bytes(base_bytes)))
    for way, label in (("bytes_down", "to clients in all rounds"), ("bytes_up", "from clients")):
        facts.append((label, format_bytes(sum(record[way] for record in content.records))))
    return facts


def _draw_rounds(content: PageContent) -> list[str]:
    """The main metric over the rounds, and the loss if that is another; empty without matplotlib or metrics."""
    choice, loss = MetricChoice.of(content.args), MetricChoice("loss")
    metrics: Mapping[str, Any] = next(
        (r["metrics"][view] for r in content.records for view in ("server", "proxy") if view in r["metrics"]), {}
    )
    names = dict.fromkeys(name for name in (choice.main(metrics), loss.main(metrics)) if name)
    attackers = content.audit.attackers if content.audit else []
    pictures = []
    for place, name in enumerate(names):
        figure = plot_rounds(content.records, content.references, MetricChoice(name), attackers, narrow=True)
        if figure is None:
            return []
        label = f"{name.removeprefix('eval_')} of the server's model and of what clients hold, by round"
        pictures.append(draw_svg(figure, label, f"rounds{place}"))
    return pictures


def _draw_audit(audit: AuditSummary | None) -> str | None:
    figure = None if audit is None else draw_parties(audit.parties, width=4.0)
    label = "What each party holds, on an axis from guessing to the server's model; the table below has the numbers"
    return None if figure is None else draw_svg(figure, label, "parties")


def _show_client(client: ClientSummary) -> list[str]:
    name = client.client if len(client.client) <= _LONGEST_NAME else f"{client.client[:_LONGEST_NAME]}…"
    seconds = client.mean_seconds
    return [
        name,
        f"{client.accepted} of {client.asked}",
        "" if client.examples is None else f"{client.examples:,}",
        *("" if count is None else format_bytes(count) for count in (client.bytes_down, client.bytes_up)),
        "" if seconds is None else f"{seconds:.1f} s",
        str(client.refused or ""),
    ]
