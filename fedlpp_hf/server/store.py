# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's state on disk: rounds that are committed whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, write_adapter
from ..tensors.atomic import sync_path, write_atomically


FEDERATION_DIR = "_federation"  # `push_to_hub` skips names that begin with an underscore
FEDERATION_FILE = "federation.json"
ROUND_FILE = "round.json"
SERVER_STATE = "server_state.safetensors"
SCHEMA_VERSION = 2


class RoundStore:
    """Rounds under `output_dir/_federation/rounds`. A round counts once its `round.json` is there, written last.

    Round 0 is the state before the first round.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(output_dir)
        self.root = self.output_dir / FEDERATION_DIR

    @property
    def updates_dir(self) -> Path:
        """Where the updates of the round under way are; no part of the state."""
        return self.root / "updates"

    @property
    def exists(self) -> bool:
        return (self.root / FEDERATION_FILE).is_file()

    def create(self, federation: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin a federation.

        Raises:
            ValueError: if there is one already and `overwrite` is not set.
        """
        if self.exists:
            if not overwrite:
                raise ValueError(
                    f"`{self.output_dir}` already holds a federation. Resume it with `resume_from_checkpoint=True` "
                    "(--resume_from_checkpoint), delete it with `overwrite=True` (--overwrite), or choose another "
                    "output_dir."
                )
            if (self.root / "rounds").exists():
                shutil.rmtree(self.root / "rounds")
        _write_json(self.root / FEDERATION_FILE, {"schema": SCHEMA_VERSION, **federation})

    def read(self) -> dict[str, Any]:
        """What [`create`] wrote.

        Raises:
            ValueError: if there is no federation, or one of another schema.
        """
        if not self.exists:
            raise ValueError(f"`{self.output_dir}` holds no federation to resume; start one without resuming.")
        federation = _read_json(self.root / FEDERATION_FILE)
        if federation.get("schema") != SCHEMA_VERSION:
            raise ValueError(
                f"The federation in `{self.output_dir}` has schema {federation.get('schema')}; this version of "
                f"fedlpp_hf reads {SCHEMA_VERSION}. Resume it with the version that began it, or start another one."
            )
        return federation

    def round_dir(self, number: int) -> Path:
        return self.root / "rounds" / f"round-{number:05d}"

    def commit(
        self,
        number: int,
        adapter: Mapping[str, torch.Tensor],
        peft_config: PeftConfig,
        server_state: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
    ) -> None:
        """Write a round: an adapter as a PEFT repository, the server's state, and last its record, the commit mark."""
        directory = self.round_dir(number)
        shutil.rmtree(directory, ignore_errors=True)  # left by a run that died before its commit mark
        write_adapter(directory, adapter, peft_config)
        save_file({key: value.contiguous() for key, value in server_state.items()}, directory / SERVER_STATE)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, SERVER_STATE):
            sync_path(directory / name)
        _write_json(directory / ROUND_FILE, record)

    def latest(self) -> int | None:
        """The last committed round, or None."""
        names = [path.parent.name.removeprefix("round-") for path in self.root.glob(f"rounds/round-*/{ROUND_FILE}")]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def load(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Adapter and server state of a committed round.

        Raises:
            ValueError: if a file is damaged.
        """
        directory = self.round_dir(number)
        try:
            return read_adapter(directory)[0], load_file(directory / SERVER_STATE)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"Round {number} in `{directory}` can't be read ({error}). Delete that directory to resume from the "
                "round before it."
            ) from error

    def records(self) -> list[dict[str, Any]]:
        """The records of all committed rounds, in order."""
        latest = self.latest()
        return [] if latest is None else [_read_json(self.round_dir(n) / ROUND_FILE) for n in range(latest + 1)]

    def publish(self, adapter: Mapping[str, torch.Tensor], peft_config: PeftConfig) -> None:
        """Make `output_dir` itself a PEFT repository of the server's adapter."""
        staging = self.root / "publish"
        write_adapter(staging, adapter, peft_config)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            os.replace(staging / name, self.output_dir / name)
        staging.rmdir()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` can't be read ({error}).") from error
