# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The YAML metadata at the head of a model card, read as the Hub reads them."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK


class _Loader(yaml.SafeLoader):
    """Text, but for `true`, `false` and `null`.

    PyYAML's own rules are YAML 1.1's, by which the language `no` is false, a tag 2024-01-01 a date, and 16:9 a number. The
    Hub reads YAML 1.2, and what is kept of a card is text.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_metadata(card: Path) -> dict[str, Any]:
    """Read the metadata of a model card; empty where it has none.

    Raises:
        ValueError: if they are not valid YAML, or not keys with values.
    """
    found = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig"))
    if found is None:
        return {}
    try:
        metadata = yaml.load(found.group(2), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError(f"it is a {type(metadata).__name__}, not keys with values")
    return metadata or {}
