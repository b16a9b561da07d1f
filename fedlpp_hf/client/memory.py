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
        self.file = self.directory / _name_file(task.round)

    def read(self) -> dict[str, torch.Tensor]:
        """What the client kept in its last round before the task's: a resumed federation may go back a round.

        Raises:
            ValueError: if the file is damaged.
        """
        earlier = _find_earlier(self.file)
        try:
            return load_file(earlier[-1]) if earlier else {}
        except SafetensorError as error:
            raise ValueError(
                f"`{earlier[-1]}`, what this client kept of an earlier round, is damaged ({error}). Restore it, or delete "
                f"`{self.directory}`: the client then goes on without it."
            ) from error

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep `tensors` for the next round, and the file of the round before for a federation that goes back."""
        write_atomically(self.file, save(tensors))
        _tidy(self.file)


def sweep_memories(directory: Path, last_round: int) -> None:
    """Remove what processes that were killed left under `directory`. Nobody may be writing there.

    Args:
        directory: Of all memories.
        last_round: The last one that is committed.
    """
    for memory in directory.glob("*/"):
        _tidy(memory / _name_file(last_round))


def _name_file(number: int) -> str:
    return f"round-{number:05d}.safetensors"


def _find_earlier(file: Path) -> list[Path]:
    """The files of rounds before that of `file`, in order."""
    return [other for other in sorted(file.parent.glob("round-*.safetensors")) if other < file]


def _tidy(file: Path) -> None:
    """Keep what is of the round of `file` or later, and the last file before; halves are of processes that were killed."""
    for left in (*_find_earlier(file)[:-1], *file.parent.glob(".round-*.tmp")):
        left.unlink()
