# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""May this run go on with the federation that is on disk?"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.federated import FederatedConfig
from ..config.options import free_options
from .store import RoundStore


_YES, _NO = ("true", "yes", "1"), ("false", "no", "0", "none", "")
_OF_NO_ADAPTER = {"peft_version", "auto_mapping", "runtime_config"}  # what a LoraConfig says of how it is loaded
_ANOTHER = "or start another federation in another output_dir"


def read_resume(value: bool | str | os.PathLike | None, store: RoundStore) -> bool:
    """Whether to resume: True, or the path of this federation or of its last round; from a command line also as text.

    Args:
        value: `resume_from_checkpoint`.
        store: Of the federation.

    Raises:
        ValueError: for a path that does not exist, or belongs to another federation or to an earlier round.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if str(value).lower() in (*_YES, *_NO):
        return str(value).lower() in _YES
    path, given = Path(value).resolve(), f"resume_from_checkpoint='{value}'"
    if not path.exists():
        raise ValueError(f"{given} does not exist. Set it to True to resume the federation in `{store.output_dir}`.")
    latest = store.latest()
    if path in (store.output_dir.resolve(), store.root.resolve()):
        return True
    rounds = store.root.resolve() / "rounds"
    if path.parent != rounds:
        raise ValueError(
            f"{given} is not in output_dir=`{store.output_dir}`, and a federation continues where it began. Set "
            "output_dir to the federation's directory, and resume_from_checkpoint to True."
        )
    if latest is None or path != store.round_dir(latest).resolve():
        raise ValueError(
            f"{given} is not the last committed round, which is {latest}. To go back, delete the directories of later "
            f"rounds in `{rounds}`, and set resume_from_checkpoint to True."
        )
    return True


def check_resumable(then: Mapping[str, Any], now: Mapping[str, Any], args: FederatedConfig) -> None:
    """Refuse to go on with a federation that was begun with another configuration, adapter, base or other clients.

    Args:
        then: What `federation.json` says.
        now: The same of this run.
        args: Its options.

    Raises:
        ValueError: naming what differs.
    """
    now = json.loads(json.dumps(now))
    free = free_options(type(args))
    # Of a single round without a broadcast, clients keep no adapter to go on from.
    kept = args.broadcasts or then["config"].get("num_rounds") != 1
    if args.learning_rate_horizon == "round" and kept:
        free = free | {"num_rounds"}
    for name, value in then["config"].items():
        if name not in free and now["config"].get(name) != value:
            raise ValueError(
                f"This federation was begun with {name}={value!r}, now it is {now['config'].get(name)!r}. Resume with the "
                f"same configuration, {_ANOTHER}."
            )
    _check_adapter(then.get("peft_config", {}), now["peft_config"])
    if then["base_fingerprint"] != now["base_fingerprint"]:
        raise ValueError(
            f"This federation was begun with the base {then['base_fingerprint'][:12]}…, now it is "
            f"{now['base_fingerprint'][:12]}…. Give it the same base, {_ANOTHER}."
        )
    _check_clients(then["clients"], now["clients"])


def _check_adapter(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The factors on disk mean what their configuration says: with another `lora_alpha` they are another adapter."""
    for name in sorted(then.keys() & now.keys() - _OF_NO_ADAPTER):
        one, other = (
            sorted(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value
            for value in (then[name], now[name])
        )
        if one != other:
            raise ValueError(
                f"This federation's adapter was begun with {name}={one!r}, now it is {other!r}. Resume with the same LoraConfig, "
                f"{_ANOTHER}."
            )


def _check_clients(then: Mapping[str, int | None], now: Mapping[str, int | None]) -> None:
    missing, new = [sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())]
    if missing or new:
        differences = [f"{word}: {_shorten(names)}" for word, names in (("missing", missing), ("new", new)) if names]
        raise ValueError(
            f"This federation was begun with {len(then)} clients, and now others are here ({'; '.join(differences)}). The "
            f"clients of a round are drawn from all of them: resume with the same ones, {_ANOTHER}."
        )
    for client, count in then.items():
        if now[client] != count:
            raise ValueError(
                f"Client {client!r} had {_describe(count)} when this federation was begun, and now has "
                f"{_describe(now[client])}. Resume with the same rows, {_ANOTHER}."
            )


def _describe(count: int | None) -> str:
    return "an unknown number of rows" if count is None else f"{count} rows"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
