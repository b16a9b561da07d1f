# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The configuration of an adapter from elsewhere, checked before PEFT builds what it says and matches what it matches."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..base.contents import PATTERN_SIGNS


if TYPE_CHECKING:
    from peft import PeftConfig


_LARGEST_RANK = 1 << 16
_LARGEST_ALPHA = 1e9
_MOST_LAYERS = 10_000
_STEPS_DIGITS = 3  # of an initialization's steps; each is a decomposition of all weights
_MORE_NAMES = 1000  # than the model has modules
_LONGEST_PATTERNS = 1 << 18  # characters, in all; to compile them takes some seconds
_SECONDS = 5.0
# `re` itself, since another engine may be quick where it is not; apart, since nothing else stops it in time.
_MATCHER = """\
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match("(.*\\\\.)?(" + pattern + ")$", name)
        re.match("(?:^|.*?\\\\.)" + pattern + "($|\\\\..*)", name)
"""


def check_foreign_config(config: "PeftConfig", modules: Sequence[str]) -> None:
    """Refuse an adapter's configuration with values that no training writes, or patterns that never end.

    Args:
        config: Of the adapter.
        modules: Names of the model's modules, which PEFT matches patterns with.

    Raises:
        ValueError: naming the field.
    """
    from peft import PeftType

    if config.peft_type == PeftType.LORA:
        for name, value, expected, right in _judge_fields(config):
            if not right:
                raise ValueError(f"adapter_config.json has {name}={value!r:.80}; expected {expected}.")
    for name in ("r", "init_r"):  # what PEFT builds of other kinds has this size, too
        value = getattr(config, name, None)
        if type(value) is int and value > _LARGEST_RANK:
            raise ValueError(f"adapter_config.json has {name}={value!r:.80}; expected at most {_LARGEST_RANK}.")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters"):
        value = getattr(config, name, None)  # PEFT compares each with each module
        if isinstance(value, list | tuple | set) and len(value) > len(modules) + _MORE_NAMES:
            raise ValueError(f"adapter_config.json has {len(value)} {name}; the model has {len(modules)} modules.")
    check_patterns(_list_patterns(config), modules)


def _judge_fields(config: Any) -> Iterator[tuple[str, Any, str, bool]]:
    """Each field with its value, what is expected, and whether that is so."""
    rank, alpha = f"a whole number from 1 to {_LARGEST_RANK}", "a finite number"
    yield "r", config.r, rank, _is_rank(config.r)
    start = getattr(config, "init_lora_weights", True)
    yield "init_lora_weights", start, "a name, true or false", start is None or isinstance(start, bool | str)
    # PEFT makes these weights again when it loads the adapter.
    steps = str(start).removeprefix("pissa_niter_")
    right = steps == str(start) or (steps.isdecimal() and len(steps) <= _STEPS_DIGITS)
    yield "init_lora_weights", start, f"steps of {_STEPS_DIGITS} digits", right
    loftq = getattr(config, "loftq_config", None) or {}
    turns: Any = loftq.get("loftq_iter", 1) if isinstance(loftq, dict) else None
    right = type(turns) is int and 0 <= turns < 10**_STEPS_DIGITS
    yield "loftq_config", loftq, f"a loftq_iter of {_STEPS_DIGITS} digits", right
    yield "lora_alpha", config.lora_alpha, alpha, _is_alpha(config.lora_alpha)
    for name, check, expected in (("rank_pattern", _is_rank, rank), ("alpha_pattern", _is_alpha, alpha)):
        pattern = getattr(config, name)
        right = isinstance(pattern, dict) and all(isinstance(k, str) and check(v) for k, v in pattern.items())
        yield name, pattern, f"names, each with {expected}", right
    replicated = config.layer_replication or []
    right = isinstance(replicated, list) and all(_is_range(part) for part in replicated)
    right = right and sum(end - start for start, end in replicated) <= _MOST_LAYERS
    yield "layer_replication", config.layer_replication, f"ranges of at most {_MOST_LAYERS} layers in all", right


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_ALPHA  # which NaN is not


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and [type(place) for place in value] == [int, int]
        and 0 <= value[0] <= value[1] <= _MOST_LAYERS
    )


def check_patterns(patterns: Iterable[tuple[str, str]], modules: Sequence[str]) -> None:
    """Match patterns with the names of modules, as PEFT does, in a process that is ended when it takes too long.

    Args:
        patterns: Each with the field of adapter_config.json that it is from.
        modules: Names of the modules.

    Raises:
        ValueError: for a pattern that is no regular expression, or takes too long.
    """
    found = [(name, pattern) for name, pattern in patterns if PATTERN_SIGNS.search(pattern)]
    if not found:
        return
    if (length := sum(len(pattern) for _, pattern in found)) > _LONGEST_PATTERNS:
        raise ValueError(
            f"adapter_config.json has regular expressions of {length} characters; expected at most {_LONGEST_PATTERNS}. Name the "
            "modules in a list."
        )
    for name, pattern in found:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"adapter_config.json has {name}={pattern!r:.80}, no regular expression ({error})."
            ) from None
    question = json.dumps([[pattern for _, pattern in found], list(modules)])
    try:
        subprocess.run([sys.executable, "-I", "-c", _MATCHER], input=question.encode(), timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        names = ", ".join(sorted({name for name, _ in found}))
        raise ValueError(
            f"adapter_config.json has a regular expression in {names} that took more than {_SECONDS:.0f} s on this model's "
            f"{len(modules)} modules, and may never end ({found[0][1]!r:.80}). Name the modules in a list."
        ) from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"The patterns of adapter_config.json can't be matched ({error}).") from error


def _list_patterns(config: "PeftConfig") -> Iterator[tuple[str, str]]:
    """What PEFT takes for regular expressions: a string for all modules, and the keys and names of patterns."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            yield name, value
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        value = getattr(config, name, None) or ()
        if not isinstance(value, str | list | tuple | set | dict):
            raise ValueError(f"adapter_config.json has {name}={value!r:.80}; expected names.")
        for pattern in [value] if isinstance(value, str) else value:
            yield name, str(pattern)
