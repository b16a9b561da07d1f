# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over a network from the YAML of one in process: its settings, its trainer and its rows."""

import importlib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.arguments import parse_args, read_yaml
from ..config.federated import FederatedConfig


@dataclass
class RemoteConfig:
    """Settings of a federation over a network, in the same file as those of [`FederatedConfig`]."""

    trainer: str = field(
        metadata={
            "help": "FILE.py:FUNCTION (the file relative to the config's) that makes the trainer. It is called with its "
            "own arguments (a dataclass, read from the same config), the FederatedConfig, `model` and `train_dataset`: a "
            "mapping of client ids to rows, or None on the server."
        }
    )
    base: str | None = field(
        default=None,
        metadata={"help": "Server: a base that is exported already, where no full model is given."},
    )
    join_timeout: float = field(
        default=900.0, metadata={"help": "Seconds that the server waits for `num_clients` clients and their bases."}
    )
    lost_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds without a sign of life after which a client is given up for a round."},
    )
    task_retries: int = field(
        default=0, metadata={"help": "How often a task without an answer is sent again before the round closes."}
    )
    chunk_megabytes: int = field(default=32, metadata={"help": "Size of the pieces in which the base is sent."})


def load_trainer(
    config: str | os.PathLike,
    flags: Sequence[str],
    *,
    model: str | None,
    train_dataset: Mapping[str, Any] | None,
    **overrides: Any,
) -> tuple[Any, RemoteConfig]:
    """The trainer that `config` names, made with this side's model and rows; `overrides` replace arguments of the run.

    `model` defaults to the full model of the configuration, or else to its base.

    Raises:
        ValueError: if the configuration has no usable `trainer`.
    """
    make_trainer = load_function(str(read_yaml(Path(config)).get("trainer", "")), Path(config).parent)
    types = typing.get_type_hints(make_trainer)
    try:
        task_class, config_class = (types[name] for name in list(types)[:2])
        assert issubclass(config_class, FederatedConfig)
    except (ValueError, TypeError, AssertionError):
        raise ValueError(
            f"`{make_trainer.__name__}` of the config's `trainer` must declare the types of its first two parameters: a "
            "dataclass of its own arguments, and FederatedConfig or a subclass of it."
        ) from None
    task, args, remote = parse_args((task_class, config_class, RemoteConfig), ["--config", str(config), *flags])
    for name, value in overrides.items():
        setattr(args, name, value)
    model = model or args.full_model or remote.base
    if model is None:
        raise ValueError(
            "There is no model: set `full_model` (the owner's), or `base` (one that is exported already)."
        )
    return make_trainer(task, args, model=model, train_dataset=train_dataset), remote


def load_function(reference: str, directory: Path) -> Callable[..., Any]:
    """The function `FILE.py:FUNCTION`, its file relative to `directory`.

    Raises:
        ValueError: if there is no such file or function.
    """
    file, _, name = reference.partition(":")
    path = (directory / file).resolve()
    if not file.endswith(".py") or not path.is_file():
        raise ValueError(f"trainer={reference!r}; expected FILE.py:FUNCTION with a file relative to `{directory}`.")
    # By its name rather than its path, because the owner's process has to import it again to unpickle a reference.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    function = getattr(importlib.import_module(path.stem), name, None)
    if function is None:
        raise ValueError(f"trainer={reference!r}: `{path}` has no `{name}`.")
    return function


def load_rows(path: str | os.PathLike) -> Any:
    """A client's rows as a Dataset: a file of JSON lines, CSV or Parquet, or a directory of `save_to_disk`.

    Raises:
        ValueError: for anything else.
    """
    from datasets import Dataset, load_from_disk

    path = Path(path)
    readers = {".jsonl": Dataset.from_json, ".json": Dataset.from_json, ".csv": Dataset.from_csv}
    readers[".parquet"] = Dataset.from_parquet
    if path.is_dir():
        return load_from_disk(path)
    if not path.is_file() or path.suffix not in readers:
        raise ValueError(f"data='{path}'; expected a file {', '.join(readers)}, or a directory of `save_to_disk`.")
    return readers[path.suffix](str(path))
