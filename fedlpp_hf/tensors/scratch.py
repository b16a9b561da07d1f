# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Directories for what is not finished. Whoever works in one holds its lock, and what a killed process left is found by that.

Locks and not process ids: ids repeat, and processes in two containers have the same ones.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic import sync_path


logger = logging.getLogger(__name__)


@contextmanager
def working_directory(target: Path, doing: str) -> Iterator[Path]:
    """Make a hidden sibling of `target` to write into; it is removed, unless the block has given it another name.

    One that a killed process left is emptied and used again.

    Args:
        target: What is being written.
        doing: What one does to it, a word of the hidden name and of the errors: `merging into`.

    Raises:
        RuntimeError: if another process is at it.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f".{target.name}.{doing.partition(' ')[0]}"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        if _try_lock(lock) is False:
            raise RuntimeError(f"Another process is {doing} `{target}` right now.")
        if not _is_at(work, lock):
            raise RuntimeError(f"Another process has just finished {doing} `{target}`.")
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield work
        finally:
            # By its inode: by then another process may have one of the same name.
            if _is_at(work, lock):
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def replaced_directory(target: Path, doing: str) -> Iterator[Path]:
    """Name a directory for the block to make, which takes the place of `target` once it is whole and on disk.

    Where the block fails, the old one stays. Where the process was killed during the exchange, the next call mends that first.

    Args:
        target: What is being written.
        doing: As in [`working_directory`].

    Raises:
        RuntimeError: if another process is at it.
    """
    with working_directory(target, doing) as work:
        fresh, old = work / target.name, work.with_name(f".{target.name}.replaced")
        if old.exists():  # left by a process that was killed after the first of the two renamings below
            shutil.rmtree(old) if target.exists() else old.rename(target)
        yield fresh
        # The new name must not be on disk before the files are: whoever finds it takes them for whole.
        for path in (*fresh.rglob("*"), fresh):
            sync_path(path)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        sync_path(work.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Make a directory under the system's temporary one, for this process alone; it is removed at the end of the block.

    Those of this user's processes that were killed, with the same `prefix`, are removed first.
    """
    sweep(prefix)
    path, lock = _make_locked(prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(prefix: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError):  # another process's sweep has met it before its lock
            lock = os.open(path, os.O_RDONLY)
            if _try_lock(lock) is not False and _is_at(path, lock):
                return path, lock
            os.close(lock)


def sweep(prefix: str) -> None:
    """Remove what [`temporary_directory`] made, with this `prefix`, for processes of this user that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            status = path.lstat()
            if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # it has just gone
            continue
        try:
            if _try_lock(lock):  # and not None: it may be anybody's
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the directory that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool | None:
    """Lock a directory for this process; False if another one has it, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems
        logger.warning(f"Directories there can't be locked ({error}). Let one process at a time write to one place.")
        return None
    return True
