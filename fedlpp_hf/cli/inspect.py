# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf inspect`: show what a directory contains."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from .arguments import add_json, check_directory, print_json
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    parser.add_argument("directory", help="a base, an adapter, or the output_dir of a federation")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verify", action="store_true", help="compare every file of a base with its manifest")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print a description of the directory. That of a base needs no torch, and comes at once."""
    check_directory(arguments.directory)
    from ..base.manifest import BASE_MANIFEST

    if os.path.isfile(os.path.join(arguments.directory, BASE_MANIFEST)):
        from ..report import base_inspection

        describe: Callable[..., list[str]] = base_inspection.describe_base
        summarize: Callable[..., dict[str, Any]] = base_inspection.summarize_base
    else:
        from ..report.inspection import describe_directory
        from ..report.values import summarize_directory

        describe, summarize = describe_directory, summarize_directory
    options = arguments.directory, arguments.tensors, arguments.verify
    if arguments.json:
        print_json(summarize(*options))
    else:
        print("\n".join(describe(*options)))


COMMAND = Command(
    summary="Show what a base, an adapter or a federation contains, and how much of it clients receive",
    examples="  fedlpp-hf inspect base/ --verify       a base: what clients receive, what of it in full precision; check every file\n"
    "  fedlpp-hf inspect adapter/ --tensors   an adapter: every tensor, and the bytes of a broadcast at 1 to 32 bits\n"
    "  fedlpp-hf inspect out/                 a federation: its rounds",
    add_arguments=add_arguments,
    run=run,
)
