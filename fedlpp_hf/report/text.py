# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's report as text: a line for each round, and at the end a table with a warning if one is due."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.metrics import MetricChoice, is_number
from ..server.best import find_published_round
from .metrics import Record, mean_client_loss
from .parties import Party
from .privacy import describe_privacy, find_spent, format_spent
from .tables import format_bytes, format_table


if TYPE_CHECKING:
    from ..config.federated import FederatedConfig


@dataclass(frozen=True, slots=True)
class AttackerRow:
    """What an audit adds to the report's table: an attacker, its metrics on all evaluation rows, its stolen value."""

    label: str
    metrics: Mapping[str, float]
    stolen: str


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """What a report shows of an audit, as plain values.

    Args:
        attackers: What is added to the table of results.
        parties: What each party holds, from guessing to the server's model.
        stolen, exposures: Tables, the first row being the header.
        notes: What the owner should know.
        rows: Which evaluation rows were drawn, in words.
        data: What updates tell about rows: tables with their captions; empty where it was not audited.
        data_notes: What of it was not measured.
    """

    attackers: list[AttackerRow]
    parties: list[Party]
    stolen: list[list[str]]
    exposures: list[list[str]]
    notes: list[str]
    rows: str
    data: list[tuple[str, list[list[str]]]] = field(default_factory=list)
    data_notes: list[str] = field(default_factory=list)


_BY_NAME = MetricChoice()
NOT_MEASURED = "No `eval_dataset` was given, so nothing was measured."


def describe_round(record: Record, num_rounds: int, choice: MetricChoice = _BY_NAME) -> str:
    """One line: clients' loss, the metric of proxy and server, bytes, and who was left out."""
    parts = [f"round {record['round']}/{num_rounds}"]
    epsilons = [client["record_epsilon"] for client in record["clients"].values() if "record_epsilon" in client]
    if epsilons:  # whose losses are not told
        parts.append(f"clients' rows: ε up to {max(epsilons):.3g}")
    elif loss := _format_loss(record):
        parts.append(f"clients' loss {loss}")
    for view, label in (("proxy", "base + proxy"), ("server", "server")):
        metrics = record["metrics"].get(view, {})
        name = choice.main(metrics)
        if name:
            parts.append(f"{label} {name.removeprefix('eval_')} {metrics[name]:.4f}")
    if "selection_loss" in record:
        names = {"λ": "base_weight", "variate": "variate_weight", "scale": "update_scale"}
        weights = {label: record.get(name) for label, name in names.items()}
        chosen = "".join(f", {name} {value:g}" for name, value in weights.items() if value is not None)
        parts.append(f"selection loss {record['selection_loss']:.4f}{chosen}")
    if "privacy" in record:
        parts.append(f"ε {format_spent(record['privacy'])}")
    if record["round"]:
        parts.append(f"down {format_bytes(record['bytes_down'])}, up {format_bytes(record['bytes_up'])}")
        parts.append(f"{record['seconds']:.1f} s")
    parts += [f"REJECTED {client}: {reason}" for client, reason in record["rejected"].items()]
    return " | ".join(parts)


def render_report(
    records: Sequence[Record],
    args: "FederatedConfig",
    references: Mapping[str, Mapping[str, float]] | None = None,
    attackers: Sequence[AttackerRow] = (),
) -> str:
    """The report of a whole federation as Markdown.

    Args:
        records: Of all rounds, from round 0.
        args: The federation's options.
        references: Metrics of models that nobody holds, by label.
        attackers: What the audit adds to the table.
    """
    table = list_results(records, args, references, attackers)
    lines = [
        "# Federation report",
        "",
        *(format_table(table) if table else [NOT_MEASURED]),
        "",
        describe_costs(records),
        *(f"\n{remark}" for remark in list_remarks(records, args, attackers)),
        *(f"\n**Warning.** {warning}" for warning in list_warnings(records, args)),
    ]
    return "\n".join(lines) + "\n"


