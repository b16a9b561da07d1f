# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client keeps to itself from round to round: its own adapter, or the error that compression left of its updates."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..tensors.atomic import write_atomically
from ..wire.messages import ClientTask


class ClientMemory:
    """Tensors of one client in one federation, a file for each round, under `directory`.

    Client ids are the server's, and never become a path.
    """

    def __init__(self, directory: Path, task: ClientTask):
        client = hashlib.sha256(f"{task.federation_id}/{task.client_id}".encode()).hexdigest()[:32]
        self.directory = directory / client
        self.file = self.directory / f"round-{task.round:05d}.safetensors"

    def read(self) -> dict[str, torch.Tensor]:
        """What the client kept in its last round before the task's: a resumed federation may go back a round.

        Raises:
            ValueError: if the file is damaged.
        """
        earlier = [file for file in self._files() if file < self.file]
        try:
            return load_file(earlier[-1]) if earlier else {}
        except SafetensorError as error:
            raise ValueError(
                f"`{earlier[-1]}`, what this client kept of an earlier round, is damaged ({error}). Restore it, or delete "
                f"`{self.directory}`: the client then goes on without it."
            ) from error

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep `tensors` for the next round, and the file of the round before for a federation that goes back."""
        _remove_halves(self.directory)  # of a process that was killed in another round
        write_atomically(self.file, save(tensors))
        for old in [file for file in self._files() if file < self.file][:-1]:
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("round-*.safetensors"))


def sweep_memories(directory: Path) -> None:
    """Remove what killed processes left of files under `directory`, where nobody writes any more."""
    for memory in directory.glob("*/"):
        _remove_halves(memory)


def _remove_halves(directory: Path) -> None:
    for half in directory.glob(".round-*.tmp"):
        half.unlink(missing_ok=True)
