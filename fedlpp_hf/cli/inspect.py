# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf inspect`: show what a directory contains."""

import argparse

from .arguments import check_directory
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    parser.add_argument("directory", help="a base, an adapter, or the output_dir of a federation")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verify", action="store_true", help="compare every file of a base with its manifest")


def run(arguments: argparse.Namespace) -> None:
    """Print a description of the directory."""
    check_directory(arguments.directory)
    from ..report.inspection import describe_directory

    print("\n".join(describe_directory(arguments.directory, arguments.tensors, arguments.verify)))


COMMAND = Command(
    summary="Show what a base, an adapter or a federation contains, and how much of it clients receive",
    examples="  fedlpp-hf inspect base/ --verify       a base: what clients receive, what of it in full precision; check every file\n"
    "  fedlpp-hf inspect adapter/ --tensors   an adapter: every tensor, and the bytes of a broadcast at 1 to 32 bits\n"
    "  fedlpp-hf inspect out/                 a federation: its rounds",
    add_arguments=add_arguments,
    run=run,
)