def list_results(
    records: Sequence[Record],
    args: "FederatedConfig",
    references: Mapping[str, Mapping[str, float]] | None = None,
    attackers: Sequence[AttackerRow] = (),
) -> list[list[str]]:
    """The table of results, its header first: who holds which model, and its metrics. Empty if nothing was measured.

    Args:
        records: Of all rounds, from round 0.
        args: The federation's options.
        references: Metrics of models that nobody holds, by label.
        attackers: What the audit adds to the table.
    """
    first, last, published = read_ends(records, args)
    after = "server's model after"
    if published != records[-1]["round"]:
        after = f"server's model after round {published}"
    bits = {32: "full precision"}.get(args.base_bits, f"{args.base_bits} bits")
    proxy_bits = {32: "full precision"}.get(args.adapter_bits, f"{args.adapter_bits} bits")
    rows = [
        ("owner's model before", "owner", first.get("server")),
        (f"base before ({bits})", "clients", first.get("proxy")),
        (f"base + last proxy ({proxy_bits})", "clients", last.get("proxy")),
        *((row.label, "clients", row.metrics) for row in attackers),
        (after, "owner", last.get("server")),
        *((label, "nobody (reference)", metrics) for label, metrics in (references or {}).items()),
    ]
    shown = [(label, holder, metrics) for label, holder, metrics in rows if metrics]
    if not shown:
        return []
    names = list(dict.fromkeys(name for _, _, metrics in shown for name in metrics if is_number(metrics[name])))
    table = [["model", "held by", *(name.removeprefix("eval_") for name in names)]]
    table += [
        [label, holder, *(f"{metrics[name]:.4f}" if is_number(metrics.get(name)) else "" for name in names)]
        for label, holder, metrics in shown
    ]
    if attackers:
        stolen = {"model": "stolen value", **{row.label: row.stolen for row in attackers}}
        table = [[*row, stolen.get(row[0], "")] for row in table]
    return table


def read_ends(records: Sequence[Record], args: "FederatedConfig") -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """Metrics by view before the first round and after the last, and the published round: the last has its server's."""
    first, last, published = records[0]["metrics"], records[-1]["metrics"], find_published_round(args, records)
    if published != records[-1]["round"]:
        last = last | {"server": records[published]["metrics"].get("server", {})}
    return first, last, published


def describe_costs(records: Sequence[Record]) -> str:
    """Rounds, runs, bytes and seconds in one sentence."""
    down, up = (sum(record[way] for record in records) for way in ("bytes_down", "bytes_up"))
    clients = sum(len(record["clients"]) for record in records)
    rejected = sum(len(record["rejected"]) for record in records)
    owner = sum(record.get("owner_seconds", 0.0) for record in records if record["round"])
    waited = f", of which {owner:.0f} s waited for the owner's work" if owner else ""
    return (
        f"{len(records) - 1} rounds, {clients} client runs ({rejected} rejected), {format_bytes(down)} to clients, "
        f"{format_bytes(up)} from clients, {sum(record['seconds'] for record in records):.0f} s{waited}."
    )


def list_remarks(
    records: Sequence[Record], args: "FederatedConfig", attackers: Sequence[AttackerRow] = ()
) -> list[str]:
    """What the table of results does not say: the stolen value's meaning, what was chosen, and by which rows."""
    published = find_published_round(args, records)
    remarks = (
        ["Stolen value: a share of the server's gain over local training; audit.md has more."] if attackers else []
    )
    remarks += describe_privacy(records, args)
    remarks += describe_choice(records[published])
    if args.load_best_model_at_end:
        remarks.append(
            f"Round {published} is published, the best by `{MetricChoice.of(args).key}`. The evaluation set chose it, so its "
            "metrics are better than on other rows."
        )
    return remarks


