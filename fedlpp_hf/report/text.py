# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a run shows: a progress bar, a line per round, and at the end a table, a picture and a warning if one is due."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..config.federated import FederatedConfig


if TYPE_CHECKING:  # an audit is reported in the same style, with what is here
    from ..audit.report import AuditReport

Record = Mapping[str, Any]


class RoundReporter:
    """Shows a federation's rounds as they come, and hands them to the trackers of `report_to`."""

    def __init__(self, args: FederatedConfig, trackers: CallbackHandler):
        self.args = args
        self.trackers = trackers
        self.output_dir = Path(args.output_dir)
        self.state, self.control = TrainerState(is_world_process_zero=True), TrainerControl()
        self._bar = tqdm(total=args.num_rounds, unit="round", disable=args.disable_tqdm, leave=False, delay=0.1)

    def __enter__(self) -> "RoundReporter":
        self.trackers.on_train_begin(self.args, self.state, self.control)
        return self

    def __exit__(self, *exception: object) -> None:
        self.trackers.on_train_end(self.args, self.state, self.control)
        self._bar.close()

    def on_client(self, client_id: str) -> None:
        self._bar.set_postfix_str(f"{client_id} done")

    def on_round(self, record: Record) -> None:
        number = record["round"]
        self._bar.n = number
        self._bar.refresh()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with open(self.output_dir / "metrics.jsonl", "a" if number else "w", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.state.global_step = number
        self.trackers.on_log(self.args, self.state, self.control, logs=flatten_record(record))
        if not self.args.disable_tqdm:
            tqdm.write(describe_round(record, self.args.num_rounds))

    def finish(
        self,
        records: Sequence[Record],
        references: Mapping[str, Mapping[str, float]] | None = None,
        audit: "AuditReport | None" = None,
    ) -> None:
        """Write `report.md`, `metrics.jsonl` and `rounds.png`, the audit's files if there is one, and print the report."""
        text = render_report(records, self.args, references, audit)
        if audit is not None:
            audit.write(self.output_dir)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.output_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
        (self.output_dir / "report.md").write_text(text, encoding="utf-8")
        drawn = draw_rounds(records, self.output_dir / "rounds.png", references)
        if not self.args.disable_tqdm:
            self._bar.clear()
            tqdm.write(f"\n{text}")
            if not drawn:
                tqdm.write("No rounds.png: it needs matplotlib (pip install fedlpp_hf[demo]).")


def flatten_record(record: Record) -> dict[str, float]:
    """A record as numbers by name, for trackers."""
    logs = {f"{view}/{name}": value for view, metrics in record["metrics"].items() for name, value in metrics.items()}
    if record["clients"]:
        logs["clients/loss"] = mean_client_loss(record)
    return logs | {name: record[name] for name in ("bytes_down", "bytes_up", "seconds")}


def mean_client_loss(record: Record) -> float:
    """Training loss of the round's clients, weighted by their examples."""
    clients = record["clients"].values()
    total = sum(client["num_examples"] for client in clients)
    return sum(client["num_examples"] * client["loss"] for client in clients) / total


def main_metric(metrics: Mapping[str, float]) -> str | None:
    """The metric that is shown: the first that is not the loss, else the loss."""
    names = [name for name in metrics if not name.endswith("loss")] + [
        name for name in metrics if name.endswith("loss")
    ]
    return names[0] if names else None


def is_better(name: str, value: float, other: float) -> bool:
    """Whether `value` of a metric is better than `other`; losses and perplexities are better when small."""
    return value < other if name.endswith(("loss", "perplexity")) else value > other


def describe_round(record: Record, num_rounds: int) -> str:
    """One line: clients' loss, the metric of proxy and server, bytes, and who was left out."""
    parts = [f"round {record['round']}/{num_rounds}"]
    if record["clients"]:
        parts.append(f"clients' loss {mean_client_loss(record):.4f}")
    for view, label in (("proxy", "base + proxy"), ("server", "server")):
        metrics = record["metrics"].get(view, {})
        name = main_metric(metrics)
        if name:
            parts.append(f"{label} {name.removeprefix('eval_')} {metrics[name]:.4f}")
    if record["round"]:
        parts.append(f"down {format_bytes(record['bytes_down'])}, up {format_bytes(record['bytes_up'])}")
        parts.append(f"{record['seconds']:.1f} s")
    parts += [f"REJECTED {client}: {reason}" for client, reason in record["rejected"].items()]
    return " | ".join(parts)


def render_report(
    records: Sequence[Record],
    args: FederatedConfig,
    references: Mapping[str, Mapping[str, float]] | None = None,
    audit: "AuditReport | None" = None,
) -> str:
    """The report of a whole federation as Markdown."""
    first, last = records[0]["metrics"], records[-1]["metrics"]
    bits = {32: "full precision"}.get(args.base_bits, f"{args.base_bits} bits")
    proxy_bits = {32: "full precision"}.get(args.adapter_bits, f"{args.adapter_bits} bits")
    attackers = [] if audit is None else audit.summarize()
    rows = [
        ("owner's model before", "owner", first.get("server")),
        (f"base before ({bits})", "clients", first.get("proxy")),
        (f"base + last proxy ({proxy_bits})", "clients", last.get("proxy")),
        *((label, "clients", metrics) for label, metrics, _ in attackers),
        ("server's model after", "owner", last.get("server")),
        *((label, "nobody (reference)", metrics) for label, metrics in (references or {}).items()),
    ]
    shown = [(label, holder, metrics) for label, holder, metrics in rows if metrics]
    names = list(dict.fromkeys(name for _, _, metrics in shown for name in metrics))
    table = [["model", "held by", *(name.removeprefix("eval_") for name in names)]]
    table += [
        [label, holder, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)]
        for label, holder, metrics in shown
    ]
    if audit is not None:
        stolen = {"model": "stolen value", **{label: value for label, _, value in attackers}}
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
        *(["\nStolen value: a share of the server's gain over local training; audit.md has more."] * bool(audit)),
        *(f"\n**Warning.** {warning}" for warning in find_warnings(first, last)),
    ]
    return "\n".join(lines) + "\n"


