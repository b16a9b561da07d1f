# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Dataclasses filled from a YAML file and the command line."""

import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .spelling import name_options, suggest
from .yaml_files import read_yaml


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong value in one line, without the usage of hundreds of options before it."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def parse_args(
    dataclass_types: Sequence[type], args: Sequence[str] | None = None, *, other_options: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Dataclass instances from `--config FILE.yaml`, with every flag on the command line overriding the file.

    Args:
        dataclass_types: whose fields are the options.
        args: the arguments; by default those of the process.
        other_options: of the command, parsed already; a mistyped one may mean one of them.

    Raises:
        ValueError: for an unknown key, with the nearest known one, a value of the wrong type, options that do not go
            together, or a file without a mapping.
    """
    args = list(sys.argv[1:] if args is None else args)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser = _Parser(dataclass_types, allow_abbrev=False)  # `--num_round` is a typo, not an abbreviation
    known = [entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type) if entry.init]
    if "--config" in args:
        place = args.index("--config")
        if place + 1 == len(args):
            raise ValueError("--config was given without a file; expected --config FILE.yaml.")
        values = read_yaml(args[place + 1])
        del args[place : place + 2]
        for key in values:
            if key not in known:
                raise ValueError(f"The config has an unknown key `{key}`{suggest(str(key), known)}")
            _check_type(key, values[key], dataclass_types)
        # A required argument that the file gives must not be asked for again on the command line.
        for action in parser._actions:
            if action.dest in values:
                action.required = False
        parser.set_defaults(**{key: _as_flag(value) for key, value in values.items()})
    try:
        *instances, rest = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    except ValueError as error:
        raise ValueError(name_options(str(error), known)) from error
    for flag in rest:
        if flag.startswith("-"):
            name = flag.lstrip("-").split("=")[0].replace("-", "_")
            raise ValueError(f"Unknown option `{flag}`{suggest(name, [*known, *other_options], '--')}")
    if rest:
        raise ValueError(f"Unexpected arguments: {' '.join(rest)}.")
    return tuple(instances)


def _as_flag(value: Any) -> Any:
    # argparse converts strings only, and YAML 1.1 reads 1e-3 as a string but 0.001 as a number.
    return value if isinstance(value, (bool, list, dict)) or value is None else str(value)


def _check_type(key: str, value: Any, dataclass_types: Sequence[type]) -> None:
    """Refuse what argparse would take as it is, because it is not text: true, null, a list or a mapping."""
    hints = next(hints for kind in dataclass_types if key in (hints := typing.get_type_hints(kind)))
    allowed = set(_list_types(hints[key]))
    if Any in allowed or not (value is None or isinstance(value, bool | list | dict)):
        return
    if type(value) not in allowed and not (isinstance(value, list) and tuple in allowed):
        given = (
            {None: "nothing", True: "true", False: "false"}.get(value) if not isinstance(value, list | dict) else value
        )
        names = " or ".join(
            sorted(kind.__name__ for kind in allowed if kind is not NoneType and hasattr(kind, "__name__"))
        )
        raise ValueError(f"The config has `{key}: {given}`; expected a value of type {names}.")


def _list_types(hint: Any) -> list[Any]:
    """The types of a union, each without its parameters."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return [kind for part in typing.get_args(hint) for kind in _list_types(part)]
    if typing.get_origin(hint) is typing.Literal:
        return [type(value) for value in typing.get_args(hint)]
    return [typing.get_origin(hint) or hint]
