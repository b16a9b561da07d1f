# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf status`: how a federation stands, whether it runs or not."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .arguments import add_json, parse_count, print_json
from .command import Command
from .control import add_output_dir, find_federation


_CLEAR = "\x1b[H\x1b[J"  # of a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `status`."""
    add_output_dir(parser)
    parser.add_argument(
        "--watch",
        type=parse_count,
        nargs="?",
        const=2,
        metavar="SECONDS",
        help="show it again every SECONDS (default 2) for as long as the federation runs",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the state of the federation, once or again and again."""
    if arguments.json and arguments.watch:
        raise ValueError("--json goes with a single look; leave --watch out.")
    root = find_federation(arguments.output_dir)
    from ..config.metrics import MetricChoice
    from ..report.status import describe_status

    while True:
        config, status = read_status(root)
        if arguments.json:
            print_json(status)
            return
        lines = "\n".join(describe_status(status, MetricChoice.of(config)))
        print(f"{_CLEAR if arguments.watch and sys.stdout.isatty() else ''}{lines}", flush=True)
        if not arguments.watch or status["phase"] == "not running":
            return
        time.sleep(arguments.watch)


def read_status(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the state of the federation in `root`, an output_dir's `_federation`.

    Raises:
        ValueError: if there is none, or its records are damaged.
    """
    from ..processes.control import ask
    from ..report.status import summarize_status
    from ..server.store import RoundStore

    store = RoundStore(root.parent)
    live = ask(root, "status")
    if live is None and not store.exists:
        raise ValueError(f"`{root.parent}` holds no federation yet, and no process runs one there.")
    federation = store.read() if store.exists else {}
    records = store.records() if store.exists else []
    if live is None:
        return federation["config"], summarize_status(federation, records, None, store.read_dropped())
    if live["committed"] is not None:
        records = records[: live["committed"] + 1]  # not the one that was committed just now
    return federation.get("config", {}), summarize_status(federation, records, live)


COMMAND = Command(
    summary="Show how a federation stands: rounds, clients, who is slow or refused and why, bytes, time left",
    examples="  fedlpp-hf status out/            one look; without a running process, from the records on disk\n"
    "  fedlpp-hf status out/ --watch    a table that follows the rounds\n"
    "  fedlpp-hf status out/ --json     for scripts",
    add_arguments=add_arguments,
    run=run,
)
