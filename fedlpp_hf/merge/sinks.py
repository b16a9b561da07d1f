# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Where the bytes of a merged shard go: into the new file, or, to verify it, into a comparison with that file."""

import contextlib
import os
from pathlib import Path
from typing import Protocol

import torch

from ..base.shards import read_shard
from ..tensors.files import read_range
from .copying import clone_file, copy_range, find_difference, reserve_file, start_writeback, write_range
from .jobs import Copy, ShardJobs


class Sink(Protocol):
    """Takes all bytes of one merged shard, from any thread and in any order."""

    def __enter__(self) -> "Sink": ...

    def __exit__(self, *error: object) -> None: ...

    def start(self, source: int, jobs: ShardJobs) -> list[Copy]:
        """Take the header, before everything else. Returns the copies that are still to do."""

    def take_copy(self, source: int, copy: Copy) -> None:
        """Take a range of the file `source`."""

    def take_rows(self, rows: torch.Tensor, to: int, name: str) -> None:
        """Take rows of the tensor `name`, which belong at byte `to`."""

    def finish(self, to: int, length: int) -> None:
        """Take note that all bytes of a range were taken."""


class FileWriter:
    """Writes a new file, which is on disk at the end if `sync` is set."""

    def __init__(self, path: Path, sync: bool = False):
        self.path = path
        self._sync = sync

    def __enter__(self) -> "FileWriter":
        self._file = open(self.path, "xb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            if self._sync and error[0] is None:
                os.fsync(self._file.fileno())

    def start(self, source: int, jobs: ShardJobs) -> list[Copy]:
        """Write the header, or share all blocks of the source where the file system can."""
        if jobs.new is jobs.old and clone_file(source, self._file.fileno()):
            return []
        reserve_file(self._file.fileno(), jobs.new.size)
        write_range(self._file.fileno(), jobs.new.header, 0)
        return jobs.copies

    def take_copy(self, source: int, copy: Copy) -> None:
        """Copy the range."""
        copy_range(source, self._file.fileno(), copy.start, copy.length, copy.to)

    def take_rows(self, rows: torch.Tensor, to: int, name: str) -> None:
        """Write the rows."""
        write_range(self._file.fileno(), _view_bytes(rows), to)

    def finish(self, to: int, length: int) -> None:
        """Let the disk work on a range while the next ones are computed: then there is little to wait for at the end."""
        if self._sync:
            start_writeback(self._file.fileno(), to, length)


class FileComparer:
    """Compares with a file that was written, read from the disk as far as the system allows.

    Raises:
        RuntimeError: from any method, naming what differs.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "FileComparer":
        self._file = open(self.path, "rb", buffering=0)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def start(self, source: int, jobs: ShardJobs) -> list[Copy]:
        """Compare the header."""
        header = os.pread(self._file.fileno(), len(jobs.new.header), 0)
        if read_shard(self.path) != jobs.new or header != jobs.new.header:
            raise RuntimeError(f"The header of `{self.path.name}` is not what was written; the disk is damaged.")
        return jobs.copies

    def take_copy(self, source: int, copy: Copy) -> None:
        """Compare the range."""
        at = find_difference(source, self._file.fileno(), copy.start, copy.length, copy.to)
        if at is not None:
            raise RuntimeError(
                f"Byte {copy.to + at} of `{self.path.name}` is not the full model's; the merge is damaged."
            )

    def take_rows(self, rows: torch.Tensor, to: int, name: str) -> None:
        """Compare the rows."""
        data = _view_bytes(rows)
        written = bytearray(len(data))
        read_range(self._file.fileno(), memoryview(written), to)
        if written != data:
            raise RuntimeError(f"`{name}` in `{self.path.name}` is not what the merge computes; it is damaged.")

    def finish(self, to: int, length: int) -> None:
        """Nothing is left to do."""


def _view_bytes(rows: torch.Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data
