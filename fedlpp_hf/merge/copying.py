# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Ranges of bytes between files: shared or copied inside the kernel where it can, written, compared."""

import ctypes
import errno
import fcntl
import os
import tempfile
from pathlib import Path


_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE = 2
# The errors of file systems that can't copy or clone inside the kernel.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOTTY, errno.EPERM}
_COPY_BLOCK = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_libc = ctypes.CDLL(None, use_errno=True)


def clone_file(source: int, destination: int) -> bool:
    """Make `destination` share the blocks of `source` (a reflink); False where the file system can't."""
    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def reserve_file(descriptor: int, size: int) -> None:
    """Give a new file its size, and where the system can, its room on disk: to write there takes less time, and can't fail late.

    Raises:
        OSError: if there is too little room.
    """
    # `os.posix_fallocate` would write into every block of a file system that can't reserve any.
    if hasattr(_libc, "fallocate"):
        if not _libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)):
            return
        number = ctypes.get_errno()
        if number in _NO_ROOM:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)


def start_writeback(descriptor: int, start: int, length: int) -> None:
    """Have the system begin to bring a range to the disk, where it can be told to; an `fsync` later waits, and finds errors."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, ctypes.c_long(start), ctypes.c_long(length), _SYNC_FILE_RANGE_WRITE)


def can_share_blocks(source: Path, directory: Path) -> bool:
    """Whether a file in `directory` can share the blocks of `source`. It is tried, as nothing else tells."""
    with open(source, "rb") as reader, tempfile.TemporaryFile(dir=directory) as writer:
        return clone_file(reader.fileno(), writer.fileno())


def copy_range(source: int, destination: int, start: int, length: int, to: int) -> None:
    """Copy bytes from one file to another, inside the kernel where it can.

    Args:
        source: descriptor of the file to read.
        destination: descriptor of the file to write.
        start: offset in the source.
        length: in bytes.
        to: offset in the destination.

    Raises:
        OSError: as the system calls do, and if the source ends early.
    """
    while length:
        try:
            count = os.copy_file_range(source, destination, length, start, to)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            data = os.pread(source, min(length, _COPY_BLOCK), start)
            write_range(destination, data, to)
            count = len(data)
        if not count:
            raise OSError(errno.EIO, "the source ended while it was copied; is someone writing to it?")
        start, to, length = start + count, to + count, length - count


def write_range(descriptor: int, data: bytes | memoryview, start: int) -> None:
    """Write all of `data` at offset `start`."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], start + done)


def find_difference(one: int, other: int, start: int, length: int, other_start: int) -> int | None:
    """Find the first byte in which two ranges differ.

    Args:
        one: descriptor of a file.
        other: descriptor of another file.
        start: offset in `one`.
        length: in bytes.
        other_start: offset in `other`.

    Returns:
        The byte's number in the ranges; None if they are equal.
    """
    for at in range(0, length, _COPY_BLOCK):
        count = min(_COPY_BLOCK, length - at)
        a, b = os.pread(one, count, start + at), os.pread(other, count, other_start + at)
        if a != b:
            return at + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None