def find_warnings(first: Mapping[str, Mapping[str, float]], last: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the owner should know before using the server's model."""
    server = last.get("server")
    name = main_metric(server) if server else None
    if not server or not name:
        return []
    warnings = []
    label = name.removeprefix("eval_")
    proxy = last.get("proxy", {})
    if name in proxy and is_better(name, proxy[name], server[name]):
        warnings.append(
            f"The clients' proxy ({label} {proxy[name]:.4f}) is better than the server's model ({server[name]:.4f}): the "
            "adapter has learned to repair the quantized base, which the full model does not need, and what the clients "
            "hold is worth more than what the owner gained. Try fewer local steps or a lower learning rate, more bits in "
            "the base (`base_bits`), a full model that knows the task better before it starts, or `broadcast=never`."
        )
    if name in first.get("server", {}) and is_better(name, first["server"][name], server[name]):
        warnings.append(
            f"The server's model is worse than the owner's was at the start ({label} {first['server'][name]:.4f} → "
            f"{server[name]:.4f}). The update repairs the base rather than learning the task, the learning rate is too "
            "high, or the clients' data are of another kind than the evaluation's. Try more bits in the base "
            "(`base_bits`), a smaller `server_learning_rate`, or fewer local steps."
        )
    return warnings


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of an aligned Markdown table; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def format_bytes(count: int) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    power += power < 4 and count / 1000**power >= 999.95  # else rounding would show 1000.0 of the smaller unit
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def draw_rounds(
    records: Sequence[Record], path: Path, references: Mapping[str, Mapping[str, float]] | None = None
) -> bool:
    """Draw the main metric of proxy and server over the rounds; False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    metrics: Mapping[str, float] = next(
        (record["metrics"][view] for record in records for view in record["metrics"]), {}
    )
    name = main_metric(metrics) or ""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for view, label, color in (
        ("server", "server's model (owner)", "#0b6e4f"),
        ("proxy", "base + proxy (clients)", "#c8553d"),
    ):
        points = [(r["round"], r["metrics"][view][name]) for r in records if name in r["metrics"].get(view, {})]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, color=color)
        elif points:
            axes.axhline(points[0][1], linestyle=":", label=f"{label}, before", color=color)
    for style, (label, reference) in zip(("--", ":"), (references or {}).items(), strict=False):
        if name in reference:
            axes.axhline(reference[name], linestyle=style, color="#555555", label=label)
    axes.set_xlabel("round")
    axes.set_ylabel(name.removeprefix("eval_"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
