# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Directories for what is not finished. Whoever works in one holds its lock, and what a killed process left is found by that.

Locks and not process ids: ids repeat, and processes in two containers have the same ones.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

_SECONDS_TO_LOCK = 60  # a directory that was made a moment ago may not be locked yet


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
        if not _try_lock(lock):
            raise RuntimeError(f"Another process is {doing} `{target}` right now.")
        if not work.is_dir() or not os.path.samestat(os.fstat(lock), work.stat()):
            raise RuntimeError(f"Another process has just finished {doing} `{target}`.")
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield work
        finally:
            # By its inode: by then another process may have one of the same name.
            if work.is_dir() and os.path.samestat(os.fstat(lock), work.stat()):
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Make a directory under the system's temporary one, for this process alone; it is removed at the end of the block.

    Those of this user's processes that were killed, with the same `prefix`, are removed first.
    """
    _sweep(prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    lock = os.open(path, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            status = path.lstat()
            if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # it has just gone
            continue
        try:
            if time.time() - status.st_ctime > _SECONDS_TO_LOCK and _try_lock(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock a directory for this process; False if another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        logger.warning(f"Directories there can't be locked ({error}). Let one process at a time write to one place.")
    return True
