# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Read a federation over a network from its YAML file: settings, trainer and rows."""

import importlib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.arguments import parse_args
from ..config.federated import FederatedConfig
from ..config.yaml_files import read_yaml
from .trainer_file import find_trainer, read_reference


@dataclass
class NetworkConfig:
    """Settings of a federation over a network, in the same file as those of [`FederatedConfig`]."""

    trainer: str = field(
        metadata={
            "help": "FILE.py:FUNCTION that makes the trainer; the path is relative to the config's. Its arguments: the "
            "task's own options (a dataclass, read from the same config), the FederatedConfig, `model` and "
            "`train_dataset`, a mapping of client ids to rows, which is empty on the server."
        }
    )
    base: str | None = field(
        default=None,
        metadata={"help": "Server: directory of an exported base, if no full model is given."},
    )
    mark_key: str | None = field(
        default=None,
        metadata={
            "help": "Server: the owner's secret key file. Each client is then sent its own marked copy of the base, and "
            "`fedlpp-hf trace` tells whose copy a leaked one is."
        },
    )
    join_timeout: float = field(
        default=900.0, metadata={"help": "Seconds that the server waits for `num_clients` clients to join."}
    )
    lost_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds without a sign of life after which a client is dropped from the round."},
    )
    task_retries: int = field(
        default=0, metadata={"help": "How often a failed task is sent again before the round closes."}
    )
    chunk_megabytes: int = field(default=32, metadata={"help": "Size of the pieces in which the base is sent."})


def load_trainer(
    config: str | os.PathLike,
    flags: Sequence[str],
    *,
    model: str | None,
    train_dataset: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Any, NetworkConfig]:
    """Make the trainer that `config` names, with this side's model and rows.

    Args:
        config: YAML file of the federation.
        flags: flags that override it.
        model: by default the full model of the configuration, or else its base.
        train_dataset: the rows of each client that this process trains; empty on a server.
        overrides: values by field name that replace those of the [`FederatedConfig`].

    Raises:
        ValueError: if the configuration names no usable `trainer`, or no model.
    """
    make_trainer, task, args, network = read_settings(config, flags)
    for name, value in (overrides or {}).items():
        setattr(args, name, value)
    model = model or args.full_model or network.base
    if model is None:
        raise ValueError("No model is given: set `full_model` (the owner's), or `base` (an exported one).")
    return make_trainer(task, args, model=model, train_dataset=train_dataset), network


def read_settings(
    config: str | os.PathLike, flags: Sequence[str], other_options: Sequence[str] = ()
) -> tuple[Callable[..., Any], Any, FederatedConfig, NetworkConfig]:
    """The function that makes the trainer, the task's own options, and those of the federation and of the network.

    Args:
        config: YAML file of the federation.
        flags: flags that override it.
        other_options: of the command, parsed already; a mistyped flag may mean one of them.

    Raises:
        ValueError: if the configuration names no usable `trainer`, or a value is wrong.
    """
    make_trainer = load_function(read_reference(config), Path(config).parent)
    types = list(typing.get_type_hints(make_trainer).values())
    if len(types) < 2 or not isinstance(types[1], type) or not issubclass(types[1], FederatedConfig):
        raise ValueError(
            f"`{make_trainer.__name__}`, the config's `trainer`, must declare the types of its first two parameters: a "
            "dataclass with the task's own options, and FederatedConfig or a subclass of it."
        )
    arguments = ["--config", str(config), *flags]
    task, args, network = parse_args((types[0], types[1], NetworkConfig), arguments, other_options=other_options)
    return make_trainer, task, args, network


def is_given(config: str | os.PathLike, flags: Sequence[str], option: str) -> bool:
    """Whether an option is set in the configuration or by a flag."""
    return option in read_yaml(Path(config)) or any(flag.split("=")[0] == f"--{option}" for flag in flags)


def load_function(reference: str, directory: Path) -> Callable[..., Any]:
    """Import the function `FILE.py:FUNCTION`; the path is relative to `directory`.

    Raises:
        ValueError: if there is no such file or function.
    """
    path, name = find_trainer(reference, directory)
    # By name rather than by path: the owner's process imports the module again to unpickle a reference to the function.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    function = getattr(importlib.import_module(path.stem), name, None)
    if function is None:
        raise ValueError(f"trainer={reference!r}: `{path}` has no `{name}`.")
    return function


def load_rows(path: str | os.PathLike) -> Any:
    """Load a client's rows as a Dataset, from a file of JSON lines, CSV or Parquet, or a directory of `save_to_disk`.

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
