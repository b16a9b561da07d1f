# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf stop`: end a running federation after the round under way."""

import argparse

from .command import Command
from .control import add_output_dir, command_run


def run(arguments: argparse.Namespace) -> None:
    """Tell the process, and print what it will do."""
    number = command_run(arguments.output_dir, "stop")["round"]
    print(f"Round {number} is the last of this run. Then come merge and report; resume it later for the other rounds.")


COMMAND = Command(
    summary="End a running federation after the round under way, as if that were its last one",
    examples="  fedlpp-hf stop out/    publishes, merges and reports; --resume_from_checkpoint true goes on later",
    add_arguments=add_output_dir,
    run=run,
)
