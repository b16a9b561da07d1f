# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Arguments and checks that several commands share. Nothing here imports torch before it must."""

import argparse
import os
import re
from typing import Any


# As in `fedlpp_hf.tensors.quantization`, whose import loads torch.
BITS = ("1", "ternary", "2", "3", "4", "8")
_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_visibility(parser: argparse.ArgumentParser) -> None:
    """Add `--public` and `--allow_public`."""
    parser.add_argument("--public", action="store_true", help="if the repository is created, make it public")
    parser.add_argument(
        "--allow_public", action="store_true", help="allow a public repository even if the full model is not public"
    )


def parse_size(text: str) -> int:
    """Convert a size such as `2GB` to bytes; units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)b?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected bytes, or a number with kB, MB, GB or TB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def parse_count(text: str) -> int:
    """Convert a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def check_directory(path: str) -> None:
    """
    Raises:
        ValueError: if `path` is not a directory.
    """
    if not os.path.isdir(path):
        raise ValueError(f"`{path}` is not a directory.")


def find_model_class(name: str | None) -> Any:
    """The class of transformers called `name`; None for None.

    Raises:
        ValueError: if transformers has no model class of that name.
    """
    if name is None:
        return None
    import transformers

    found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(f"transformers has no model class `{name}`; expected one like AutoModelForCausalLM.")
    return found
