# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The settings that a client's processes share, as a file."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..processes.local_socket import find_private_directory


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client's processes need to know; `fedlpp-hf client` writes the file, and the SuperNode passes its path on.

    Args:
        config: YAML file of the federation.
        data: the client's rows.
        client_id: the client's name in the federation.
        state_dir: directory for keys, logs and this file.
        cache_dir: directory for bases that the server sends.
        flags: flags that override the configuration.
        base: directory or Hub id of the client's copy of the base, if the server does not send it.
        warm: keep a trainer running between tasks.
        launch: the command that starts the trainer; by default this interpreter.
        parent: id of a process; the trainer ends when this process ends.
        start_timeout: seconds until the trainer must be ready.
        policy: YAML file of the client's own conditions.
        dry_run: train, show what would leave, and send nothing.
        peer_keys: directory with the other clients' public keys, for secure aggregation.
    """

    config: str
    data: str
    client_id: str
    state_dir: str
    cache_dir: str
    flags: list[str] = field(default_factory=list)
    base: str | None = None
    warm: bool = True
    launch: list[str] = field(default_factory=list)
    parent: int | None = None
    start_timeout: float = 600.0
    policy: str | None = None
    dry_run: bool = False
    peer_keys: str | None = None

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ClientSettings":
        """Read the file that [`write`] wrote.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        try:
            settings = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            texts = [settings.config, settings.data, settings.client_id, settings.state_dir, settings.cache_dir]
            if not all(isinstance(text, str) for text in (*texts, *settings.flags, *settings.launch)):
                raise ValueError("it holds something else than names, paths and flags")
            return settings
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"The client's settings `{path}` can't be read ({error}); start `fedlpp-hf client`."
            ) from error

    def write(self) -> Path:
        """Write `client.json` into `state_dir` and return its path."""
        path = Path(self.state_dir) / "client.json"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @property
    def key_file(self) -> Path:
        """The secret that a caller of the trainer must know."""
        return Path(self.state_dir) / "trainer.key"

    @property
    def log_file(self) -> Path:
        """The output of the trainer."""
        return Path(self.state_dir) / "trainer.log"

    @property
    def dry_run_file(self) -> Path:
        """What would have left in the last task of a dry run."""
        return Path(self.state_dir) / "dry_run.md"

    @property
    def ledger_dir(self) -> Path:
        """The directory of the ledger that a policy needs."""
        return Path(self.state_dir) / "ledger"

    @property
    def pid_file(self) -> Path:
        """The id of the running trainer."""
        return Path(self.state_dir) / "trainer.pid"

    @property
    def lock_file(self) -> Path:
        """Held while the trainer starts."""
        return Path(self.state_dir) / "trainer.lock"

    @property
    def socket_file(self) -> Path:
        """The trainer's socket. Its path must stay below about a hundred characters, so it is not in `state_dir`."""
        name = hashlib.sha256(str(Path(self.state_dir).resolve()).encode()).hexdigest()[:24]
        return find_private_directory() / f"{name}.sock"
