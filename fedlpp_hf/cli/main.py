# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The entry point `fedlpp-hf`: the list of commands, their parser, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..config.spelling import name_options
from .arguments import explain_missing
from .command import Command, CommandParser, fail, use_underscores


# The files of this folder that define a command, in the order of `fedlpp-hf --help`.
COMMANDS = (
    "merge", "quantize", "inspect", "advise", "audit", "trace", "push", "server", "client", "status", "pause", "resume", "stop",
    "drop",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run a command: exit with code 2 and one line if the user's input is wrong, with code 130 after ^C.

    Args:
        argv: the arguments; by default those of the process.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    command: Command = arguments.command
    try:
        command.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(130, "interrupted")
    except BrokenPipeError:  # `| head` has seen enough; the interpreter's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RuntimeError, OSError) as error:
        if arguments.traceback:
            raise
        options = arguments.parser.list_options()
        message = name_options(
            " ".join(str(error).split()), options, [name for name in options if options[name].nargs == 0]
        )
        fail(2, f"error: {message}")
    except ModuleNotFoundError as error:
        if arguments.traceback or (hint := explain_missing(error.name)) is None:
            raise
        fail(2, f"error: {hint}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `fedlpp-hf`; what is wrong with them ends the process with code 2 and one line."""
    parser = build_parser()
    argv = [use_underscores(argument) for argument in argv]
    place = next((place for place, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    parser.check_options(argv[:place], strict=True)
    if place < len(argv) and argv[place] in parser.commands:
        subparser = parser.commands[argv[place]]
        subparser.check_options(argv[place + 1 :], strict=not subparser.get_default("command").takes_flags)
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command.takes_flags:
        arguments.flags = flags
    elif flags:
        arguments.parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return arguments


def build_parser() -> CommandParser:
    """Build the parser of `fedlpp-hf` with all its commands."""
    parser = CommandParser(
        prog="fedlpp-hf",
        description="Federated LoRA: clients train on a quantized base, the owner keeps the full-precision model.",
        epilog="`fedlpp-hf COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        command: Command = import_module(f".{name}", __package__).COMMAND
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}.",
            epilog=f"examples:\n{command.examples}",
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command, parser=subparser)
        subparser.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        parser.commands[name] = subparser
    return parser


if __name__ == "__main__":
    main()
