# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf pause`: let a running federation wait before its next round."""

import argparse

from .command import Command
from .control import add_output_dir, command_run


def run(arguments: argparse.Namespace) -> None:
    """Tell the process, and print what it will do."""
    number = command_run(arguments.output_dir, "pause")["round"]
    print("It waits before its next round." if number is None else f"It waits once round {number} is committed.")
    print(f"Go on: fedlpp-hf resume {arguments.output_dir}")


COMMAND = Command(
    summary="Let a running federation wait before its next round; clients stay connected",
    examples="  fedlpp-hf pause out/    until `fedlpp-hf resume out/`",
    add_arguments=add_output_dir,
    run=run,
)
