# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How a federation stands: from its records on disk, and from the process that runs it, if there is one. No torch is needed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.metrics import MetricChoice, is_number
from ..wire.text import make_printable
from .tables import format_bytes, format_table


_ROUNDS_TIMED = 5
_SLOW = 2.0  # times the median of a round's clients
_SLOW_SECONDS = 1.0  # less than that is no news
_PHASES = {
    "joining": "clients are joining",
    "starting": "starting",
    "paused": "paused",
    "finishing": "the rounds are over; merging, auditing, reporting",
    "not running": "no process is running it",
}
# What an owner must see first.
_TROUBLE = ("refused", "slow", "away", "training", "queued", "dropped", "answered", "idle")
_MOST_CLIENTS = 40  # in a table

Record = Mapping[str, Any]


def summarize_status(
    federation: Mapping[str, Any],
    records: Sequence[Record],
    live: Mapping[str, Any] | None,
    dropped: Sequence[str] = (),
) -> dict[str, Any]:
    """The state of a federation as plain values: those of `fedlpp-hf status --json`.

    Args:
        federation: `federation.json`, or nothing if it is not there yet.
        records: Of the committed rounds, from round 0.
        live: What the process says that runs it; None if there is none.
        dropped: Clients that would not be asked, where there is none.
    """
    run: Mapping[str, Any] = live or {"phase": "not running", "dropped": dropped, "asked": {}, "refused_nodes": {}}
    num_rounds = run.get("num_rounds") or federation.get("config", {}).get("num_rounds", 0)
    rows = run.get("rows") or federation.get("clients") or {}
    committed = max(len(records) - 1, 0)
    last = records[-1] if records else {"metrics": {}}
    here = run.get("here")
    usual = _expect_seconds(run, records)
    limit = _limit_seconds(run, last)
    clients = [
        _summarize_client(client, count, records, run.get("asked", {}).get(client), limit)
        for client, count in rows.items()
    ]
    for client in clients:
        client["here"] = None if here is None else client["id"] in here
        if client["state"] == "idle":
            left_out = client["id"] in run["dropped"]
            client["state"] = "dropped" if left_out else "away" if client["here"] is False else "idle"
    privacy: Mapping[str, Any] = next((record["privacy"] for record in reversed(records) if "privacy" in record), {})
    under_way = run.get("asked", {}).values()
    return {
        "kind": "status",
        "federation_id": federation.get("federation_id"),
        "phase": run["phase"],
        "process": run.get("process"),
        "round": run.get("round"),
        "round_seconds": run.get("round_seconds"),
        "committed": committed,
        "num_rounds": num_rounds,
        "num_clients": len(rows) or run.get("num_clients"),
        "pausing": run.get("pausing", False),
        "stopping": run.get("stopping", False),
        "seconds_left": None if live is None else _estimate_left(run, usual, num_rounds, committed),
        "seconds": sum(record["seconds"] for record in records),
        "bytes_down": sum(r["bytes_down"] for r in records) + sum(c["bytes_down"] for c in under_way),
        "bytes_up": sum(r["bytes_up"] for r in records) + sum(c["bytes_up"] for c in under_way),
        "metrics": last["metrics"],
        "epsilon": privacy.get("epsilon"),
        "delta": privacy.get("delta"),
        "clients": clients,
        "dropped": sorted(run["dropped"]),
        "here": None if here is None else sorted(here),
        "refused_nodes": run["refused_nodes"],
    }


def describe_status(status: Mapping[str, Any], choice: MetricChoice | None = None) -> list[str]:
    """[`summarize_status`] as lines for a terminal; what clients said can't forge a line or move the cursor."""
    committed, num_rounds = status["committed"], status["num_rounds"]
    where = _PHASES.get(status["phase"])
    if status["round"] is not None:
        where = f"round {status['round']} of {num_rounds} under way for {format_seconds(status['round_seconds'] or 0)}"
    lines = [f"{where}; {committed} of {num_rounds} rounds committed".capitalize()]
    if status["federation_id"]:
        lines[0] = f"Federation {status['federation_id']}: {lines[0][0].lower()}{lines[0][1:]}"
    for flag, text in (("stopping", "It stops after this round."), ("pausing", "It pauses before the next round.")):
        if status[flag] and status["phase"] == "round":
            lines.append(text)
    if (process := status["process"]) is not None:
        lines.append(f"Process {process['pid']} on {process['host']}, since {process['since']}")
    if status["seconds_left"] is not None:
        lines.append(f"About {format_seconds(status['seconds_left'])} left, without the merge and the audit.")
    facts = [f"{format_bytes(status['bytes_down'])} to clients, {format_bytes(status['bytes_up'])} from clients"]
    for view, label in (("proxy", "base + proxy"), ("server", "server")):
        metrics = status["metrics"].get(view, {})
        if name := (choice or MetricChoice()).main(metrics):
            facts.append(f"{label} {name.removeprefix('eval_')} {metrics[name]:.4f}")
    if is_number(status["epsilon"]):
        delta = f" (δ = {status['delta']:g})" if is_number(status["delta"]) else ""
        facts.append(f"ε = {math.ceil(100 * status['epsilon']) / 100:.2f}{delta}")  # rounded up
    lines.append(" | ".join(facts))
    if status["clients"]:
        lines += ["", *_tabulate_clients(status["clients"])]
    elif status["here"] is not None:
        here = ", ".join(make_printable(client, 100) for client in status["here"])
        lines += ["", f"Here are {len(status['here'])} of {status['num_clients']} clients: {here or 'none yet'}"]
    for node, reason in sorted(status["refused_nodes"].items()):
        lines.append(f"Node {node} is refused: {make_printable(reason)}")
    return lines


