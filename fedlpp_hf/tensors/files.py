# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tensors in safetensors files, read whole or part by part."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial

import torch

from .headers import STORED, TensorRange, parse_header, read_header


DTYPES = {name: getattr(torch, dtype.name) for name, dtype in STORED.items()}


def read_range(descriptor: int, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from offset `start`."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if not count:
            raise OSError(errno.EIO, "the file ended while it was read; is someone writing to it?")
        done += count


def read_tensor(path: str | os.PathLike[str], tensor: TensorRange) -> torch.Tensor:
    """Read one tensor of a file into memory.

    Raises:
        ValueError: if torch has no such dtype.
    """
    data = torch.empty(tensor.stop - tensor.start, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        read_range(file.fileno(), data.numpy().data, tensor.start)
    return data.view(tensor.torch_dtype).view(tensor.shape)


class TensorFile(Mapping[str, torch.Tensor]):
    """An adapter or an update in a safetensors file; tensors, or parts of them, are read when they are asked for.

    An object takes the memory of its path. The 128 files used last stay open, and equal headers are kept once. Files are
    read and not mapped: a map costs a fault for every few pages, which takes longer than to copy them.

    Raises:
        ValueError: on reading, if the file is damaged or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        stat = os.stat(path)
        self._stamp = (stat.st_mtime_ns, stat.st_size)

    def __getitem__(self, key: str) -> torch.Tensor:
        shape = self.shape_of(key)
        return self.read_values(key, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._open().tensors)

    def __len__(self) -> int:
        return len(self._open().tensors)

    def shape_of(self, key: str) -> torch.Size:
        """A tensor's shape, from the header."""
        return torch.Size(self._open().tensors[key].shape)

    def read_values(self, key: str, start: int, end: int, memory: memoryview | None = None) -> torch.Tensor:
        """Read values of a tensor, in memory order.

        Args:
            key: the tensor's name.
            start: the first value.
            end: the value after the last.
            memory: where to put them; they are valid until it is used again. By default new memory.
        """
        file = self._open()
        tensor = file.tensors[key]
        size = tensor.torch_dtype.itemsize
        if memory is None:
            memory = torch.empty((end - start) * size, dtype=torch.uint8).numpy().data
        part = memory[: (end - start) * size]
        read_range(file.descriptor, part, tensor.start + start * size)
        return torch.frombuffer(part, dtype=tensor.torch_dtype) if part else torch.empty(0, dtype=tensor.torch_dtype)

    def _open(self) -> "_OpenFile":
        return _open_file(self.path, self._stamp)


Read = Callable[[int, int], torch.Tensor]


def find_values(
    tensors: Mapping[str, torch.Tensor], key: str, memory: memoryview | None = None
) -> tuple[torch.Size, Read]:
    """A tensor's shape, and a function that returns its values from one place to another in memory order, as `(n,)`.

    From a [`TensorFile`] only these are read, into `memory` (see [`TensorFile.read_values`]).
    """
    if isinstance(tensors, TensorFile):
        return tensors.shape_of(key), partial(tensors.read_values, key, memory=memory)
    tensor = tensors[key]
    values = tensor.reshape(-1)
    return tensor.shape, lambda start, end: values[start:end]


class _OpenFile:
    def __init__(self, path: str, descriptor: int):
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        try:
            header = read_header(size, lambda start, length: os.pread(descriptor, length, start))
            self.tensors = _parse_header(header, size)
        except ValueError as error:
            raise ValueError(f"`{path}` {error}.") from error

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=128)
def _open_file(path: str, stamp: tuple[int, int]) -> _OpenFile:
    return _OpenFile(path, os.open(path, os.O_RDONLY))


# The updates of a round have equal headers; a large adapter's takes milliseconds to parse, and 200 kB.
_parse_header = lru_cache(maxsize=8)(parse_header)


def close_files() -> None:
    """Close the files that [`TensorFile`]s have open; a deleted file takes up the disk until it is closed."""
    _open_file.cache_clear()
