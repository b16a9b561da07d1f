# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""YAML files, read strictly. It needs neither torch nor transformers."""

import os
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"`{key}` stands {keys.count(key)} times in it; expected one line for each key.")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: if it is missing, malformed or something else.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"The config `{path}` can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The config `{path}` is not text in UTF-8 ({error}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The config `{path}` is no valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"The config `{path}` is wrong: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"The config `{path}` holds a {type(values).__name__}; expected `key: value` lines.")
    return values
