# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The file that a federation's configuration names as its `trainer`: found before anything heavy is imported."""

import os
from pathlib import Path

from ..config.yaml_files import read_yaml


def read_reference(config: str | os.PathLike) -> str:
    """The `trainer` of a federation's YAML file; empty where it names none."""
    return str(read_yaml(config).get("trainer", ""))


def find_trainer(reference: str, directory: Path) -> tuple[Path, str]:
    """The file and the function that `FILE.py:FUNCTION` names; the path is relative to `directory`.

    Raises:
        ValueError: if there is no such file.
    """
    file, _, name = reference.partition(":")
    path = (directory / file).resolve()
    if not file.endswith(".py") or not path.is_file():
        raise ValueError(f"trainer={reference!r}; expected FILE.py:FUNCTION with a file relative to `{directory}`.")
    return path, name
