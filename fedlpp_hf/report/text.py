# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's report as text: a line for each round, and at the end a table with a warning if one is due."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.federated import FederatedConfig
from ..config.metrics import MetricChoice, is_number
from ..server.best import find_published_round
from .metrics import Record, mean_client_loss
from .tables import format_bytes, format_table


@dataclass(frozen=True, slots=True)
class AttackerRow:
    """What an audit adds to the report's table: an attacker, its metrics on all evaluation rows, its stolen value."""

    label: str
    metrics: Mapping[str, float]
    stolen: str


_BY_NAME = MetricChoice()


def describe_round(record: Record, num_rounds: int, choice: MetricChoice = _BY_NAME) -> str:
    """One line: clients' loss, the metric of proxy and server, bytes, and who was left out."""
    parts = [f"round {record['round']}/{num_rounds}"]
    if record["clients"]:
        parts.append(f"clients' loss {mean_client_loss(record):.4f}")
    for view, label in (("proxy", "base + proxy"), ("server", "server")):
        metrics = record["metrics"].get(view, {})
        name = choice.main(metrics)
        if name:
            parts.append(f"{label} {name.removeprefix('eval_')} {metrics[name]:.4f}")
    if "selection_loss" in record:
        weights = {"λ": record.get("base_weight"), "variate": record.get("variate_weight")}
        chosen = "".join(f", {name} {value:g}" for name, value in weights.items() if value is not None)
        parts.append(f"selection loss {record['selection_loss']:.4f}{chosen}")
    if record["round"]:
        parts.append(f"down {format_bytes(record['bytes_down'])}, up {format_bytes(record['bytes_up'])}")
        parts.append(f"{record['seconds']:.1f} s")
    parts += [f"REJECTED {client}: {reason}" for client, reason in record["rejected"].items()]
    return " | ".join(parts)


def render_report(
    records: Sequence[Record],
    args: FederatedConfig,
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
    first, last = records[0]["metrics"], records[-1]["metrics"]
    choice, published = MetricChoice.of(args), find_published_round(args, records)
    after = "server's model after"
    if published != records[-1]["round"]:
        after = f"server's model after round {published}"
        last = last | {"server": records[published]["metrics"].get("server", {})}
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
    names = list(dict.fromkeys(name for _, _, metrics in shown for name in metrics if is_number(metrics[name])))
    table = [["model", "held by", *(name.removeprefix("eval_") for name in names)]]
    table += [
        [label, holder, *(f"{metrics[name]:.4f}" if is_number(metrics.get(name)) else "" for name in names)]
        for label, holder, metrics in shown
    ]
    if attackers:
        stolen = {"model": "stolen value", **{row.label: row.stolen for row in attackers}}
        table = [[*row, stolen.get(row[0], "")] for row in table]
    down, up = (sum(record[way] for record in records) for way in ("bytes_down", "bytes_up"))
    clients = sum(len(record["clients"]) for record in records)
    rejected = sum(len(record["rejected"]) for record in records)
    lines = [
        "# Federation report",
        "",
        *(format_table(table) if shown else ["No `eval_dataset` was given, so nothing was measured."]),
        "",
        f"{len(records) - 1} rounds, {clients} client runs ({rejected} rejected), {format_bytes(down)} to clients, "
        f"{format_bytes(up)} from clients, {sum(record['seconds'] for record in records):.0f} s.",
        *(["\nStolen value: a share of the server's gain over local training; audit.md has more."] * bool(attackers)),
        *describe_choice(records[published]),
        *(
            [
                f"\nRound {published} is published, the best by `{choice.key}`. The evaluation set chose it, so its metrics are "
                "better than on other rows."
            ]
            * args.load_best_model_at_end
        ),
        *(f"\n**Warning.** {warning}" for warning in find_warnings(first, last, choice)),
    ]
    return "\n".join(lines) + "\n"


def describe_choice(record: Record) -> list[str]:
    """What the owner's selection rows chose, if there were any, and what the server's model therefore is."""
    lines, weight = [], record.get("base_weight", 0.0)
    if "selection_loss" in record:
        lines.append(
            f"\nRound {record['round']} is published: of all rounds, it has the least loss on the owner's selection rows, "
            f"{record['selection_loss']:.4f}. The table is measured on other rows."
        )
    if weight:
        lines.append(
            f"\nThe server's model is W − {weight:g}·E + θ, E being the base's error W − Q(W). The adapter on W alone is another "
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