def format_seconds(seconds: float) -> str:
    """A time in the two largest units that it has."""
    whole = round(seconds)
    for unit, name, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {below}" if rest else "")
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def _summarize_client(
    client: str, rows: int | None, records: Sequence[Record], now: Mapping[str, Any] | None, limit: float
) -> dict[str, Any]:
    costs = [(record, record["traffic"][client]) for record in records if client in record.get("traffic", {})]
    refused = [record for record in records if client in record["rejected"]]
    seconds, state = costs[-1][1]["seconds"] if costs else None, "idle"
    reason = refused[-1]["rejected"][client] if refused else None
    reason_round = refused[-1]["round"] if refused else None
    if now is not None:
        state, seconds = now["state"], now["seconds"]
        if now["reason"] is not None:
            reason, reason_round = now["reason"], None
    return {
        "id": client,
        "rows": rows,
        "state": state,
        "asked": len(costs) + (now is not None),
        "accepted": sum(client in record["clients"] for record in records),
        "refused": len(refused),
        "reason": reason,
        "reason_round": reason_round,
        "seconds": seconds,
        "slow": seconds is not None and seconds > limit,
        "bytes_down": sum(cost["bytes_down"] for _, cost in costs) + (now["bytes_down"] if now else 0),
        "bytes_up": sum(cost["bytes_up"] for _, cost in costs) + (now["bytes_up"] if now else 0),
    }


def _limit_seconds(run: Mapping[str, Any], last: Record) -> float:
    """From when on a client counts as slow: against those that have answered in this round, else against the last one's."""
    asked = run.get("asked", {}).values()
    times = [client["seconds"] for client in asked if client["state"] in ("answered", "refused")]
    times = times or [cost["seconds"] for cost in last.get("traffic", {}).values() if cost["seconds"] is not None]
    median = statistics.median(times) if times else float("inf")
    return max(_SLOW * median, median + _SLOW_SECONDS)


def _expect_seconds(run: Mapping[str, Any], records: Sequence[Record]) -> float | None:
    """How long a round takes: as this run measured it, evaluation included; before that, as the records say."""
    if run.get("usual_seconds") is not None:
        return run["usual_seconds"]
    times = [record["seconds"] for record in records if record["round"]][-_ROUNDS_TIMED:]
    return statistics.median(times) if times else None


def _estimate_left(run: Mapping[str, Any], usual: float | None, num_rounds: int, committed: int) -> float | None:
    if usual is None or run["phase"] == "finishing":
        return None
    rounds = int(run["round"] is not None) if run.get("stopping") else num_rounds - committed
    return max(rounds * usual - min(run.get("round_seconds") or 0, usual), 0.0)


def _tabulate_clients(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    def urgency(client: Mapping[str, Any]) -> tuple[int, str]:
        trouble = "slow" if client["slow"] and client["state"] == "training" else client["state"]
        return _TROUBLE.index(trouble), client["id"]

    rows = [["client", "state", "accepted", "time", "down", "up", "last refusal"]]
    for client in sorted(clients, key=urgency)[:_MOST_CLIENTS]:
        reason = "" if client["reason"] is None else make_printable(client["reason"], 100)
        if client["reason_round"] is not None:
            reason = f"round {client['reason_round']}: {reason}"
        state = client["state"] + (", slow" if client["slow"] else "")
        if client["here"] is False and client["state"] != "away":
            state += ", not connected"
        times = "" if client["seconds"] is None else format_seconds(client["seconds"])
        sizes = format_bytes(client["bytes_down"]), format_bytes(client["bytes_up"])
        name = make_printable(client["id"], 40)
        rows.append([name, state, f"{client['accepted']} of {client['asked']}", times, *sizes, reason])
    lines = format_table(rows)
    if len(clients) > _MOST_CLIENTS:
        lines.append(f"… and {len(clients) - _MOST_CLIENTS} more clients, less urgent; `--json` has all.")
    return lines
