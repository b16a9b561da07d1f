# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client has answered so far, on its own disk: it outlives processes, and no server can set it back."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..tensors.atomic import write_atomically
from ..wire.encoding import restore_tensors
from ..wire.messages import ClientTask
from .proxy_check import EarlierRound


LEDGER_FILE, _PROXY_FILE = "ledger.json", "ledger_proxy.safetensors"
SCHEMA_VERSION = 1


@dataclass(slots=True)
class ClientLedger:
    """Rounds that this client has begun to answer, and the last adapter that it was sent.

    It is of the rows and not of a federation: a server that gives its federation another name starts no new count.

    Args:
        directory: Where it stands; it must stay between runs.
        rounds: Federation, number and SHA-256 of each task.
        steps: Norm of the client's own change of each tensor in the last round, before clipping.
        rank_one: B factors whose own change had rank one.
        record: What record-level privacy has spent: noise multiplier, sampling rate and steps, in order.
    """

    directory: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, float] = field(default_factory=dict)
    rank_one: list[str] = field(default_factory=list)
    record: list[list[float]] = field(default_factory=list)

    @classmethod
    def open(cls, directory: Path) -> "ClientLedger":
        """The ledger in `directory`, or a new one.

        Raises:
            ValueError: if it is there and can't be read: an empty one in its place would forget what was spent.
        """
        path = directory / LEDGER_FILE
        if not path.exists():
            return cls(directory)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA_VERSION:
                raise ValueError(f"its schema is not {SCHEMA_VERSION}")
            return cls(directory, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"The client's ledger `{path}` can't be read ({error}). Put back a copy of it; without it nobody knows what "
                "this client's rows have been used for."
            ) from error

    def write(self) -> None:
        """Put it on disk, whole."""
        names = ("rounds", "steps", "rank_one", "record")
        values = {"schema": SCHEMA_VERSION} | {name: getattr(self, name) for name in names}
        write_atomically(self.directory / LEDGER_FILE, json.dumps(values, indent=1).encode(), mode=0o600)

    def has(self, task: ClientTask) -> bool:
        """Whether this very task is in it. Its answer tells nothing new, unless noise is drawn anew."""
        return any(entry["task"] == digest_task(task) for entry in self.rounds)

    def has_other(self, task: ClientTask) -> bool:
        """Whether another task of the same federation and round is in it."""
        same = [e for e in self.rounds if (e["federation"], e["round"]) == (task.federation_id, task.round)]
        return bool(same) and not self.has(task)

    def begin(self, task: ClientTask) -> None:
        """Enter a task, before anything is trained: a run that crashes counts."""
        self.rounds.append({"federation": task.federation_id, "round": task.round, "task": digest_task(task)})
        if task.proxy is not None:
            write_atomically(self.directory / _PROXY_FILE, save(restore_tensors(task.proxy)), mode=0o600)
        self.write()

    def earlier(self, task: ClientTask) -> EarlierRound | None:
        """The last round, if it was of the same federation and before the task's."""
        last = self.rounds[-1] if self.rounds else None
        path = self.directory / _PROXY_FILE
        if last is None or last["federation"] != task.federation_id or last["round"] >= task.round:
            return None
        try:
            return EarlierRound(last["round"], load_file(path), self.steps, frozenset(self.rank_one))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`{path}` can't be read ({error}). Put back a copy of it.") from error


def digest_task(task: ClientTask) -> str:
    """The SHA-256 of a task's bytes."""
    return hashlib.sha256(task.to_bytes()).hexdigest()
