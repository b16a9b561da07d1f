# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What every command of `fedlpp-hf` consists of, and the parser that they share."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..config.spelling import suggest


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
        self.commands: dict[str, CommandParser] = {}

    def error(self, message: str) -> NoReturn:
        """Report wrong arguments and exit with code 2."""
        end = "" if message.endswith((".", "?")) else "."
        fail(2, f"error: {message}{end} See `{self.prog} --help`.")

    def list_options(self) -> dict[str, argparse.Action]:
        """The options, without dashes."""
        return {name[2:]: action for name, action in self._option_string_actions.items() if name.startswith("--")}

    def check_options(self, arguments: Sequence[str], strict: bool) -> None:
        """Report the first mistyped option, before anything that may be missing because of it.

        Args:
            arguments: those of this command.
            strict: an unknown option is an error. Otherwise it may belong to the federation's configuration, unless it
                looks like a required option that is missing.
        """
        options = self.list_options()
        words = [
            argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--") and argument != "--"
        ]
        known = (
            options if strict else [name for name, action in options.items() if action.required and name not in words]
        )
        for word in words:
            hint = suggest(word, known, "--")
            if word not in options and (strict or hint != "."):
                self.error(f"unrecognized arguments: --{word}{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            message = f"invalid choice: {value!r} (choose from {', '.join(choices)}){suggest(str(value), choices)}"
            raise argparse.ArgumentError(action, message)


def use_underscores(argument: str) -> str:
    """Rewrite `--base-dir` as `--base_dir`: both spellings work, as in the parsers of transformers."""
    option, equals, value = argument.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


def fail(code: int, message: str) -> NoReturn:
    """Print one line to standard error and exit with `code`."""
    print(f"fedlpp-hf: {message}", file=sys.stderr)
    sys.exit(code)
