# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What `status`, `stop`, `pause`, `resume` and `drop` share: they reach the process that runs a federation."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import check_directory


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    """Add `output_dir`."""
    parser.add_argument("output_dir", help="the federation's output_dir, on this machine")


def find_federation(output_dir: str) -> Path:
    """The directory of the federation's state in `output_dir`.

    Raises:
        ValueError: if there is none.
    """
    from ..server.store import FEDERATION_DIR

    check_directory(output_dir)
    path = Path(output_dir).absolute()
    root = path if path.name == FEDERATION_DIR else path / FEDERATION_DIR
    if not root.is_dir():
        raise ValueError(f"`{output_dir}` holds no federation (no {FEDERATION_DIR}); expected the output_dir of one.")
    return root


def command_run(output_dir: str, command: str, **values: Any) -> dict[str, Any]:
    """Send a command to the process that runs the federation in `output_dir`.

    Raises:
        ValueError: if there is no such process, or it refuses the command.
        RuntimeError: if it belongs to another user, or does not answer.
    """
    from ..processes.control import ask

    answer = ask(find_federation(output_dir), command, **values)
    if answer is None:
        raise ValueError(
            f"No process runs a federation in `{output_dir}`, so there is nothing to {command}. A federation that has ended early "
            "goes on when it is started again with --resume_from_checkpoint true."
        )
    return answer
