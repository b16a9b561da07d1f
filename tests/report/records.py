# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Records of rounds, as a federation writes them."""


def make_record(number: int, proxy: dict | None, server: dict | None, **changes) -> dict:
    clients = {"a": {"num_examples": 30, "loss": 2.0}, "b": {"num_examples": 10, "loss": 1.0}} if number else {}
    metrics = {name: metrics for name, metrics in (("proxy", proxy), ("server", server)) if metrics is not None}
    base = {"round": number, "clients": clients, "rejected": {}, "metrics": metrics}
    return base | {"bytes_down": 1500 * number, "bytes_up": 2500 * number, "seconds": 1.5 * number} | changes


def make_records(metric: str = "eval_accuracy", values=((0.5, 0.6), (0.7, 0.8), (0.75, 0.9))) -> list[dict]:
    return [make_record(n, {metric: proxy}, {metric: server}) for n, (proxy, server) in enumerate(values)]
