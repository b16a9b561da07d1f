# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Faults at a process's file operations: it is killed at the k-th one, the power is cut there, or the disk is full from there on.

[`Faults`] counts every operation that changes files: writes, creations, renames, links, removals and syncs, through Python,
shutil and safetensors. It is installed in a forked child and stays. Python 3.11 or newer: pathlib of 3.10 calls functions that it
has bound when it was imported.

What a power cut leaves is modelled as on ext4 and XFS: of a file that was not synced, a part is missing at its end; of the
operations on names since the last sync of a directory, the last ones did not happen.
"""

import builtins
import errno
import io
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch


KILLED = 137  # exit code of a child at its fault
MODES = ("kill", "cut", "full")
_NEEDS_ROOM = {"open", "write", "mkdir", "rename", "link", "sync"}  # what a full disk refuses; removals go on

_open, _os_open, _write, _link, _mkdir = builtins.open, os.open, os.write, os.link, os.mkdir
_unlink, _rename, _rmdir = os.unlink, os.rename, os.rmdir


class Faults:
    """Counts file operations below `root`, and has its fault at the one with the number `at`, counted from 0.

    Args:
        root: What lies elsewhere is neither counted nor harmed.
        at: None to count alone.
        mode: One of `kill` (dies, half-way through a write), `cut` (the same, and what was not synced is lost) and `full`
            (this operation and all later ones that need room fail with ENOSPC, the first write half-way).
        chance: Decides what a power cut takes.
    """

    def __init__(self, root: Path, at: int | None, mode: str = "kill", chance: random.Random | None = None):
        self.root, self.at, self.mode = os.path.realpath(root), at, mode
        self.chance = chance or random.Random(0)
        self.count = 0
        self._lock = threading.RLock()
        self._unsynced: set[int] = set()  # inodes of files with data that may be lost
        self._undo: list[Callable[[], None]] = []  # of operations on names since the last sync of a directory
        self._stash = Path(f"{self.root}.stash")

    def install(self) -> None:
        """Put itself in front of everything that changes files, for the rest of this process."""
        if self.mode == "cut":
            shutil.rmtree(self._stash, ignore_errors=True)
            self._stash.mkdir()
        for name, kind in (
            ("mkdir", "mkdir"),
            ("rmdir", "remove"),
            ("unlink", "remove"),
            ("remove", "remove"),
            ("rename", "rename"),
            ("replace", "rename"),
            ("link", "link"),
            ("symlink", "link"),
        ):
            setattr(os, name, self._wrap_names(getattr(os, name), name, kind))
        for name in ("write", "pwrite", "sendfile", "copy_file_range", "ftruncate"):
            setattr(os, name, self._wrap_data(getattr(os, name), name))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._wrap_sync(getattr(os, name)))
        os.open = self._open_descriptor
        builtins.open = io.open = self._open_file
        safetensors.torch.serialize_file = self._wrap_serialize(safetensors.torch.serialize_file)

    def end(self) -> None:
        """The work is done. A power cut that it did not reach happens now."""
        if self.mode == "cut":
            self._cut()
            os._exit(KILLED)

    # --- What happens at an operation.
    def is_due(self, number: int, kind: str) -> bool:
        """Whether the fault is at this operation, or was before it; called once for each."""
        return self.at is not None and number >= self.at

    def _reach(self, kind: str, half: Callable[[], Any] | None = None) -> None:
        """Count an operation; at the fault, do `half` of it and die, or raise what a full disk does."""
        with self._lock:
            number, self.count = self.count, self.count + 1
            if not self.is_due(number, kind):
                return
            if self.mode == "full":
                if kind not in _NEEDS_ROOM:
                    return
                if half is not None and number == self.at:
                    half()
                raise OSError(errno.ENOSPC, "No space left on device")
            if half is not None:
                half()
            if self.mode == "cut":
                self._cut()
            os._exit(KILLED)

    def _cut(self) -> None:
        lost = self.chance.randint(0, len(self._undo))
        for undo in reversed(self._undo[len(self._undo) - lost :]):
            try:
                undo()
            except OSError:  # a later operation that stayed depends on it
                continue
        for directory, _, files in os.walk(self.root):
            for name in files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if status.st_ino in self._unsynced and stat.S_ISREG(status.st_mode):
                    os.truncate(path, self.chance.choice((0, self.chance.randint(0, status.st_size), status.st_size)))

    # --- Operations on names.
    def _wrap_names(self, function: Callable, name: str, kind: str) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            places = _locate(arguments, options, 1 if kind in ("mkdir", "remove") or name == "symlink" else 2)
            if name == "symlink":
                places = _locate(arguments[1:], options, 1)
            if not any(self._is_ours(place) for place in places):
                return function(*arguments, **options)
            with self._lock:
                self._reach(kind)
                undo = self._plan_undo(name, places) if self.mode == "cut" else None
                result = function(*arguments, **options)
                if undo is not None:
                    self._undo.append(undo)
                return result

        return call

    def _plan_undo(self, name: str, places: list[str]) -> Callable[[], None]:
        """What takes an operation on names back; called before it happens."""
        if name == "mkdir":
            return lambda: _rmdir(places[0])
        if name == "rmdir":
            return lambda: _mkdir(places[0])
        if name in ("unlink", "remove"):
            kept = self._keep(places[0])
            return lambda: _rename(kept, places[0])
        if name in ("link", "symlink"):
            return lambda: _unlink(places[-1])
        source, target = places
        kept = self._keep(target) if os.path.isfile(target) else None

        def move_back() -> None:
            _rename(target, source)
            if kept is not None:
                _rename(kept, target)

        return move_back

    def _keep(self, path: str) -> str:
        kept = str(self._stash / str(self.count))
        _link(path, kept, follow_symlinks=False)
        return kept

    # --- Data.
    def _wrap_data(self, function: Callable, name: str) -> Callable:
        def call(descriptor: int, *arguments: Any, **options: Any) -> Any:
            target = arguments[0] if name == "copy_file_range" else descriptor
            if not self._is_ours_open(target):
                return function(descriptor, *arguments, **options)

            def half() -> None:
                if name in ("write", "pwrite"):
                    data = memoryview(arguments[0]).cast("B")
                    function(descriptor, data[: len(data) // 2], *arguments[1:])

            self._touch(target)
            self._reach("write", half)
            return function(descriptor, *arguments, **options)

        return call

    def _wrap_sync(self, function: Callable) -> Callable:
        def call(file: Any) -> Any:
            descriptor = file if isinstance(file, int) else file.fileno()
            if not self._is_ours_open(descriptor):
                return function(file)
            self._reach("sync")
            with self._lock:
                status = os.fstat(descriptor)
                self._unsynced.discard(status.st_ino)
                if stat.S_ISDIR(status.st_mode):
                    self._undo.clear()
            # The kernel's own sync costs milliseconds, and nothing here outlives the machine.
            return None

        return call

    def _wrap_serialize(self, function: Callable) -> Callable:
        def call(tensors: Any, filename: Any, metadata: Any = None) -> Any:
            if not self._is_ours(str(filename)):
                return function(tensors, filename, metadata)
            self._create(str(filename))

            def half() -> None:
                data = safetensors.serialize(tensors, metadata)
                with _open(filename, "wb") as file:
                    file.write(data[: len(data) // 2])

            self._reach("write", half)
            result = function(tensors, filename, metadata)
            self._unsynced.add(os.stat(filename).st_ino)
            return result

        return call

    # --- Files that are opened.
    def _open_descriptor(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        place = _locate((path,), options, 1)[0]
        if not flags & (os.O_CREAT | os.O_TRUNC) or not self._is_ours(place):
            return _os_open(path, flags, *arguments, **options)
        self._create(place)
        descriptor = _os_open(path, flags, *arguments, **options)
        self._touch(descriptor)
        return descriptor

    def _open_file(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return _open(file, mode, *arguments, **options)
        ours = self._is_ours_open(file) if isinstance(file, int) else self._is_ours(os.path.abspath(os.fsdecode(file)))
        if not ours:
            return _open(file, mode, *arguments, **options)
        if not isinstance(file, int):
            self._create(os.path.abspath(os.fsdecode(file)))
        opened = _open(file, mode, *arguments, **options)
        self._touch(opened.fileno())
        return _File(opened, self)

    def _create(self, path: str) -> None:
        """Count the opening of a file to write, which makes or empties it."""
        exists = os.path.lexists(path)
        with self._lock:
            self._reach("open")
            if self.mode == "cut" and not exists:
                self._undo.append(lambda: _unlink(path))

    def write_file(self, file: Any, data: Any) -> int:
        """A write through Python's files."""

        def half() -> None:
            file.write(data[: len(data) // 2])
            file.flush()

        self._touch(file.fileno())
        self._reach("write", half)
        return file.write(data)

    def _touch(self, descriptor: int) -> None:
        self._unsynced.add(os.fstat(descriptor).st_ino)

    def _is_ours(self, path: str) -> bool:
        return self._is_below(os.path.realpath(os.path.dirname(path)))

    def _is_ours_open(self, descriptor: int) -> bool:
        try:
            return self._is_below(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            return False

    def _is_below(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self.root}/")


class _File:
    """A file whose writes are counted; everything else is the file's own."""

    def __init__(self, file: Any, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        return self._faults.write_file(self._file, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def _locate(arguments: tuple[Any, ...], options: dict[str, Any], count: int) -> list[str]:
    """The absolute paths among an operation's arguments; a relative one may start from a directory that is open."""
    directories = [options.get("dir_fd", options.get("src_dir_fd")), options.get("dst_dir_fd", options.get("dir_fd"))]
    found = []
    for path, directory in zip(arguments[:count], directories, strict=False):
        name = os.fsdecode(path)
        if directory is not None and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
        found.append(os.path.abspath(name))
    return found
