# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Dataclasses filled from a YAML file and the command line."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_args(dataclass_types: Sequence[type], args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Dataclass instances from `--config FILE.yaml`, with every flag on the command line overriding the file.

    `args` defaults to the command line.

    Raises:
        ValueError: for a key that no dataclass knows, with the nearest known one, or a file that is no mapping.
    """
    args = list(sys.argv[1:] if args is None else args)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)  # `--num_round` is a typo, not an abbreviation
    known = [entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type) if entry.init]
    if "--config" in args:
        place = args.index("--config")
        if place + 1 == len(args):
            raise ValueError("--config was given without a file; expected --config FILE.yaml.")
        values = read_yaml(args[place + 1])
        del args[place : place + 2]
        for key in values:
            if key not in known:
                raise ValueError(f"The config has an unknown key `{key}`{_nearest(str(key), known)}.")
        # A required argument that the file gives must not be asked for again on the command line.
        for action in parser._actions:
            if action.dest in values:
                action.required = False
        parser.set_defaults(**{key: _as_flag(value) for key, value in values.items()})
    *instances, rest = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    for flag in rest:
        if flag.startswith("-"):
            name = flag.lstrip("-").split("=")[0].replace("-", "_")
            raise ValueError(f"Unknown option `{flag}`{_nearest(name, known)}")
    if rest:
        raise ValueError(f"Unexpected arguments: {' '.join(rest)}.")
    return tuple(instances)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: if it is missing, malformed or something else.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The config `{path}` can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The config `{path}` is no valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"The config `{path}` holds a {type(values).__name__}; expected `key: value` lines.")
    return values


def _as_flag(value: Any) -> Any:
    # argparse converts strings only, and YAML 1.1 reads 1e-3 as a string but 0.001 as a number.
    return value if isinstance(value, (bool, list, dict)) or value is None else str(value)


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f"; did you mean `{match[0]}`?" if match else "."
