# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Logs of Flower's processes, kept small: a SuperLink writes a line for every request, a hundred thousand a day for each client."""

import contextlib
import os
import shutil
from pathlib import Path

from .repeating import repeating


MAX_BYTES = 50_000_000  # of a file, and of the older one beside it
_LOOK_SECONDS = 10.0


def keep_small(*paths: Path) -> contextlib.AbstractContextManager[None]:
    """Meanwhile, empty each of these logs once it is too long; what was in it is the file beside it, `.1`.

    Others write them, and must have opened them to append. They go on in the same file, so a few lines that come between copy
    and emptying can be lost.
    """

    def look() -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # it is not there yet, or the disk is full
                empty_if_long(path)

    return repeating(look, _LOOK_SECONDS)


def empty_if_long(path: Path) -> None:
    """Move what is in a log to the file beside it, if that is more than `MAX_BYTES`.

    Raises:
        OSError: if there is no such file, or it can't be copied; then it is left as it is.
    """
    if path.stat().st_size <= MAX_BYTES:
        return
    older, copy = path.with_name(f"{path.name}.1"), path.with_name(f".{path.name}.1.tmp")
    try:
        shutil.copy(path, copy)  # with its mode
        os.replace(copy, older)
        os.truncate(path, 0)
    finally:
        copy.unlink(missing_ok=True)
