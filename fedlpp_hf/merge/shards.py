# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Safetensors files as ranges of bytes: where each tensor lies, and how to copy and patch without loading a model."""

import errno
import fcntl
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..tensors.files import DTYPES, TensorRange, parse_header, read_header


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_FICLONE = 0x40049409
# What a file system says that can't copy or clone inside the kernel.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOTTY, errno.EPERM}
_COPY_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header as it is on disk, and its tensors in the order of their bytes."""

    file: str
    header: bytes
    tensors: dict[str, TensorRange]
    size: int


def parse_shard(file: str, size: int, read: Callable[[int, int], bytes]) -> Shard:
    """Read the header of a safetensors file of `size` bytes through `read(offset, length)`.

    Raises:
        ValueError: if the header is damaged, or its tensors don't fill the file exactly: a truncated download.
    """
    try:
        header = read_header(size, read)
        return Shard(file, header, parse_header(header, size), size)
    except ValueError as error:
        raise ValueError(f"`{file}` {error}. Download it again.") from error


def read_shard(path: Path) -> Shard:
    """[`parse_shard`] of a file on disk."""
    with path.open("rb") as file:
        return parse_shard(path.name, path.stat().st_size, lambda at, length: os.pread(file.fileno(), length, at))


def read_index(text: str) -> dict[str, str]:
    """The `weight_map` of a sharded checkpoint's index.

    Raises:
        ValueError: if it has none, or names files outside its directory.
    """
    try:
        weight_map = json.loads(text)["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{WEIGHTS_INDEX}` can't be read ({error}). Download it again.") from error
    for file in files:
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"`{WEIGHTS_INDEX}` names the file {file!r}; expected safetensors beside it.")
    return weight_map


def check_index(shards: Mapping[str, Shard], weight_map: Mapping[str, str]) -> None:
    """Refuse an index that does not say what the shards hold.

    Raises:
        ValueError: naming the first tensor that is not where the index has it, or that the index doesn't know.
    """
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise ValueError(f"`{file}` has no `{name}`, which `{WEIGHTS_INDEX}` says it has.")
    for shard in shards.values():
        for name in shard.tensors:
            if weight_map.get(name) != shard.file:
                raise ValueError(f"`{shard.file}` has `{name}`, which `{WEIGHTS_INDEX}` does not have there.")


def change_layout(shard: Shard, changes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shard:
    """The shard with other dtypes and shapes for some tensors, and new ones at its end; itself if nothing differs."""
    same = {name: (tensor.dtype, tensor.shape) for name, tensor in shard.tensors.items()}
    wanted = same | dict(changes)
    if wanted == same:
        return shard
    old = json.loads(shard.header[8:])
    header = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    offsets, position = {}, 0
    for name, (dtype, shape) in wanted.items():
        length = DTYPES[dtype].itemsize if name not in shard.tensors or name in changes else 0
        for dimension in shape:
            length *= dimension
        if name in shard.tensors and name not in changes:
            length = shard.tensors[name].stop - shard.tensors[name].start
        offsets[name] = (position, position + length)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {
        name: TensorRange(name, *wanted[name], start + offsets[name][0], start + offsets[name][1]) for name in wanted
    }
    return Shard(shard.file, struct.pack("<Q", len(text)) + text, tensors, start + position)


def clone_file(source: int, destination: int) -> bool:
    """Make `destination` share the blocks of `source` (a reflink); False where the file system has none."""
    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def shares_blocks(source: Path, directory: Path) -> bool:
    """Whether a file in `directory` can share the blocks of `source`: tried, as nothing else tells."""
    with open(source, "rb") as reader, tempfile.TemporaryFile(dir=directory) as writer:
        return clone_file(reader.fileno(), writer.fileno())


def copy_range(source: int, destination: int, start: int, length: int, to: int) -> None:
    """Copy `length` bytes at `start` to offset `to`, inside the kernel where it can.

    Raises:
        OSError: as the system calls do; the source ending early is one.
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


def find_difference(
    one: int, other: int, start: int, length: int, other_start: int, block: int = _COPY_BLOCK
) -> int | None:
    """The first byte (counted from `start`) in which two ranges differ, or None."""
    for at in range(0, length, block):
        count = min(block, length - at)
        a, b = os.pread(one, count, start + at), os.pread(other, count, other_start + at)
        if a != b:
            return at + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None


def sync_file(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
