# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's state in Prometheus' text format, version 0.0.4: numbers and client ids, no path and no text of a client's.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..config.metrics import is_number
from ..wire.text import make_printable


MOST_CLIENTS = 100  # with lines of their own: each is a time series in Prometheus
_MOST_LETTERS = 100  # of a label
_PHASES = ("joining", "starting", "round", "paused", "finishing")
_STATES = ("idle", "queued", "training", "answered", "refused", "away", "dropped")

Sample = tuple[dict[str, str], Any]


def render_metrics(status: Mapping[str, Any]) -> str:
    """The values of [`summarize_status`] that are numbers, as a page for Prometheus; what is not known is left out."""
    return "".join(
        f"{line}\n"
        for name, kind, text, samples in _list_metrics(status)
        for line in _write(name, kind, text, samples)
    )


def _list_metrics(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, list[Sample]]]:
    clients = status["clients"]

    def one(value: Any) -> list[Sample]:
        return [({}, value)]

    yield "rounds_committed", "gauge", "Rounds on disk, without round 0.", one(status["committed"])
    yield "rounds", "gauge", "Rounds that were asked for.", one(status["num_rounds"])
    phases: list[Sample] = [({"phase": phase}, int(status["phase"] == phase)) for phase in _PHASES]
    yield "phase", "gauge", "1 for what the process is at.", phases
    yield "pausing", "gauge", "1 if it pauses before the next round, or is paused.", one(int(status["pausing"]))
    yield "stopping", "gauge", "1 if the round under way is the last of this run.", one(int(status["stopping"]))
    yield "round_elapsed_seconds", "gauge", "How long the round under way has taken.", one(status["round_seconds"])
    yield "left_seconds", "gauge", "Estimate until the last round is committed.", one(status["seconds_left"])
    yield "sent_bytes_total", "counter", "Bytes to clients in all rounds.", one(status["bytes_down"])
    yield "received_bytes_total", "counter", "Bytes of accepted updates in all rounds.", one(status["bytes_up"])
    yield "epsilon", "gauge", "Privacy spent, if noise is added.", one(status["epsilon"])
    here = None if status["here"] is None else len(status["here"])
    yield "clients_connected", "gauge", "Clients that are connected and have the base.", one(here)
    yield "nodes_refused", "gauge", "Connected nodes that were refused.", one(len(status["refused_nodes"]))
    states: list[Sample] = [
        ({"state": state}, sum(client["state"] == state for client in clients)) for state in _STATES
    ]
    yield "clients", "gauge", "Clients by state.", states
    yield "clients_slow", "gauge", "Clients that take over twice the median.", one(sum(c["slow"] for c in clients))
    measured: list[Sample] = [
        ({"view": view, "name": name}, value)
        for view, metrics in sorted(status["metrics"].items())
        for name, value in metrics.items()
    ]
    yield "metric", "gauge", "Metrics of the last committed round.", measured
    shown = sorted(clients, key=lambda client: (-client["refused"], client["id"]))[:MOST_CLIENTS]
    yield (
        "clients_not_shown",
        "gauge",
        f"Clients beyond the {MOST_CLIENTS} with lines below.",
        one(len(clients) - len(shown)),
    )
    for name, key, kind, text in (
        ("client_accepted_total", "accepted", "counter", "Accepted updates of a client."),
        ("client_refused_total", "refused", "counter", "Rounds in which a client was refused or silent."),
        ("client_seconds", "seconds", "gauge", "A client's time in this round, or in its last one."),
    ):
        yield name, kind, text, [({"client": client["id"]}, client[key]) for client in shown]


def _write(name: str, kind: str, text: str, samples: list[Sample]) -> Iterator[str]:
    known = [(labels, value) for labels, value in samples if is_number(value) or isinstance(value, bool)]
    if not known:
        return
    yield f"# HELP fedlpp_{name} {text}"
    yield f"# TYPE fedlpp_{name} {kind}"
    seen: set[tuple[str, ...]] = set()
    for labels, value in known:
        shown = {label: make_printable(str(entry), _MOST_LETTERS) for label, entry in labels.items()}
        if (key := tuple(shown.values())) not in seen:  # two long names may look alike; a series may be there once
            seen.add(key)
            inner = ",".join(f'{label}="{_escape(entry)}"' for label, entry in shown.items())
            yield f"fedlpp_{name}{{{inner}}} {_number(value)}" if inner else f"fedlpp_{name} {_number(value)}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: Any) -> str:
    text = repr(float(value)) if isinstance(value, float) else str(int(value))
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text, text)
