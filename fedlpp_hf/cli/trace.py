# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf trace`: find out whose copy of a base a model came from."""

import argparse
import os
from pathlib import Path

from .arguments import check_full_model, check_readable_model
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trace`."""
    parser.add_argument("suspect", help="directory or Hub id of a base, or of a model that may be made from one")
    parser.add_argument("--key", required=True, metavar="FILE", help="the key file of `quantize --mark`")
    parser.add_argument("--full_model", help="directory or Hub id of the full model, if it has moved")
    parser.add_argument(
        "--false_alarm", type=float, default=1e-6, help="chance of accusing an innocent client (default 1e-6)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.base.marking.trace_base`] and print a table of all clients."""
    if not 0 < arguments.false_alarm < 1:
        raise ValueError(f"--false_alarm {arguments.false_alarm}: expected a chance between 0 and 1.")
    from ..base.mark_keys import MarkKey
    from ..base.shards import read_shards

    key = MarkKey.read(arguments.key)
    check_full_model(arguments.suspect)
    if os.path.isdir(arguments.suspect):  # which may be quantized
        read_shards(Path(arguments.suspect))
    check_readable_model(arguments.full_model or key.full_model)
    from ..base.marking import trace_base
    from ..report.tables import format_table

    found = trace_base(arguments.suspect, key, arguments.full_model)
    rows = [["client", "agreement", "score", "chance of a false alarm", ""]]
    for trace in found:
        guilty = "came from here" if trace.false_alarm <= arguments.false_alarm else ""
        chance = "below 1e-300" if trace.false_alarm < 1e-300 else f"{trace.false_alarm:.1e}"
        rows.append([trace.client, f"{trace.correlation:.0%}", f"{trace.score:.1f}", chance, guilty])
    print("\n".join(format_table(rows)))
    if not any(row[-1] for row in rows):
        print(f"No copy was recognized at a false alarm of {arguments.false_alarm:g}.")


COMMAND = Command(
    summary="Find out whose copy of a base a model came from",
    examples="  fedlpp-hf trace suspect/ --key marks.json        merged, fine-tuned, requantized or pruned meanwhile\n"
    "  fedlpp-hf quantize models/full base-a/ --mark hospital-a --key marks.json   made the copies, one for each client",
    add_arguments=add_arguments,
    run=run,
)