def list_warnings(records: Sequence[Record], args: "FederatedConfig") -> list[str]:
    """[`find_warnings`] of a whole federation."""
    first, last, _ = read_ends(records, args)
    return find_warnings(first, last, MetricChoice.of(args))


def list_rounds(records: Sequence[Record], choice: MetricChoice = _BY_NAME) -> list[list[str]]:
    """A table of all rounds, its header first: clients, their loss, the metric of proxy and server, bytes, seconds."""
    views = [
        (view, label, name)
        for view, label in (("proxy", "base + proxy"), ("server", "server"))
        if (name := choice.main(next((r["metrics"][view] for r in records if view in r["metrics"]), {})))
    ]
    header = ["round", "clients", "rejected", "clients' loss"]
    header += [f"{label} {name.removeprefix('eval_')}" for _, label, name in views]
    noisy = find_spent(records) is not None
    header += [*(["ε"] if noisy else []), "down", "up", "seconds"]
    rows = [header]
    for record in records:
        metrics = [record["metrics"].get(view, {}).get(name) for view, _, name in views]
        rows.append(
            [
                str(record["round"]),
                str(len(record["clients"])),
                str(len(record["rejected"])),
                _format_loss(record),
                *(f"{value:.4f}" if is_number(value) else "" for value in metrics),
                *([format_spent(record["privacy"]) if "privacy" in record else "0"] if noisy else []),
                *(format_bytes(record[way]) for way in ("bytes_down", "bytes_up")),
                f"{record['seconds']:.1f}",
            ]
        )
    return rows


def _format_loss(record: Record) -> str:
    """The clients' mean loss; empty without clients, and where they keep their losses to themselves."""
    loss = mean_client_loss(record) if record["clients"] else math.nan
    return "" if math.isnan(loss) else f"{loss:.4f}"


def describe_choice(record: Record) -> list[str]:
    """What the owner's selection rows chose, if there were any, and what the server's model therefore is."""
    lines, weight = [], record.get("base_weight", 0.0)
    if "selection_loss" in record:
        lines.append(
            f"Round {record['round']} is published: of all rounds, it has the least loss on the owner's selection rows, "
            f"{record['selection_loss']:.4f}. The table is measured on other rows."
        )
    if weight:
        lines.append(
            f"The server's model is W − {weight:g}·E + θ, E being the base's error W − Q(W). The adapter on W alone is another "
            "model: `fedlpp-hf merge` takes the same weight."
        )
    return lines


def find_warnings(
    first: Mapping[str, Mapping[str, float]],
    last: Mapping[str, Mapping[str, float]],
    choice: MetricChoice = _BY_NAME,
) -> list[str]:
    """What the owner should know before using the server's model."""
    server = last.get("server")
    name = choice.main(server) if server else None
    if not server or not name:
        return []
    warnings = []
    label = name.removeprefix("eval_")
    proxy = last.get("proxy", {})
    if is_number(proxy.get(name)) and choice.is_better(name, proxy[name], server[name]):
        warnings.append(
            f"The clients' proxy ({label} {proxy[name]:.4f}) is better than the server's model ({server[name]:.4f}): "
            "the adapter has learned to repair the quantized base, which the full model does not need, and what the "
            "clients hold is worth more than what the owner gained. Try `broadcast=never`, `control_variate=1`, "
            "`base_weights` with a `selection_dataset`, more `base_bits`, fewer local steps, or a full model that "
            "already knows the task better."
        )
    if is_number(first.get("server", {}).get(name)) and choice.is_better(name, first["server"][name], server[name]):
        warnings.append(
            f"The server's model is worse than the owner's was at the start ({label} {first['server'][name]:.4f} → "
            f"{server[name]:.4f}). The update repairs the base rather than learning the task, the learning rate is "
            "too high, or the clients' data differ from the evaluation's. Try a `selection_dataset`, which keeps the "
            "best round, `control_variate=1`, more `base_bits`, a smaller `server_learning_rate`, or fewer local "
            "steps."
        )
    return warnings
