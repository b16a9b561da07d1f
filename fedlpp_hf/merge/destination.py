# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The directory of the result: it appears under its name when it is complete, or not at all."""

import errno
import os
import shutil
from pathlib import Path

from ..tensors.atomic import sync_path


# Set in the `config.json` of a merge into Q(W), so that it is not taken, and pushed, for one into W.
VIEW_MARK = "is_clients_view"


def check_destination(output_dir: Path, full_model: str | os.PathLike) -> None:
    """Refuse a place that is taken, or overlaps with the full model.

    Raises:
        ValueError: saying why.
    """
    if output_dir.is_symlink() or (output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))):
        raise ValueError(f"`{output_dir}` exists and is not an empty directory; choose another, or remove it.")
    if not Path(full_model).is_dir():
        return
    source, destination = Path(full_model).resolve(), output_dir.resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise ValueError(
            f"One of `{output_dir}` and the full model `{full_model}` is inside the other; choose a place beside."
        )


def scratch_directory(work: Path) -> Path:
    """The place for shards that are deleted when they are merged; it is not published."""
    return work / ".source"


def publish(work: Path, output_dir: Path, sync: bool) -> None:
    """Give the working directory its name, after everything is on disk if `sync` is set."""
    shutil.rmtree(scratch_directory(work), ignore_errors=True)
    if sync:
        for path in work.rglob("*"):
            sync_path(path)
        sync_path(work)
    os.rename(work, output_dir)
    if sync:
        sync_path(output_dir.absolute().parent)


def check_room(work: Path, needed: int) -> None:
    """Refuse to begin what would not fit.

    Raises:
        OSError: if fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The merge needs {needed / 1e9:.2f} GB in `{work.parent}`, where {free / 1e9:.2f} GB are free.",
        )
