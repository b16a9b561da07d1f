# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What every command of `fedlpp-hf` consists of, and the parser that they share."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Command:
    """One command of `fedlpp-hf`: each file of this folder that is listed in `main.COMMANDS` defines one as `COMMAND`.

    `run` imports what it needs only after it has checked its arguments: `--help` and typing errors must not wait for torch.

    Args:
        summary: one sentence without a full stop, for the list of commands and the command's own help.
        examples: command lines with a comment each, for the command's own help.
        add_arguments: adds the command's arguments to its parser.
        run: does the work; receives the parsed arguments.
        takes_flags: whether options unknown to the parser belong to the federation's configuration; they become `flags`.
    """

    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    takes_flags: bool = False


class CommandParser(argparse.ArgumentParser):
    """A parser that knows no abbreviations and reports an error in one line."""

    def __init__(self, **options: Any):
        # An abbreviation that is unique today may fit two options tomorrow.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Report wrong arguments and exit with code 2."""
        fail(2, f"error: {message}. See `{self.prog} --help`.")


def use_underscores(argument: str) -> str:
    """Rewrite `--base-dir` as `--base_dir`: both spellings work, as in the parsers of transformers."""
    option, equals, value = argument.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


def fail(code: int, message: str) -> NoReturn:
    """Print one line to standard error and exit with `code`."""
    print(f"fedlpp-hf: {message}", file=sys.stderr)
    sys.exit(code)
