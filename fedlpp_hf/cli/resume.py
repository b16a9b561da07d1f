# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf resume`: go on after `pause`."""

import argparse

from .command import Command
from .control import add_output_dir, command_run


def run(arguments: argparse.Namespace) -> None:
    """Tell the process."""
    command_run(arguments.output_dir, "resume")
    print("It goes on.")


COMMAND = Command(
    summary="Let a paused federation go on",
    examples="  fedlpp-hf resume out/    after `pause`. One whose process has ended is started again with\n"
    "                           --resume_from_checkpoint true",
    add_arguments=add_output_dir,
    run=run,
)
