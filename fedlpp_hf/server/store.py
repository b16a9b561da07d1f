# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's state on disk: rounds that are committed whole or not at all.

Its records are read without torch: `fedlpp-hf status` must not wait for it.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tensors.atomic import hash_file, sync_path, write_atomically
from ..tensors.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

FEDERATION_DIR = "_federation"  # `push_to_hub` skips names that begin with an underscore
FEDERATION_FILE = "federation.json"
ROUND_FILE = "round.json"
SERVER_STATE = "server_state.safetensors"
ROUND_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, SERVER_STATE)  # and the record, which has their digests
DROPPED_FILE = "dropped.json"
LOCK_FILE = "lock"
SCHEMA_VERSION = 2
_EARLIER_KEYS = {"schema", "federation_id", "base_fingerprint", "peft_config", "clients", "packages", "config"}
_ADVICE = "Delete that round's directory, and those of later rounds, to resume from the round before it."

logger = logging.getLogger(__name__)


class RoundStore:
    """Rounds under `output_dir/_federation/rounds`. A round counts once its `round.json` is there, written last.

    Round 0 is the state before the first round.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir).absolute()  # a script may change its working directory later
        self.root = self.output_dir / FEDERATION_DIR

    @property
    def updates_dir(self) -> Path:
        """Where the updates of the round under way are; no part of the state."""
        return self.root / "updates"

    @property
    def exists(self) -> bool:
        return (self.root / FEDERATION_FILE).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from running a federation here meanwhile. The lock ends with the process that has it.

        Raises:
            ValueError: if another one has it.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)  # every client's rows and losses are this user's alone
        with open(self.root / LOCK_FILE, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ValueError(
                    f"Another process is running a federation in `{self.output_dir}` ({file.read(200).strip() or 'unknown'}). "
                    "Wait for it, end it, or choose another output_dir. Does each process of a launch run one by itself?"
                ) from error
            except OSError as error:  # some network file systems have no locks
                logger.warning(f"`{self.root}` can't be locked ({error}). Run one federation there at a time.")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
            file.flush()
            yield

    def create(self, federation: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin a federation. One that was stopped before its first commit is no obstacle.

        Raises:
            ValueError: if there is one already and `overwrite` is not set.
        """
        if self.exists:
            if not overwrite and self.latest() is not None:
                raise ValueError(
                    f"`{self.output_dir}` already holds a federation. Resume it with `train(resume_from_checkpoint=True)` "
                    "(--resume_from_checkpoint), delete it with `overwrite=True` (--overwrite), or choose another "
                    "output_dir."
                )
            if (self.root / "rounds").exists():
                shutil.rmtree(self.root / "rounds")
        (self.root / DROPPED_FILE).unlink(missing_ok=True)  # of the federation before
        written = {"schema": SCHEMA_VERSION, **federation}
        _write_json(self.root / FEDERATION_FILE, written | {"sha256": _digest_record(written)})

    def read(self) -> dict[str, Any]:
        """What [`create`] wrote.

        Raises:
            ValueError: if there is no federation, it is damaged, or its schema is another one.
        """
        if not self.exists:
            raise ValueError(f"`{self.output_dir}` holds no federation to resume; start one without resuming.")
        federation = _read_json(path := self.root / FEDERATION_FILE)
        if federation.get("schema") != SCHEMA_VERSION:
            raise ValueError(
                f"The federation in `{self.output_dir}` has schema {federation.get('schema')}; this version of "
                f"fedlpp_hf reads {SCHEMA_VERSION}. Resume it with the version that began it, or start another one."
            )
        digest = federation.pop("sha256", None)
        # Earlier versions wrote none, and nothing but these: a key that lost its name is none of theirs.
        is_earlier = digest is None and federation.keys() <= _EARLIER_KEYS
        if not is_earlier and digest != _digest_record(federation):
            raise ValueError(f"`{path}` is damaged or was changed by hand. Restore it, or start another federation.")
        return federation

    def write_dropped(self, clients: Iterable[str]) -> None:
        """Keep the ids of the clients that the owner has dropped: on disk at once, so that a restart knows them."""
        written = {"clients": sorted(clients)}
        _write_json(self.root / DROPPED_FILE, written | {"sha256": _digest_record(written)})

    def read_dropped(self) -> list[str]:
        """What [`write_dropped`] wrote last; nothing without it.

        Raises:
            ValueError: if it is damaged.
        """
        path = self.root / DROPPED_FILE
        if not path.is_file():
            return []
        written = _read_json(path)
        if written.pop("sha256", None) != _digest_record(written):
            raise ValueError(f"`{path}` is damaged or was changed by hand. Delete it, and drop those clients again.")
        return written["clients"]

    def round_dir(self, number: int) -> Path:
        return self.root / "rounds" / f"round-{number:05d}"

    def commit(
        self,
        number: int,
        adapter: Mapping[str, "torch.Tensor"],
        peft_config: "PeftConfig",
        server_state: Mapping[str, "torch.Tensor"],
        record: Mapping[str, Any],
    ) -> None:
        """Write a round: an adapter as a PEFT repository, the server's state, and last its record, the commit mark.

        Args:
            number: Of the round.
            adapter: The server's adapter.
            peft_config: Of the adapter.
            server_state: What else the server carries on.
            record: For `round.json`.
        """
        from safetensors.torch import save_file

        from ..tensors.adapters import write_adapter

        directory = self.round_dir(number)
        shutil.rmtree(directory, ignore_errors=True)  # left by a run that died before its commit mark
        write_adapter(directory, adapter, peft_config)
        save_file({key: value.contiguous() for key, value in server_state.items()}, directory / SERVER_STATE)
        for name in ROUND_FILES:
            sync_path(directory / name)
        for parent in (directory, directory.parent, self.root):  # their entries, before the mark that counts on them
            sync_path(parent)
        files = {name: hash_file(directory / name) for name in ROUND_FILES}
        record = {**record, "files": files}
        _write_json(directory / ROUND_FILE, record | {"sha256": _digest_record(record)})

    def latest(self) -> int | None:
        """The last committed round, or None."""
        names = [path.parent.name.removeprefix("round-") for path in self.root.glob(f"rounds/round-*/{ROUND_FILE}")]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def load(self, number: int) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
        """Adapter and server state of a committed round.

        Raises:
            ValueError: if a file is damaged, be it by one bit, or [`forget`] has deleted them.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ..tensors.adapters import read_adapter

        directory = self.round_dir(number)
        try:
            files = self._read_record(number)["files"]
            self.check_kept(number)
            for name in ROUND_FILES:
                if (found := hash_file(directory / name)) != files[name]:
                    raise ValueError(
                        f"Round {number}: `{directory / name}` is damaged. Its SHA-256 is {found[:12]}…, and {ROUND_FILE} has "
                        f"{files[name][:12]}…. {_ADVICE}"
                    )
            return read_adapter(directory)[0], load_file(directory / SERVER_STATE)
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"Round {number} in `{directory}` can't be read ({error}). {_ADVICE}") from error

    def check_kept(self, number: int) -> None:
        """
        Raises:
            ValueError: if [`forget`] has deleted the tensors of a committed round.
        """
        if not (self.round_dir(number) / ADAPTER_WEIGHTS).exists():
            raise ValueError(
                f"Round {number} in `{self.round_dir(number)}` has no tensors any more: save_total_limit keeps the last rounds, "
                "round 0, and the best one by the metric that was set then. Choose a round that still has an "
                f"{ADAPTER_WEIGHTS}."
            )

    def forget(self, numbers: Iterable[int]) -> None:
        """Delete the tensors of committed rounds; their records stay, as the history of a federation is read from them."""
        for number in numbers:
            for name in ROUND_FILES:
                (self.round_dir(number) / name).unlink(missing_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """The records of all committed rounds, in order.

        Raises:
            ValueError: if one is missing or damaged.
        """
        latest = self.latest()
        records = [] if latest is None else [self._read_record(number) for number in range(latest + 1)]
        return [{key: value for key, value in record.items() if key != "files"} for record in records]

    def _read_record(self, number: int) -> dict[str, Any]:
        path = self.round_dir(number) / ROUND_FILE
        record = _read_json(path)
        if record.pop("sha256", None) != _digest_record(record):
            raise ValueError(
                f"Round {number}: `{path}` is damaged or was changed by hand: it differs from its own SHA-256. {_ADVICE}"
            )
        return record

    def publish(self, adapter: Mapping[str, "torch.Tensor"], peft_config: "PeftConfig") -> None:
        """Make `output_dir` itself a PEFT repository of the server's adapter."""
        from ..tensors.adapters import write_adapter

        staging = self.root / "publish"
        write_adapter(staging, adapter, peft_config)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            os.replace(staging / name, self.output_dir / name)
        staging.rmdir()


def _digest_record(record: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` can't be read ({error}). Restore it, or start another federation.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"`{path}` holds a {type(value).__name__}, expected an object. Restore it, or start another federation."
        )
    return value
