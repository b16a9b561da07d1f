# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf drop`: stop asking a client, or ask it again."""

import argparse

from .command import Command
from .control import add_output_dir, command_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `drop`."""
    add_output_dir(parser)
    parser.add_argument("client", help="its id, as `fedlpp-hf status` shows it")
    parser.add_argument("--undo", action="store_true", help="ask it again")


def run(arguments: argparse.Namespace) -> None:
    """Tell the process, and print who is dropped now."""
    answer = command_run(arguments.output_dir, "drop", client=arguments.client, undo=arguments.undo)
    print(f"From round {answer['next_round']} on, not asked: {', '.join(answer['dropped']) or 'nobody'}.")


COMMAND = Command(
    summary="Stop asking a client, from the next round on; the draws of the others stay as they are",
    examples="  fedlpp-hf drop out/ hospital-a           a resumed federation knows it, too\n"
    "  fedlpp-hf drop out/ hospital-a --undo    ask it again",
    add_arguments=add_arguments,
    run=run,
)
